"""How many actors a run has, changed while it goes on: as another shell asks, or by the rule of
autoscale.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.autoscale import Autoscaler, Load
from cluster.control import Answer, Control, ScaleRequest
from cluster.fleet import Fleet
from core.config import ActorsConfig
from core.text import counted


class Scaling:
    """Carries requests out on the fleet, and decides by itself where `actors.count` is a range."""

    def __init__(
        self,
        actors: ActorsConfig,
        fleet: Fleet,
        control: Control,
        tell: Callable[[str], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actors, self._fleet, self._control = actors, fleet, control
        self._tell, self._clock = tell, clock
        self._autoscaler = None if actors.most is None else Autoscaler(actors.fewest, actors.most)

    def obey(self, state: str) -> None:
        """Takes a request from another shell and answers it; `state` of the run: others than `training`
        refuse.
        """
        request = self._control.take()
        if request is not None:
            self._control.answer(self._answer(request, state))

    def judge(self, stats: Mapping[str, float], view: Mapping[str, Any], step: int) -> None:
        """Scales by the rule, where there is one: after learner step `step`, by the waits of learner and
        actors.
        """
        if self._autoscaler is None:
            return
        rollouts, running = self._fleet.rollout_names(), self._fleet.rollout_names("running")
        known = view["actors"]
        waits_s, rewards_s = (
            {name: known[name].get(wait) or 0.0 for name in running if name in known}
            for wait in ("wait_admission_s", "wait_rewards_s")
        )
        is_settled = len(rollouts) == len(running) == len(waits_s)
        waited_s = stats["buffer/wait_batch_s"]
        load = Load(self._clock(), waited_s, waits_s, self._fleet.target, is_settled, step, rewards_s)
        decision = self._autoscaler.judge(load)
        if decision is not None:
            count, reason = decision
            added, retired = self._scale_to(count)
            self._tell(f"autoscaling to {counted(count, 'actor')}, {_changes(added, retired)}: {reason}")

    def _answer(self, request: ScaleRequest, state: str) -> Answer:
        if refused := self._refusal(request, state):
            return Answer(request.id, request.actors, refused=refused)
        before = self._fleet.target
        added, retired = self._scale_to(request.actors)
        self._tell(
            f"scaled from {before} to {counted(request.actors, 'actor')}, as asked: {_changes(added, retired)}"
        )
        return Answer(request.id, request.actors, tuple(added), tuple(retired))

    def _refusal(self, request: ScaleRequest, state: str) -> str:
        """Why the request cannot be obeyed; '' where it can."""
        low, high = self._actors.fewest, self._actors.most
        if state != "training":
            return f"the run is {state}: ask again when it trains"
        if high is not None and not low <= request.actors <= high:
            return f"actors.count = [{low}, {high}], between which this run scales by itself"
        return "" if request.actors >= 1 else "expected 1 or more"

    def _scale_to(self, count: int) -> tuple[list[str], list[str]]:
        if self._autoscaler is not None:
            self._autoscaler.changed(self._clock())
        return self._fleet.scale_to(count)


def _changes(added: Sequence[str], retired: Sequence[str]) -> str:
    """Says `actor-3 added`, `actor-2, actor-1 retire`, or `no change`."""
    parts = [f"{', '.join(names)} {verb}" for names, verb in ((added, "added"), (retired, "retire")) if names]
    return "; ".join(parts) or "no change"
