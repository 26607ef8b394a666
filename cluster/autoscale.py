"""Decides how many rollout actors there should be: enough to keep the learner busy, and no more. Pure; off
unless `actors.count` is a range.

    the learner waited for batches > 10 % of a window                     one actor more
    ... while the actors waited for rewards > 50 % of it                  none: others would wait too
    the actors waited at admission, or for rewards, > 50 % of it,         one actor fewer, if it made a step
        the learner never

A window is 15 s, and lasts until the next step where the learner does not wait: a step may be long, or hang.
It counts only if nothing was under way in it: no actor being placed, loaded or retired, no change less than
15 s old, and training has begun, since the wait for the first batch says nothing about a running pipeline.

With n actors of rate r and a learner that consumes c, one more is asked for while n r < 0.9 c, one fewer
while n r > 2 c. No n is in both, nor is n - 1 in the first when n is in the second, so that a constant load
settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

WINDOW_S = 15.0
PAUSE_S = 15.0
GROW_SHARE = 0.1
SHRINK_SHARE = 0.5
NEVER_SHARE = 0.01  # Even a batch that is ready takes a moment to come.


class Load(NamedTuple):
    """The load at one moment.

    time_s            the moment, seconds on a monotonic clock
    learner_wait_s    what the learner has waited so far
    actor_waits_s     what each actor has waited so far at admission, by name
    reward_waits_s    what each actor has waited so far for rewards, by name
    num_actors        rollout actors wanted
    is_settled        whether all of them run, and none is on its way in or out
    step              optimizer steps done
    """

    time_s: float
    learner_wait_s: float
    actor_waits_s: Mapping[str, float]
    num_actors: int
    is_settled: bool
    step: int
    reward_waits_s: Mapping[str, float] = {}


@dataclass
class Autoscaler:
    """Applies the rule of this module within `min_actors` and `max_actors`: it is shown a Load at every tick
    of the supervisor.
    """

    min_actors: int
    max_actors: int
    _start: Load | None = field(default=None)
    _changed_s: float = field(default=float("-inf"))

    def judge(self, now: Load) -> tuple[int, str] | None:
        """Returns the new number of actors and the reason, at the end of a window that gives one, or None."""
        start = self._start
        if not now.is_settled or now.step < 1 or now.time_s - self._changed_s < PAUSE_S:
            self._start = None
            return None
        if (
            start is None
            or start.actor_waits_s.keys() != now.actor_waits_s.keys()
            or now.learner_wait_s < start.learner_wait_s
        ):
            self._start = now  # A counter fell, because its process was started again.
            return None
        elapsed_s = now.time_s - start.time_s
        learner_share = (now.learner_wait_s - start.learner_wait_s) / max(elapsed_s, 1e-9)
        if elapsed_s < WINDOW_S or (learner_share <= GROW_SHARE and now.step == start.step):
            return None
        self._start = now
        decision = self._decide(start, now, elapsed_s, learner_share)
        if decision is not None:
            self.changed(now.time_s)
        return decision

    def changed(self, time_s: float) -> None:
        """Notes that the number of actors was changed, by this rule or by anybody, which begins a pause."""
        self._changed_s, self._start = time_s, None

    def _decide(self, start: Load, now: Load, elapsed_s: float, learner: float) -> tuple[int, str] | None:
        """Returns the new number of actors and the reason, or None. `learner` is its share of the window
        spent waiting.
        """
        rewards = _mean_growth(start.reward_waits_s, now.reward_waits_s) / elapsed_s
        actors = _mean_growth(start.actor_waits_s, now.actor_waits_s) / elapsed_s + rewards
        if learner > GROW_SHARE and now.num_actors < self.max_actors and rewards <= SHRINK_SHARE:
            return (
                now.num_actors + 1,
                f"the learner waited {learner:.0%} of the last {elapsed_s:.0f} s for batches",
            )
        if actors > SHRINK_SHARE and learner <= NEVER_SHARE and now.num_actors > self.min_actors:
            waited = (
                f"the actors waited {actors:.0%} of the last {elapsed_s:.0f} s at admission or for rewards"
            )
            reason = f"{waited}, the learner never"
            return now.num_actors - 1, reason
        return None


def _mean_growth(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Returns by how much the seconds of an actor have grown, in the mean over the actors."""
    grown_s = [max(0.0, waited_s - before.get(name, 0.0)) for name, waited_s in after.items()]
    return sum(grown_s) / len(grown_s) if grown_s else 0.0
