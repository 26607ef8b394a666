"""An actor, a learner rank and a buffer of a run, which are let run and held by `make bench-bound`."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from actors.rollout import RolloutActor
from benchmarks.actors.rig import Deaf
from buffer.client import ShardClient
from buffer.server import ReplayBuffer
from cluster.fleet import ActorClient
from cluster.gang import RankClient
from core.calls import asks
from learner.worker import LearnerRank

LOOK_S = 0.01


class Moments:
    """Moments by `time.perf_counter`, which all processes of a machine share; others wait for them."""

    def __init__(self) -> None:
        self._moments_s: list[float] = []
        self._changed = threading.Condition()

    def add(self, count: int = 1) -> None:
        """Notes that it happened so many times, now."""
        with self._changed:
            self._moments_s += [time.perf_counter()] * count
            self._changed.notify_all()

    def until(self, count: int) -> int:
        """Returns how often it has happened once it is so often, or after a second."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._moments_s) >= count, 1.0)
            return len(self._moments_s)

    def since(self, count: int) -> list[float]:
        """Returns the moments after the first `count`."""
        return self._moments_s[count:]


class HeldActor(RolloutActor):
    """A rollout actor that generates while it is let."""

    def __init__(self, *arguments: Any) -> None:
        self._may_run, self._made = threading.Event(), Moments()
        super().__init__(*arguments)

    def let(self, runs: bool) -> None:
        """Lets it generate, or holds it."""
        self._may_run.set() if runs else self._may_run.clear()

    def until(self, count: int) -> int:
        """Returns how many groups it has sent, as soon as it is so many, or after a second."""
        return self._made.until(count)

    def since(self, count: int) -> list[float]:
        """Returns when it sent the groups after the first `count`."""
        return self._made.since(count)

    def waited_s(self) -> float:
        """Returns how long it had nothing to generate so far."""
        return sum(seconds for name, seconds in self._counters.items() if name.startswith("wait_"))

    def _generate(self) -> None:
        if self._may_run.wait(LOOK_S):
            super()._generate()

    def _deliver(self) -> None:
        before = self._counters["groups"]
        super()._deliver()
        if sent := int(self._counters["groups"] - before):
            self._made.add(sent)


class HeldRank(LearnerRank):
    """A learner rank that takes as many steps as it is let."""

    def __init__(self, *arguments: Any) -> None:
        self._may_step, self._ended, self._waited_s = threading.Semaphore(0), Moments(), 0.0
        super().__init__(*arguments)

    def let(self, steps: int) -> None:
        """Lets it take so many steps more."""
        self._may_step.release(steps)

    def until(self, count: int) -> int:
        """Returns how many steps it has taken, as soon as it is so many, or after a second."""
        return self._ended.until(count)

    def since(self, count: int) -> list[float]:
        """Returns when the steps after the first `count` ended."""
        return self._ended.since(count)

    def waited_s(self) -> float:
        """Returns how long it has waited for the batches of its steps so far."""
        return self._waited_s

    def _update(self, *arguments: Any) -> Any:
        self._may_step.acquire()
        self._waited_s += arguments[0].wait_s
        return super()._update(*arguments)

    def _report(self, *arguments: Any) -> None:
        super()._report(*arguments)
        self._ended.add()


class HeldBuffer(ReplayBuffer):
    """A shard that admits what it is told."""

    async def admit(self, groups: int) -> None:
        """Lets so many groups exist untrained from now on."""
        self._shard.admission.allowed = groups
        self._notice()


class Listening(Deaf):
    """Stands for the monitor, also to the learner."""

    def log_step(self, row: Mapping[str, float]) -> None:
        """Ignores a step's metrics."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Ignores samples to show."""

    def generation(self) -> dict[str, Any]:
        """Knows of nobody."""
        return {}


class HeldActorClient(ActorClient):
    """The actor of a measurement."""

    let = asks(HeldActor.let)
    until = asks(HeldActor.until)
    since = asks(HeldActor.since)
    waited_s = asks(HeldActor.waited_s)


class HeldRankClient(RankClient):
    """The rank of a measurement."""

    let = asks(HeldRank.let)
    until = asks(HeldRank.until)
    since = asks(HeldRank.since)
    waited_s = asks(HeldRank.waited_s)


class HeldBufferClient(ShardClient):
    """The shard of a measurement."""

    admit = asks(HeldBuffer.admit)
