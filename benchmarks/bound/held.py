"""An actor, a learner rank and a buffer of a run, which are let run and held by `make bench-bound`."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.rollout import RolloutActor
from benchmarks.actors.rig import TIMEOUT_S, Deaf, Prepared
from buffer.client import ShardClient, connect_buffer
from buffer.server import ReplayBuffer
from cluster.fleet import ActorClient
from cluster.gang import RankClient
from core.calls import Call, Calls, Client, asks
from core.monitor_client import MonitorClient
from core.processes import remote, threads, whereabouts
from core.weights.board import BOARD, Board, BoardClient
from learner.worker import LearnerRank

T = TypeVar("T")

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

    def version(self) -> int:
        """Returns the version of its weights."""
        return self._engine.version

    def waited_s(self) -> float:
        """Returns how long it had nothing to generate so far."""
        return sum(seconds for name, seconds in self._counters.items() if name.startswith("wait_"))

    def _generate(self) -> None:
        if self._may_run.wait(LOOK_S):
            super()._generate()
        else:
            self._insert()  # What waits for more to go along with would count in the next phase.

    def _insert(self) -> None:
        before = self._counters["groups"]
        super()._insert()
        if sent := int(self._counters["groups"] - before):
            self._made.add(sent)


class HeldRank(LearnerRank):
    """A learner rank that takes as many steps as it is let."""

    def __init__(self, *arguments: Any) -> None:
        self._may_step, self._ended, self._waited_s = threading.Semaphore(0), Moments(), 0.0
        self._rewards: list[float] = []
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

    def rewards(self) -> list[float]:
        """Returns the mean reward of each batch so far."""
        return self._rewards

    def waited_s(self) -> float:
        """Returns how long it has waited for the batches of its steps so far."""
        return self._waited_s

    def _update(self, *arguments: Any) -> Any:
        self._may_step.acquire()
        self._waited_s += arguments[0].wait_s
        return super()._update(*arguments)

    def _report(self, taken: Any, result: Any, row: Mapping[str, float], progress: Any) -> None:
        super()._report(taken, result, row, progress)
        self._rewards.append(row["reward/mean"])
        self._ended.add()


class HeldBuffer(ReplayBuffer):
    """A shard that admits what it is told, and counts what it is asked."""

    def __init__(self, *arguments: Any) -> None:
        self._calls: Counter[str] = Counter()
        super().__init__(*arguments)

    async def lease(self, *arguments: Any) -> list[bytes] | None:
        """Counts and leases."""
        self._calls["leases"] += 1
        return await super().lease(*arguments)

    async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
        """Counts and inserts."""
        self._calls["insertions"] += 1
        return await super().insert(actor, payloads)

    async def calls(self) -> dict[str, int]:
        """Returns how often it was asked for leases and insertions so far."""
        return dict(self._calls)

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
    version = asks(HeldActor.version)
    waited_s = asks(HeldActor.waited_s)


class HeldRankClient(RankClient):
    """The rank of a measurement."""

    let = asks(HeldRank.let)
    until = asks(HeldRank.until)
    since = asks(HeldRank.since)
    rewards = asks(HeldRank.rewards)
    waited_s = asks(HeldRank.waited_s)


class HeldBufferClient(ShardClient):
    """The shard of a measurement."""

    admit = asks(HeldBuffer.admit)
    calls = asks(HeldBuffer.calls)


class HeldRun:
    """The processes of a run of one actor and one rank: `let` says what happens, `until` waits for it."""

    def __init__(self, prepared: Prepared, run_dir: Path) -> None:
        config, prompts, _ = prepared
        self._calls = Calls(TIMEOUT_S)
        served = {"num_cpus": 0, "max_concurrency": 1000}
        shard = remote(HeldBuffer).options(**served).remote(config, str(run_dir), len(prompts), 0)
        self.shard = HeldBufferClient(shard, "the buffer")
        board = BoardClient(remote(Board).options(**served).remote(config.run, {}, _ignore), BOARD)
        monitor = MonitorClient(remote(Listening).options(num_cpus=0).remote(), "nobody")
        peers = connect_buffer([shard]), board, monitor
        held = {"num_cpus": 0, "max_concurrency": 4}
        rank_class = remote(HeldRank).options(
            runtime_env=threads(1), num_gpus=config.learner.num_gpus, **held
        )
        actor_class = remote(HeldActor).options(
            runtime_env=threads(1), num_gpus=config.actors.num_gpus, **held
        )
        self.rank = HeldRankClient(rank_class.remote(0, config, 0), "the rank")
        self.actor = HeldActorClient(actor_class.remote("actor-0", config, prompts, {}, *peers), "the actor")
        self.ask(self.rank.start(self.ask(self.rank.address())))
        self.ask(self.actor.ping())
        trained = self.rank.train(*peers, str(run_dir / "policy"))
        self._runs = [self._calls.start(call, math.inf) for call in (trained, self.actor.run())]
        self._clients: dict[str, Client] = {
            "actor": self.actor,
            "rank": self.rank,
            "shard": self.shard,
            "board": board,
            "monitor": monitor,
        }

    def pids(self) -> dict[str, int]:
        """Returns the process ids by name."""
        return {name: self.ask(client.inside(whereabouts)).pid for name, client in self._clients.items()}

    def ask(self, call: Call[T]) -> T:
        """Waits for an answer."""
        return self._calls.ask(call)

    def until(self, until: Callable[[int], Call[int]], count: int) -> int:
        """Waits for something to have happened so often, and returns how often it has. Raises what a process
        died of.
        """
        while (now := self.ask(until(count))) < count:
            for run in self._runs:
                if run.is_done():
                    run.result()
        return now

    def close(self) -> None:
        """Ends all processes."""
        for run in self._runs:
            run.give_up()
        for client in self._clients.values():
            ray.kill(client.handle)


def _ignore(evaluation: Any, samples: Any) -> None:
    """Ignores an evaluation: none is asked for."""
