"""What tests/actors/test_engine.py looks at: one engine, taken through updates, in a process of its own
(tests/support/scenarios/reported.py).

vLLM cannot be relied on to build two engines in one process, and an engine takes ten seconds to start: hence
one run per model, with the sabotaged updates, which the tests must be able to tell from the sound ones, at
its end.
"""

from __future__ import annotations

import collections
import importlib
import operator
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

import actors.engine_worker
from actors.engine import Engine, PromptRefused
from actors.engine_settings import VLLM_SYMBOLS
from actors.episode import Generation
from actors.groups import Groups, OpenGroup
from actors.prompts import PromptRow
from actors.rollout import RolloutActor
from core.config import ActorsConfig, ModelConfig
from core.errors import SnapshotError
from core.records import WorkItem
from core.weights.snapshots import SnapshotWriter, read_snapshot
from tests.support.configs import make_config
from tests.support.in_process import Bench
from tests.support.said import Said

MAX_NEW_TOKENS = 16
SLOTS = 8
SHORT = (4, 13, 5, 14)
LONG = tuple(3 + i * i % 12 for i in range(70))  # Two whole blocks of the prefix cache and a bit.
TOP_P = 0.8
MANY_TOKENS = 280
"""Of a prompt, so that those for all slots are more than the 2,048 tokens that vLLM takes in one pass."""
ON_UPDATE = {"continue": 11, "drain": 12, "abort": 13}
"""The ways to update, and the version that each of them loads in its phase."""
SEED = 1000
STOP_TEXTS = ("7", "8", "12")
"""Of one phase: a digit that is a special token of one of the models, and texts of several tokens."""
NUM_LOADS = 7
QUEUED = (14, 15, 16, 17)
"""Versions that follow one another while vLLM has a queue of passes; the last does not wait for it."""


class Generated(msgspec.Struct):
    """One request and its sample. `version` is the engine's when it was submitted."""

    prompt_ids: tuple[int, ...]
    temperature: float
    version: int
    sample: Said
    seed: int | None = None


class Report(msgspec.Struct):
    """Samples by phase of the scenario, and what else it saw. With symbols missing there is nothing but
    their names.
    """

    missing_symbols: list[str]
    phases: dict[str, list[Generated]] = {}
    num_unfinished_after_abort: int = 0
    num_started_after_truncation: int = 0
    num_unfinished_after_truncation: int = 0
    num_overdue_after_truncation: int = 0
    num_restarted: dict[str, float] = {}
    refused: list[tuple[str, str]] = []
    pauses_s: list[float] = []
    loads_s: list[float] = []
    incomplete_error: str = ""
    num_under_way: list[int] = []


def weights(model_dir: Path, version: int) -> dict[str, torch.Tensor]:
    """The weights called `version`: 0 those in `model_dir`, others as far from them as from each other."""
    generator = torch.Generator().manual_seed(version)
    state = load_file(model_dir / "model.safetensors")
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) if version else tensor
        for name, tensor in state.items()
    }


class Scenario:
    """Submits to one engine and keeps what comes back, by phase."""

    def __init__(self, model_dir: Path, tensor_parallel: int = 1) -> None:
        self.config = ActorsConfig(
            slots=SLOTS,
            max_new_tokens=MAX_NEW_TOKENS,
            engine_memory=1 / 64,
            tensor_parallel=tensor_parallel,
        )
        self.model_dir = model_dir
        self.engine = Engine(
            ModelConfig(path=str(model_dir)), self.config, max_model_len=MANY_TOKENS + MAX_NEW_TOKENS
        )
        self.phases: dict[str, list[Generated]] = {}
        self.report = Report([], self.phases)
        self._submitted: dict[str, tuple[str, tuple[int, ...], float, int, int | None]] = {}

    def submit(
        self,
        phase: str,
        prompt_ids: tuple[int, ...],
        count: int,
        temperature: float = 1.0,
        seed: int | None = None,
        **limits: Any,
    ) -> list[str]:
        """The ids of `count` requests that differ in nothing."""
        request_ids = [f"{phase}-{len(self._submitted) + number}" for number in range(count)]
        for request_id in request_ids:
            self._submitted[request_id] = (phase, prompt_ids, temperature, self.engine.version, seed)
            self.engine.submit(request_id, prompt_ids, seed=seed, temperature=temperature, **limits)
        return request_ids

    def submit_seeded(self, phase: str, prompt_ids: tuple[int, ...]) -> list[str]:
        """Requests for all slots, each with a seed of its own, the same in every phase."""
        return [self.submit(phase, prompt_ids, 1, seed=SEED + number)[0] for number in range(SLOTS)]

    def keep(self, request_id: str, generation: Generation) -> None:
        phase, prompt_ids, temperature, version, seed = self._submitted[request_id]
        self.phases.setdefault(phase, []).append(
            Generated(prompt_ids, temperature, version, Said.of(generation), seed)
        )

    def step(self, count: int) -> None:
        for _ in range(count):
            for request_id, generation in self.engine.step():
                self.keep(request_id, generation)

    def finish(self) -> None:
        while self.engine.num_unfinished:
            self.step(1)

    def fresh(self, phase: str) -> None:
        """Samples of both prompts, at two temperatures, by the weights in place."""
        for prompt_ids in (SHORT, LONG):
            self.submit(phase, prompt_ids, SLOTS)
            self.submit(phase, prompt_ids, SLOTS, temperature=0.7)
        self.finish()

    def load(self, version: int) -> None:
        self.engine.load_weights(version, weights(self.model_dir, version).items())

    def load_snapshot(self, version: int) -> None:
        """The way of a run: buckets, read-only as they come from the object store."""
        writer = SnapshotWriter(bucket_bytes=20_000)
        for name, tensor in weights(self.model_dir, version).items():
            writer.add(name, tensor)
        manifest, buckets = writer.finish(version)
        for bucket in buckets:
            bucket.flags.writeable = False
        self.engine.load_weights(manifest.version, read_snapshot(manifest, buckets))


def updates_in_flight(scenario: Scenario) -> None:
    """An update while all slots are busy with the long prompt and as many requests wait; then new ones
    with the same prompt.
    """
    scenario.submit("in flight", LONG, 2 * SLOTS)
    scenario.step(4)
    scenario.load(1)
    scenario.submit("after an update in flight", LONG, SLOTS)
    scenario.finish()


def sabotaged_updates(scenario: Scenario) -> None:
    """Updates with one precaution of the engine taken away each, to show that the tests would see it."""
    repack, actors.engine_worker._repack_head = actors.engine_worker._repack_head, lambda head: None
    scenario.load(3)
    scenario.fresh("head not repacked")
    actors.engine_worker._repack_head = repack
    scenario.load(4)
    scenario.submit("running", LONG, 1)
    scenario.step(2)
    scenario.load(5)
    scenario.engine._num_updates -= 1
    scenario.submit("prefix cache not salted", LONG, SLOTS)
    scenario.finish()


def truncations(scenario: Scenario) -> None:
    """The same requests to their end, and cut after a while; then all slots must be free, for others
    and in the engine's books.
    """
    scenario.submit_seeded("whole", LONG)
    scenario.finish()
    scenario.submit_seeded("truncated", LONG)
    scenario.submit("never started", SHORT, 2 * SLOTS)
    scenario.step(6)
    for request_id, sample in scenario.engine.truncate(list(scenario._submitted)):
        scenario.keep(request_id, sample)
    scenario.report.num_unfinished_after_truncation = scenario.engine.num_unfinished
    scenario.report.num_overdue_after_truncation = len(scenario.engine.overdue(0.0))
    request_ids = scenario.submit("after truncation", SHORT, SLOTS)
    first = dict(scenario.engine.step())
    scenario.report.num_started_after_truncation = len(
        {**first, **dict(scenario.engine.truncate(request_ids))}
    )


def refusals(scenario: Scenario) -> None:
    """Prompts that vLLM does not take, among others that it does."""
    for name, prompt_ids in (("too long", LONG * 5), ("empty", ()), ("unknown token", (4, 10**6))):
        (request_id,) = scenario.submit(name, prompt_ids, 1)
        scenario.submit("beside a refused one", SHORT, 1)
        try:
            scenario.step(1)
        except PromptRefused as refused:
            scenario.report.refused.append(
                (name if refused.request_id == request_id else refused.request_id, str(refused))
            )
        scenario.finish()


def updates_by_kind(scenario: Scenario) -> None:
    """Every `actors.on_update` as the actor does it, with groups in the slots and waiting; then fresh
    samples.
    """
    for kind, version in ON_UPDATE.items():
        config = scenario.config.model_copy(update={"on_update": kind})
        groups, ended = Groups(scenario.engine, config), []
        for ordinal in range(2):
            row = PromptRow(ordinal, "", LONG, {})
            groups.start(
                OpenGroup(
                    WorkItem(ordinal, ordinal, SEED + SLOTS * ordinal), row, [None] * SLOTS, temperature=1.0
                )
            )
        for _ in range(4):
            ended += groups.step()
        new = list(weights(scenario.model_dir, version).items())
        while not groups.update(version, new):
            ended += groups.step()
        while len(groups):
            ended += groups.step()
        entries = [
            (group.item.seed + number, sample)
            for group in ended
            for number, sample in enumerate(group.samples)
        ]
        scenario.phases[f"{kind} in flight"] = [
            Generated(LONG, 1.0, -1, Said.of(sample), seed) for seed, sample in entries if sample is not None
        ]
        scenario.report.num_restarted[kind] = groups.counters["samples_restarted"]
        scenario.fresh(f"after {kind}")
        scenario.submit_seeded(f"seeded after {kind}", LONG)
        scenario.finish()


def updates_of_a_queue(scenario: Scenario) -> None:
    """Updates while vLLM has a pass under way between two steps, as on a GPU; then one that does not wait for
    it.
    """
    engine = scenario.engine
    core = engine._engine.engine_core.engine_core
    before = core.batch_queue, core.batch_queue_size, core.step_fn
    core.batch_queue, core.batch_queue_size = collections.deque(), 2
    core.step_fn = core.step_with_batch_queue
    scenario.load(QUEUED[0])
    for version in QUEUED[1:]:
        phase = "not drained" if version == QUEUED[-1] else f"queued before {version}"
        scenario.submit(phase, SHORT, SLOTS // 2)
        scenario.submit(phase, SHORT, SLOTS // 2, max_tokens=1)
        scenario.step(1)
        scenario.report.num_under_way.append(
            sum(scheduled.total_num_scheduled_tokens for _, scheduled, _ in core.batch_queue)
        )
        if version == QUEUED[-1]:
            engine._drain = lambda: None
        scenario.load(version)
        scenario.finish()
    del engine._drain
    core.batch_queue, core.batch_queue_size, core.step_fn = before


class ScenarioActor(RolloutActor):
    """The actor on the scenario's engine."""

    def __init__(self, bench: Bench, engine: Engine) -> None:
        self._given = engine
        super().__init__("actor-0", bench.config, bench.prompts, bench.eval_prompts, *bench.peers())

    def _make_engine(self) -> Engine:
        return self._given


def updates_in_the_loop(scenario: Scenario, directory: Path) -> None:
    """Snapshots published to the real loop while it generates; their pauses, and the bare loading of
    the same tensors.
    """
    tree: dict[str, Any] = {
        "model": {"path": str(scenario.model_dir)},
        "data": {"max_prompt_tokens": len(LONG)},
        "actors": {"group_size": 4, "slots": SLOTS, "max_new_tokens": MAX_NEW_TOKENS},
        "buffer": {"capacity": 512, "max_staleness": 1000, "sampler": "fresh"},
        "learner": {"groups_per_step": 4},
    }
    bench = Bench(
        make_config(tree),
        directory,
        [PromptRow(row, "", prompt, {"answer": "7"}) for row, prompt in enumerate((SHORT, LONG))],
    )
    actor = ScenarioActor(bench, scenario.engine)
    bench.start(actor)
    versions = range(20, 20 + NUM_LOADS)
    for step, version in enumerate(versions):
        bench.publish(version, tensors=list(weights(scenario.model_dir, version).items()))
        deadline_s = time.monotonic() + 60
        while actor._groups.counters["updates"] <= step and time.monotonic() < deadline_s:
            time.sleep(0.001)
        scenario.report.pauses_s.append(actor._groups.counters["apply_s"])
        for group in bench.train(step, 4):
            prompt_ids = bench.prompts[group.prompt_index].token_ids
            scenario.phases.setdefault("loop", []).extend(
                Generated(prompt_ids, 1.0, -1, Said.of(sample)) for sample in group.samples
            )
    assert bench.close()["violations"] == []
    scenario.engine.abort([f"train-{ordinal}-{number}" for ordinal in range(4096) for number in range(4)])
    for version in versions:
        new = list(weights(scenario.model_dir, version).items())
        start_s = time.perf_counter()
        scenario.engine.load_weights(version, new)
        scenario.report.loads_s.append(time.perf_counter() - start_s)


def run(model_dir: Path) -> Report:
    """The whole scenario; its last update leaves the engine unusable."""
    if missing := missing_symbols():
        return Report(missing)
    scenario = Scenario(model_dir)
    scenario.fresh("version 0")
    scenario.submit("seeded", SHORT, 4, seed=7)
    scenario.submit("greedy", SHORT, 2, temperature=0.0)
    scenario.submit("limited", SHORT, SLOTS, max_tokens=3)
    scenario.submit("stopped", SHORT, 4 * SLOTS, stop=STOP_TEXTS)
    scenario.finish()
    scenario.submit("aborted", SHORT, 2 * SLOTS)
    scenario.step(1)
    scenario.engine.abort(list(scenario._submitted))
    scenario.report.num_unfinished_after_abort = scenario.engine.num_unfinished
    scenario.step(1)
    scenario.engine._config = scenario.config.model_copy(update={"top_p": TOP_P})
    scenario.submit("nucleus", SHORT, 4 * SLOTS)
    scenario.finish()
    scenario.engine._config = scenario.config
    for number in range(SLOTS):
        prompt_ids = tuple(3 + (place * place + number) % 12 for place in range(MANY_TOKENS))
        scenario.submit("more than one pass takes", prompt_ids, 1, seed=SEED + number)
    scenario.finish()
    truncations(scenario)
    updates_in_flight(scenario)
    scenario.fresh("version 1")
    scenario.load_snapshot(2)
    scenario.fresh("version 2")
    refusals(scenario)
    updates_by_kind(scenario)
    updates_of_a_queue(scenario)
    with tempfile.TemporaryDirectory() as directory:
        updates_in_the_loop(scenario, Path(directory))
    sabotaged_updates(scenario)
    try:
        scenario.engine.load_weights(
            6,
            [(name, tensor) for name, tensor in weights(model_dir, 6).items() if "layers.1.mlp" not in name],
        )
    except SnapshotError as raised:
        scenario.report.incomplete_error = str(raised)
    return scenario.report


def main(model_dir: Path, out: Path) -> None:
    """Everything, as a `Report`."""
    out.write_bytes(msgspec.json.encode(run(model_dir)))


def missing_symbols() -> list[str]:
    """Names in VLLM_SYMBOLS that do not resolve."""
    missing = []
    for symbol in VLLM_SYMBOLS:
        module, _, name = symbol.partition(":")
        try:
            operator.attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError):
            missing.append(symbol)
    return missing
