"""Measures what the rollout actors cost and how they scale: `make bench-actors`. Real Ray, buffer and board;
ratios within one run.

tokens     one actor's tokens/s against bare vLLM `generate`: same model, prompts, engine arguments, in turns
large      the same with SmolLM2-135M on grade-school maths, where an engine's step takes longer than all else
together   two actors at once against two bare engines at once
pause      an actor's pause per weight update against a bare in-memory load of the same tensors
scaling    1, 2, 4, 8, 16 actors with a simulated engine: groups per second against linear
straggler  learner steps per second with one of four (simulated) actors five times slower, against none slower
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import ray

from actors.engine import Engine
from actors.engine_settings import engine_arguments, set_engine_environment
from actors.prompts import PromptSet, load_prompts
from actors.rollout import RolloutActor
from benchmarks.fake_engine import FakeEngine
from benchmarks.results import save
from buffer.client import connect_buffer
from buffer.server import ReplayBuffer
from cluster.fleet import ActorClient
from cluster.preparation.prepare import ensure_model
from core.calls import Calls, Client, asks, settle
from core.config import Config
from core.monitor_client import MonitorClient
from core.tokenizer import load_tokenizer
from core.weights.board import BOARD, Board, BoardClient
from core.weights.snapshots import SnapshotWriter
from learner.catalogue import load_config

ROUNDS = 3
WINDOW_S = 15.0
WARM_S = 5.0


Prepared: TypeAlias = tuple[Config, PromptSet, list[tuple[str, Any]]]


def _remote(part: Any) -> Any:
    """Returns the class or function as a Ray actor class or task; untyped, as its handles are."""
    return ray.remote(part)


class Tally:
    """Stands for the monitor, and keeps the newest counters of each actor."""

    def __init__(self) -> None:
        self._counters: dict[str, dict[str, float]] = {}

    def log_actor(self, name: str, counters: dict[str, float]) -> None:
        """Takes the counters of one actor."""
        self._counters[name] = counters

    def event(self, text: str) -> None:
        """Ignores what happened."""

    def total(self, counter: str) -> float:
        """Returns the sum of a counter over all actors."""
        return sum(counters.get(counter, 0.0) for counters in self._counters.values())

    def counters(self) -> dict[str, dict[str, float]]:
        """Returns the counters by actor."""
        return self._counters


class TallyClient(Client):
    """The tally, as the driver asks it."""

    total = asks(Tally.total)
    counters = asks(Tally.counters)


class SimulatedActor(RolloutActor):
    """Runs the real loop on an engine that only sleeps: `SIMULATED_STEP_S` a step, 40 tokens a sample."""

    def _make_engine(self) -> Any:
        step_s = 0.02 * (5.0 if self._name.endswith("-slow") else 1.0)
        return FakeEngine(self._config.actors, step_s=step_s, num_tokens=(40, 40))


class BareEngine:
    """Runs vLLM by itself: `LLM.generate` on the prompts, as many samples of each as an actor draws."""

    def __init__(self, config: Config, prompts: PromptSet) -> None:
        if config.actors.num_cpus < 1:
            os.nice(4)
        set_engine_environment(config.actors)
        from vllm import LLM

        arguments = engine_arguments(
            config.model, config.actors, max_model_len=config.max_sequence_tokens, seed=0
        )
        self._llm = LLM(**arguments)
        self._config, self._prompts = config, prompts

    def tokens_per_s(self, seconds: float) -> float:
        """Returns tokens per second over about `seconds` of back-to-back batches, each of four rounds of all
        slots.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        actors = self._config.actors
        num_prompts = max(1, 4 * actors.slots // actors.group_size)
        tokens, row, start_s = 0, 0, time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            rows = [self._prompts[(row + number) % len(self._prompts)] for number in range(num_prompts)]
            row += num_prompts
            inputs = [
                TokensPrompt(prompt_token_ids=list(entry.token_ids))
                for entry in rows
                for _ in range(actors.group_size)
            ]
            params = [
                SamplingParams(
                    temperature=actors.temperature, max_tokens=actors.max_new_tokens, seed=number, logprobs=0
                )
                for number in range(len(inputs))
            ]
            outputs = self._llm.generate(inputs, params, use_tqdm=False)
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        return tokens / (time.perf_counter() - start_s)


class Rig:
    """Holds the buffer, board, tally and actors of one measurement, and a consumer that takes batches as fast
    as they come.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptSet,
        run_dir: str,
        weights: list[tuple[str, Any]],
        names: list[str],
        kind: type,
    ) -> None:
        self.config = config
        self.calls = Calls(600.0)
        shard_class = _remote(ReplayBuffer).options(num_cpus=0, max_concurrency=1000)
        self.buffer = connect_buffer([shard_class.remote(config, run_dir, len(prompts), 0)])
        board_class = _remote(Board).options(num_cpus=0, max_concurrency=1000)
        self.board = BoardClient(board_class.remote(config.run, 0, _ignore), BOARD)
        self.tally = TallyClient(_remote(Tally).options(num_cpus=0).remote(), "the tally")
        monitor = MonitorClient(self.tally.handle, "the tally")
        self._weights, self.version, self.step = weights, -1, 0
        self.publish()
        environment = {
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "TOKENIZERS_PARALLELISM": "false",
            }
        }
        actor_class = _remote(kind).options(num_cpus=0, max_concurrency=2, runtime_env=environment)
        peers = self.buffer, self.board, monitor
        self.actors = [
            ActorClient(actor_class.remote(name, config, prompts, prompts, *peers), name) for name in names
        ]
        for loaded in [self.calls.start(actor.ping(), 300) for actor in self.actors]:
            loaded.wait()
        self._names = names
        self._runs = [self.calls.start(actor.run(), math.inf) for actor in self.actors]

    def publish(self) -> None:
        """Publishes the same weights as a new version."""
        self.version += 1
        writer = SnapshotWriter(64 << 20, store=ray.put)
        for name, tensor in self._weights:
            writer.add(name, tensor)
        manifest, references = writer.finish(self.version)
        payload = msgspec.msgpack.encode(manifest)
        self.calls.ask(self.board.publish(payload, references, self.version, evaluate=()))

    def consume(self, seconds: float, step_s: float = 0.0) -> int:
        """Takes batches for `seconds`, each followed by a learner's step of `step_s`; returns how many."""
        deadline_s, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < deadline_s:
            batch = self.buffer.sample(self.step, self.config.learner.groups_per_step, 1.0)
            payload = self.calls.ask(batch)
            if payload is not None:
                self.step, count = self.step + 1, count + 1
                time.sleep(step_s)
        return count

    def rate(self, counter: str, seconds: float) -> float:
        """Returns the growth of a counter per second while batches are taken."""
        before, start_s = self.calls.ask(self.tally.total(counter)), time.perf_counter()
        self.consume(seconds)
        return (self.calls.ask(self.tally.total(counter)) - before) / (time.perf_counter() - start_s)

    def groups_per_s(self, seconds: float) -> float:
        """Returns the groups inserted per second while batches are taken."""
        before, start_s = self._stats()["buffer/inserted"], time.perf_counter()
        self.consume(seconds)
        return (self._stats()["buffer/inserted"] - before) / (time.perf_counter() - start_s)

    def close(self) -> None:
        """Ends the actors and everything else."""
        self.calls.ask(self.board.retire(self._names, "now"), 60)
        settle(self._runs, 60)
        for client in (*self.actors, *self.buffer.shards, self.board, self.tally):
            ray.kill(client.handle)

    def _stats(self) -> dict[str, float]:
        return self.calls.ask(self.buffer.stats())


def _ignore(evaluation: Any, samples: Any) -> None:
    """Ignores an evaluation: none is asked for."""


def prepare(*overrides: str, config_path: str = "configs/quickstart.yaml") -> Prepared:
    """Returns config, prompts and weights, with a buffer that never holds an actor back."""
    from transformers import AutoModelForCausalLM

    more = [
        "buffer.capacity=100000",
        "buffer.max_staleness=100000",
        "checkpoint.every=0",
        "weights.publish_every=1",
        *overrides,
    ]
    config = ensure_model(load_config(config_path, more))
    prompts = load_prompts(config.data, load_tokenizer(config.model))
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    return config, prompts, [(name, parameter.data) for name, parameter in model.named_parameters()]


def small() -> Prepared:
    """Prepares steps of a millisecond, so that what an actor does besides shows."""
    return prepare("actors.max_new_tokens=32", "data.max_prompt_tokens=8", "actors.num_cpus=1")


def large() -> Prepared:
    """Prepares a real model."""
    return prepare("actors.max_new_tokens=64", "actors.slots=16", config_path="configs/smollm2_sums.yaml")


def against_bare(
    run_dir: Path, num_engines: int, prepared: Prepared, window_s: float = WINDOW_S
) -> dict[str, float]:
    """Returns the tokens per second of so many actors and of so many bare engines, in turns, and the ratio of
    the medians.
    """
    config, prompts, weights = prepared
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}
    bare_class = _remote(BareEngine).options(num_cpus=0, runtime_env=environment)
    ours, bare = [], []
    for number in range(ROUNDS):
        engines = [bare_class.remote(config, prompts) for _ in range(num_engines)]
        ray.get([engine.tokens_per_s.remote(WARM_S) for engine in engines], timeout=300)
        bare.append(sum(ray.get([engine.tokens_per_s.remote(window_s) for engine in engines], timeout=300)))
        for engine in engines:
            ray.kill(engine)
        names = [f"actor-{index}" for index in range(num_engines)]
        rig = Rig(
            config, prompts, str(run_dir / f"bare-{num_engines}-{number}"), weights, names, RolloutActor
        )
        rig.consume(WARM_S)
        ours.append(rig.rate("generated_tokens", window_s))
        rig.close()
    ratio = statistics.median(ours) / statistics.median(bare)
    return {
        "actor_tokens_per_s": statistics.median(ours),
        "bare_tokens_per_s": statistics.median(bare),
        "ratio": ratio,
    }


def pause(run_dir: Path) -> dict[str, float]:
    """Returns the seconds an actor does not generate at an update, and those of a bare load of the same
    tensors by that engine.
    """
    config, prompts, weights = prepare()
    rig = Rig(config, prompts, str(run_dir / "pause"), weights, ["actor-0"], _LoadingActor)
    rig.consume(WARM_S)
    pauses = []
    for _ in range(12):
        rig.publish()
        rig.consume(1.5)
        pauses.append(rig.calls.ask(rig.tally.counters())["actor-0"]["apply_s"])
    rig.close()
    bare = ray.get(
        _remote(_bare_loads)
        .options(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
        .remote(config, weights)
    )
    return {
        "pause_s": statistics.median(pauses),
        "bare_load_s": bare,
        "ratio": statistics.median(pauses) / bare,
    }


class _LoadingActor(RolloutActor):
    """Is the plain loading actor under a name of its own in the process list."""


def _bare_loads(config: Config, weights: list[tuple[str, Any]]) -> float:
    engine = Engine(config.model, config.actors, max_model_len=config.max_sequence_tokens)
    seconds = []
    for version in range(12):
        start_s = time.perf_counter()
        engine.load_weights(version, weights)
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def scaling(run_dir: Path) -> list[dict[str, float]]:
    """Returns groups/s of simulated actors by their number, and the share of linear growth from one."""
    config, prompts, weights = prepare("actors.slots=32")
    rows: list[dict[str, float]] = []
    for count in (1, 2, 4, 8, 16):
        rig = Rig(
            config,
            prompts,
            str(run_dir / f"scaling-{count}"),
            weights,
            [f"actor-{index}" for index in range(count)],
            SimulatedActor,
        )
        rig.consume(WARM_S)
        rate = rig.groups_per_s(WINDOW_S)
        rig.close()
        rows.append(
            {
                "actors": count,
                "groups_per_s": rate,
                "share_of_linear": rate / count / rows[0]["groups_per_s"] if rows else 1.0,
            }
        )
    return rows


def straggler(run_dir: Path) -> dict[str, float]:
    """Returns steps per second of a learner that needs half of what four simulated actors make, without and
    with a slow one.
    """
    config, prompts, weights = prepare("actors.slots=32", "learner.groups_per_step=8")
    rates = []
    for slow in (False, True):
        names = ["actor-0", "actor-1", "actor-2", "actor-3-slow" if slow else "actor-3"]
        rig = Rig(config, prompts, str(run_dir / f"straggler-{slow}"), weights, names, SimulatedActor)
        rig.consume(WARM_S)
        start_s = time.perf_counter()
        rates.append(rig.consume(WINDOW_S, step_s=0.8) / (time.perf_counter() - start_s))
        rig.close()
    return {"steps_per_s": rates[0], "with_a_slow_actor": rates[1], "kept": rates[1] / rates[0]}


def main() -> None:
    """Measures the rows asked for (all by default), prints them and writes them to benchmarks/results/; other
    rows stay.
    """
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = ("tokens", "large", "together", "pause", "scaling", "straggler")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(rows))
    asked = parser.parse_args().rows or rows
    if unknown := set(asked) - set(rows):
        parser.error(f"unknown rows {sorted(unknown)}; expected some of {', '.join(rows)}")
    ray.init(address="local", num_cpus=64, include_dashboard=False, log_to_driver=False)
    measures = {
        "tokens": lambda directory: against_bare(directory, 1, small()),
        "large": lambda directory: against_bare(directory, 1, large(), 4 * WINDOW_S),
        "together": lambda directory: against_bare(directory, 2, small()),
        "pause": pause,
        "scaling": scaling,
        "straggler": straggler,
    }
    with tempfile.TemporaryDirectory() as directory:
        result: dict[str, Any] = {}
        for row in asked:
            result[row] = measures[row](Path(directory))
            print(row, result[row], flush=True)
            save("actors", result, keep=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
