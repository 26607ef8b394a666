"""What the supervisor concludes from the gauges of buffer and monitor: rewards that fail, a full disk, a
learner that has no actors, no progress. Deaths are noticed by whoever holds the process: fleet.py,
gang.py, services.py.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from buffer.usable import error_kind, last_texts
from cluster.fleet import Fleet
from cluster.learner import Learner
from cluster.services import Services
from cluster.watchdog import Observation, Watchdog, dump_stacks
from core.calls import Client, Pending
from core.config import Config
from core.errors import RewardError
from core.json_lines import Redactor
from core.text import counted
from core.troubles import QUIET_S

MIN_SCORED_SAMPLES = 64
MAX_TOLD_KINDS = 10
REWARDS_WINDOW_S = 300.0


class Recent:
    """Failed and all samples of the last `REWARDS_WINDOW_S` seconds, and of longer where these were
    fewer than `MIN_SCORED_SAMPLES`.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float, float]] = deque()

    def since_then(self, now_s: float, errors: float, samples: float) -> tuple[float, float]:
        """Takes one look more at the cumulative counts; (errors, samples) of the window. What was before the
        first look does not count.
        """
        self._marks.append((now_s, errors, samples))
        while (
            len(self._marks) > 1
            and now_s - self._marks[1][0] >= REWARDS_WINDOW_S
            and samples - self._marks[1][2] >= MIN_SCORED_SAMPLES
        ):
            self._marks.popleft()
        return errors - self._marks[0][1], samples - self._marks[0][2]


class FailedRewards:
    """Why samples got no reward: each kind of error is told once, and of kinds the first `MAX_TOLD_KINDS`.

    texts   the last error texts that are known, with how often their kinds came, oldest first
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._asked: Pending[tuple[int, int, Mapping[str, int]]] | None = None
        self._num_errors = 0.0
        self._told: set[str] = set()
        self._redact = Redactor(os.environ)
        self.texts: Mapping[str, int] = {}

    @property
    def is_asked(self) -> bool:
        """Returns whether the buffer has still to say why."""
        return self._asked is not None

    def ask(self, num_errors: float) -> None:
        """Asks the buffer for the texts where its count of errors has risen; not waited for."""
        if num_errors > self._num_errors and self._asked is None:
            self._num_errors = num_errors
            self._asked = self._services.calls.start(self._services.buffer.error_summary())

    def poll(self) -> None:
        """Takes the answer if it came. Raises AgroError where none comes in time."""
        if self._asked is not None and self._asked.is_done():
            asked, self._asked = self._asked, None
            self.take(*asked.result())

    def take(self, num_errors: float, _: float, texts: Mapping[str, int]) -> None:
        """Takes what `ReplayBuffer.error_summary` says, and tells what is new in it."""
        self._num_errors = max(self._num_errors, num_errors)
        self.texts = {self._redact(text): count for text, count in texts.items()}
        for text, count in self.texts.items():
            kind = error_kind(text)
            if kind in self._told or len(self._told) > MAX_TOLD_KINDS:
                continue
            self._told.add(kind)
            if len(self._told) > MAX_TOLD_KINDS:
                self._services.event(
                    f"samples got no reward for more than {MAX_TOLD_KINDS} reasons: further ones are not told;"
                    " the summary has the last"
                )
            else:
                self._services.event(f"{counted(count, 'sample')} got no reward: {text}")


class FullDisk:
    """The disk of the run directory, from the buffer's counts: told when it is full, and when it has room
    again.

    sentence   what is wrong with it now, '' when nothing is
    """

    def __init__(self, run_dir: Path, tell: Callable[[str], object], clock: Callable[[], float]) -> None:
        self._run_dir, self._tell, self._clock = run_dir, tell, clock
        self._refused: float | None = None
        self._num_before = self._since_s = self._last_s = 0.0
        self.sentence = ""

    def judge(self, stats: Mapping[str, float]) -> None:
        """Judges one set of gauges more."""
        refused, now_s = stats.get("buffer/disk_errors", 0.0), self._clock()
        before, self._refused = self._refused, refused
        # The first look, or a shard that was killed before it could write its count.
        if before is None or refused < before:
            return
        if refused > before:
            self._last_s = now_s
            if not self.sentence:
                self._since_s, self._num_before = now_s, before
                self.sentence = (
                    f"the disk of {self._run_dir} refuses what the buffer writes ({_room(self._run_dir)})"
                )
                self._tell(
                    f"{self.sentence}: nothing acknowledged is lost, training goes on with what is "
                    "there; free space on it"
                )
        elif self.sentence and now_s - self._last_s > QUIET_S and not stats.get("buffer/changes_unwritten"):
            self.sentence = ""
            lasted_s, count = self._last_s - self._since_s, refused - self._num_before
            self._tell(
                f"the disk of {self._run_dir} takes all again: {count:.0f} writes were refused in "
                f"{lasted_s:.0f} s"
            )


def _room(directory: Path) -> str:
    """`0.1 of 6 MB free`."""
    try:
        usage = shutil.disk_usage(directory)
    except OSError as error:
        return str(error.strerror)
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.0f} MB free"


class Health:
    """Judges one set of gauges after another; tells, or raises AgroError."""

    def __init__(
        self, config: Config, services: Services, run_dir: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._services, self._run_dir, self._clock = config, services, run_dir, clock
        self._watchdog = Watchdog(config.run.timeout_s)
        self._rewards = Recent()
        self._disk = FullDisk(run_dir, services.event, clock)
        self.failures = FailedRewards(services)
        self._failed = ""
        self._waited_s = 0.0
        # The step at which the learner had no actor left; None while it has.
        self._alone_since_step: int | None = None

    def judge(
        self,
        stats: Mapping[str, float],
        view: Mapping[str, Any],
        num_evaluations: int,
        fleet: Fleet,
        learner: Learner,
    ) -> None:
        """Judges `stats` of the buffer and `view` of the monitor. Raises RewardError."""
        self._judge_rewards(stats)
        self._disk.judge(stats)
        if learner.state == "training":
            step = step_of(view)
            self._notice_lonely_learner(stats, step, fleet)
            self._watch_progress(self._observed(stats, view, num_evaluations, fleet), fleet, learner)

    def _judge_rewards(self, stats: Mapping[str, float]) -> None:
        errors, samples = self._rewards.since_then(
            self._clock(), stats["buffer/samples_error"], stats["buffer/samples_total"]
        )
        is_failing = (
            samples >= MIN_SCORED_SAMPLES and errors / samples > self._config.rewards.max_error_fraction
        )
        if not self._failed:
            self.failures.ask(stats["buffer/samples_error"])
        self.failures.poll()
        if is_failing and not self._failed:
            self._failed = f"{errors:.0f} of the last {samples:.0f} samples got no reward"
        if self._failed and not self.failures.is_asked:
            shown = "\n  ".join(last_texts(self.failures.texts))
            raise RewardError(
                f"{self._failed}, more than rewards.max_error_fraction = {self._config.rewards.max_error_fraction}. "
                f"The last errors:\n  {shown}"
            )

    def _notice_lonely_learner(self, stats: Mapping[str, float], step: int, fleet: Fleet) -> None:
        """The learner waits and nobody is there who could feed it: said once, and when it goes on."""
        is_waiting = stats["buffer/wait_batch_s"] > self._waited_s
        self._waited_s = stats["buffer/wait_batch_s"]
        running = fleet.names("running")
        has_actors = (
            bool(set(running) - set(fleet.rollout_names()))
            if self._config.is_offline
            else bool(fleet.rollout_names("running"))
        )
        if self._alone_since_step is None and fleet.num_deaths and not has_actors and is_waiting:
            self._alone_since_step = step
            self._services.event(
                f"all actors are dead; the learner waits at step {step} and goes on by "
                "itself when one is back"
            )
        elif self._alone_since_step is not None and step > self._alone_since_step and has_actors:
            self._alone_since_step = None
            self._services.event(f"the learner goes on: step {step}")

    def _observed(
        self, stats: Mapping[str, float], view: Mapping[str, Any], num_evaluations: int, fleet: Fleet
    ) -> Observation:
        running = set(fleet.names("running", "retiring"))
        coming = [entry for entry in fleet.status() if entry["state"] in ("waiting for placement", "loading")]
        absent = [
            f"{entry['name']} {entry['state']} for {entry['since_s']:.0f} s {entry['note']}".strip()
            for entry in coming
        ]
        return Observation(
            time_s=self._clock(),
            step=step_of(view),
            actors={name: counters for name, counters in view["actors"].items() if name in running},
            absent=absent,
            stats=stats,
            num_evaluations=num_evaluations,
            group_size=self._config.actors.group_size - self._config.offline_samples,
            admitted_groups=self._config.admitted_groups,
            full_disk=self._disk.sentence,
        )

    def _watch_progress(self, seen: Observation, fleet: Fleet, learner: Learner) -> None:
        stall = self._watchdog.judge(seen)
        if stall is not None:
            clients = {**fleet.clients(), **learner.clients()}
            # Some may not answer for seconds: not in the way of the next turn.
            self._services.calls.in_background(partial(self._tell_stall, stall, clients), "stacks")

    def _tell_stall(self, stall: str, clients: Mapping[str, Client]) -> None:
        try:
            path, silent = dump_stacks(self._services.calls, clients, self._run_dir)
        except OSError as error:
            self._services.event(f"{stall}. Its stacks cannot be written: {error}")
            return
        who = f"; no answer from {', '.join(silent)}" if silent else ""
        self._services.event(f"{stall}. Stacks of every process: {path.name}{who}")


def step_of(view: Mapping[str, Any]) -> int:
    """Optimizer steps done, as far as the monitor knows."""
    return int(view["row"].get("progress/step") or 0)
