"""The watchdog notices that no optimizer step comes: which stage stalls, and what everybody is doing.

    learner in its step <-- batches <-- buffer <-- groups <-- rewards <-- generation <-- admission, weights
                                                     the first of these that explains the wait is named

It judges by the counters of actors and buffer; the stacks of every process go into a file.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.heartbeat import Heartbeat
from core.calls import Calls, Client, Pending, settle

MIN_QUIET_S = 60.0
STEPS_QUIET = 10.0
RECENT_S = 10.0
STACKS_TIMEOUT_S = 5.0
_NUM_STEP_TIMES = 31
_MOST = 0.5  # Share of the time from which a wait counts as what somebody does.


@dataclass(frozen=True)
class Observation:
    """What is known at one moment.

    actors       counters of the running ones, by name (Monitor.view); `absent` are sentences on the others
    stats        of the buffer (ReplayBuffer.stats)
    full_disk    which disk refuses writes, '' where none does
    """

    time_s: float
    step: int
    actors: Mapping[str, Mapping[str, Any]]
    absent: Sequence[str]
    stats: Mapping[str, float]
    num_evaluations: int = 0
    group_size: int = 1  # Samples that an actor generates for a group.
    admitted_groups: int = 0
    full_disk: str = ""


@dataclass
class Watchdog:
    """Notices that no step has come for `max(60 s, 10 x the median step time)`, at most half of
    `timeout_s`; once a stall.
    """

    timeout_s: float
    _recent: deque[Observation] = field(default_factory=deque)
    _step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_STEP_TIMES))
    _step: int = -1
    _stepped_s: float = 0.0
    _is_told: bool = False

    @property
    def quiet_s(self) -> float:
        """The time without a step that is a stall."""
        median_s = statistics.median(self._step_times_s) if self._step_times_s else 0.0
        return min(max(MIN_QUIET_S, STEPS_QUIET * median_s), self.timeout_s / 2)

    def judge(self, seen: Observation) -> str | None:
        """Judges one observation more; names the stalled stage when a stall has just become one."""
        if seen.step != self._step:
            if self._step >= 0:
                self._step_times_s.append((seen.time_s - self._stepped_s) / max(1, seen.step - self._step))
            self._step, self._stepped_s, self._is_told = seen.step, seen.time_s, False
            self._recent.clear()
        self._recent.append(seen)
        while len(self._recent) > 2 and seen.time_s - self._recent[1].time_s >= RECENT_S:
            self._recent.popleft()
        silent_s = seen.time_s - self._stepped_s
        if self._is_told or silent_s < self.quiet_s:
            return None
        self._is_told = True
        return f"no optimizer step for {silent_s:.0f} s after step {seen.step}: {stalled_stage(self._recent[0], seen)}"


def stalled_stage(before: Observation, now: Observation) -> str:
    """Which stage the learner waits for, from what changed between two observations some seconds apart."""
    elapsed_s = max(1e-9, now.time_s - before.time_s)
    if _change(before.stats, now.stats, "buffer/wait_batch_s") < _MOST * elapsed_s:
        return "the learner is in its step (it does not wait for a batch)"
    if now.full_disk:
        return now.full_disk
    if not now.actors:
        return "no actor is running" + "".join(f"; {sentence}" for sentence in now.absent)
    changes = [(before.actors.get(name, {}), counters) for name, counters in now.actors.items()]

    def share(name: str) -> float:
        return sum(_change(old, new, name) for old, new in changes) / (elapsed_s * len(changes))

    if share("wait_weights_s") >= _MOST:
        return f"the actors wait for weights (versions {_versions(now)})"
    if share("wait_environment_s") >= _MOST:
        return "the actors wait for their environments, all episodes at once (see environment/answer_s)"
    if share("wait_disk_s") >= _MOST:
        return "the buffer takes nothing: its disk is full (see the events)"
    if now.num_evaluations and not share("generated_samples"):
        return f"evaluation: {now.num_evaluations} of them open, the actors generate nothing else"
    pending = sum(_pending_groups(counters, now.group_size) for counters in now.actors.values())
    if share("busy_s") < _MOST and pending >= 1:
        return f"rewards are pending: {pending:.0f} groups are generated and not scored"
    held = now.stats.get("buffer/leased", 0.0) + now.stats.get("buffer/unconsumed", 0.0)
    if share("busy_s") < _MOST and held >= now.admitted_groups:
        return f"admission is closed: {held:.0f} of {now.admitted_groups} groups are out or stored, and no batch can be made of them"
    if share("busy_s") >= _MOST and not share("groups"):
        return f"the actors generate, but no group is finished ({now.stats.get('buffer/leased', 0.0):.0f} leased)"
    return (
        f"groups come, but slowly: {share('groups') * len(changes):.2f} a second from {len(changes)} actors"
    )


def _change(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> float:
    """Growth of a counter; one that fell belongs to a process that was started again."""
    old, new = before.get(name) or 0.0, now.get(name) or 0.0
    return new - old if new >= old else new


def _pending_groups(counters: Mapping[str, Any], group_size: int) -> float:
    ended = (counters.get("groups") or 0.0) + (counters.get("groups_failed") or 0.0)
    return (counters.get("generated_samples") or 0.0) / group_size - ended


def _versions(now: Observation) -> str:
    return ", ".join(sorted({f"{counters.get('version', -1):.0f}" for counters in now.actors.values()}))


# --- Stacks ---


def dump_stacks(calls: Calls, clients: Mapping[str, Client], run_dir: Path) -> tuple[Path, list[str]]:
    """Writes everybody's stacks to `run_dir/stacks-<time>.txt`; returns that path, and the names of those who
    did not answer within 5 s.
    """
    asked = {
        name: calls.start(client.inside(Heartbeat.stacks), STACKS_TIMEOUT_S)
        for name, client in clients.items()
    }
    settle(asked.values(), STACKS_TIMEOUT_S)
    silent = [name for name, stacks in asked.items() if not stacks.future.done()]
    texts = {name: "no answer\n" if name in silent else _text_of(stacks) for name, stacks in asked.items()}
    for name in silent:
        asked[name].give_up()
    path = run_dir / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    path.write_text("\n".join(f"===== {name}\n{text}" for name, text in texts.items()), encoding="utf-8")
    return path, silent


def _text_of(stacks: Pending[str]) -> str:
    error = stacks.error()
    return stacks.result() if error is None else f"none: {error}\n"
