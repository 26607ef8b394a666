"""Real rollout actors, with a real buffer and board, and a consumer in place of the learner."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ray

from actors.prompts import PromptSet, load_prompts
from actors.rollout import RolloutActor
from benchmarks.actors.bare import Pause, Spent, timed_pause
from benchmarks.fake_engine import FakeEngine
from buffer.client import connect_buffer
from buffer.server import ReplayBuffer
from cluster.fleet import ActorClient
from cluster.preparation.prepare import ensure_model
from core.calls import Calls, asks, settle
from core.config import Config
from core.monitor_client import MonitorClient
from core.processes import remote, threads
from core.tokenizer import load_tokenizer
from core.weights.board import BOARD, Board, BoardClient
from core.weights.snapshots import SnapshotWriter
from learner.catalogue import load_config

TIMEOUT_S = 300.0
MODELS: dict[str, dict[str, Any]] = {
    "8M": {"hidden": 256, "layers": 10},
    "30M": {"hidden": 512, "layers": 10},
}
ENVIRONMENT = threads(1)


class Prepared(NamedTuple):
    """What a measurement starts from."""

    config: Config
    prompts: PromptSet
    weights: list[tuple[str, Any]]


def prepare(
    directory: Path, *overrides: str, model: str = "", config_path: str = "configs/quickstart.yaml"
) -> Prepared:
    """Returns config, prompts and weights of the quickstart, or of another config; with a `model` of MODELS,
    that of random weights, which ends an answer after a dozen tokens on average.
    """
    from safetensors.torch import load_file

    more = ["buffer.max_staleness=100000", "checkpoint.every=0", "weights.publish_every=1", *overrides]
    if model:
        more += [f"model.path={_make_model(directory, model)}", "model.make=null"]
    config = ensure_model(load_config(config_path, more))
    prompts = load_prompts(config.data, load_tokenizer(config.model))
    return Prepared(config, prompts, list(load_file(Path(config.model.path, "model.safetensors")).items()))


def _make_model(directory: Path, name: str) -> Path:
    from recipes.arithmetic import make_llama, make_tokenizer

    path, tokenizer = directory / name, make_tokenizer()
    if not path.exists():
        make_llama(len(tokenizer), **MODELS[name]).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


class Deaf:
    """Stands for the monitor."""

    def log_actor(self, name: str, counters: dict[str, float]) -> None:
        """Ignores the counters of one actor."""

    def event(self, text: str) -> None:
        """Ignores what happened."""


class MeasuredActor(RolloutActor):
    """A rollout actor that tells what it has spent."""

    def _make_engine(self) -> Any:
        engine: Any = super()._make_engine()
        load = engine.load_weights
        self._pauses: list[Pause] = []

        def timed_load(version: int, weights: Iterable[tuple[str, Any]]) -> None:
            self._pauses.append(timed_pause(lambda: load(version, weights)))

        engine.load_weights = timed_load
        return engine

    def spent(self) -> Spent:
        """Returns what it has generated so far, and the CPU time of its process."""
        counters = self._groups.counters
        made = counters["generated_tokens"], counters["generated_samples"]
        return Spent(*made, time.process_time(), time.perf_counter())

    def pauses(self) -> list[Pause]:
        """Returns the pauses of all updates so far."""
        return list(self._pauses)


class SimulatedActor(RolloutActor):
    """Runs the real loop on an engine that only sleeps: 20 ms a step, 40 tokens a sample."""

    def _make_engine(self) -> Any:
        step_s = 0.02 * (5.0 if self._name.endswith("-slow") else 1.0)
        return FakeEngine(self._config.actors, step_s=step_s, num_tokens=(40, 40))


class MeasuredClient(ActorClient):
    """An actor of a rig."""

    spent = asks(MeasuredActor.spent)
    pauses = asks(MeasuredActor.pauses)


class Rig:
    """Holds buffer, board and actors of one measurement, and a consumer that takes batches as fast as they
    come; actors rest while it takes none and the buffer is full.
    """

    def __init__(self, prepared: Prepared, run_dir: str, names: list[str], kind: type) -> None:
        config, prompts, self._weights = prepared
        self._num_groups = config.learner.groups_per_step
        self.calls = Calls(TIMEOUT_S)
        shard_class = remote(ReplayBuffer).options(num_cpus=0, max_concurrency=1000)
        self._buffer = connect_buffer([shard_class.remote(config, run_dir, len(prompts), 0)])
        board_class = remote(Board).options(num_cpus=0, max_concurrency=1000)
        self._board = BoardClient(board_class.remote(config.run, {}, _ignore), BOARD)
        monitor = MonitorClient(remote(Deaf).options(num_cpus=0).remote(), "nobody")
        self._version, self._step = -1, 0
        self.publish()
        actor_class = remote(kind).options(num_cpus=0, max_concurrency=2, runtime_env=ENVIRONMENT)
        peers = self._buffer, self._board, monitor
        self.actors = [
            MeasuredClient(actor_class.remote(name, config, prompts, {}, *peers), name) for name in names
        ]
        settle([self.calls.start(actor.ping()) for actor in self.actors], TIMEOUT_S)
        self._names, self._monitor = names, monitor
        self._runs = [self.calls.start(actor.run(), math.inf) for actor in self.actors]

    def publish(self) -> None:
        """Publishes the same weights as a new version."""
        self._version += 1
        writer = SnapshotWriter(64 << 20, store=ray.put)
        for name, tensor in self._weights:
            writer.add(name, tensor)
        manifest, references = writer.finish(self._version)
        payload = msgspec.msgpack.encode(manifest)
        self.calls.ask(self._board.publish(payload, references, self._version, evaluate=()))

    def consume(self, seconds: float, step_s: float = 0.0) -> int:
        """Takes batches for `seconds`, each followed by a learner's step of `step_s`; returns how many."""
        deadline_s, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < deadline_s:
            if self.calls.ask(self._buffer.sample(self._step, self._num_groups, 1.0)) is not None:
                self._step, count = self._step + 1, count + 1
                time.sleep(step_s)
        return count

    def rest(self) -> None:
        """Waits until the buffer is full and the actors have nothing to do."""
        known = -1.0
        while (inserted := self._inserted()) != known:
            known = inserted
            time.sleep(1.0)

    def spend(self, seconds: float) -> Spent:
        """Returns what the actors make and spend while batches are taken for so long."""
        before = [self.calls.ask(actor.spent()) for actor in self.actors]
        self.consume(seconds)
        spent = [
            self.calls.ask(actor.spent()).since(one) for actor, one in zip(self.actors, before, strict=True)
        ]
        return Spent(*map(sum, zip(*spent, strict=True)))._replace(wall_s=spent[0].wall_s)

    def pause(self) -> Pause:
        """Returns the one actor's pause for an update that it meets while it generates."""
        known = len(self.calls.ask(self.actors[0].pauses()))
        self.publish()
        while len(pauses := self.calls.ask(self.actors[0].pauses())) == known:
            self.consume(0.2)
        return pauses[-1]

    def groups_per_s(self, seconds: float) -> float:
        """Returns the groups inserted per second while batches are taken."""
        before, start_s = self._inserted(), time.perf_counter()
        self.consume(seconds)
        return (self._inserted() - before) / (time.perf_counter() - start_s)

    def close(self) -> None:
        """Ends the actors and everything else."""
        self.calls.ask(self._board.retire(self._names, "now"))
        settle(self._runs, 60)
        for client in (*self.actors, *self._buffer.shards, self._board, self._monitor):
            ray.kill(client.handle)

    def _inserted(self) -> float:
        return self.calls.ask(self._buffer.stats())["buffer/inserted"]


def _ignore(evaluation: Any, samples: Any) -> None:
    """Ignores an evaluation: none is asked for."""
