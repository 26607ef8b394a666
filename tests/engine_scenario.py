"""What tests/test_engine.py looks at: one engine, taken through updates, in a process of its own.

    python -m tests.engine_scenario MODEL_DIR OUT.json     everything below, as a `Report`

vLLM cannot be relied on to build two engines in one process, and an engine takes ten seconds to start: hence one run per
model, with the sabotaged updates, which the tests must be able to tell from the sound ones, at its end.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file

import actors.engine
from actors.engine import VLLM_SYMBOLS, Engine
from buffer.records import Sample
from cluster.config import ActorsConfig, ModelConfig
from cluster.errors import SnapshotError
from cluster.weights import SnapshotWriter, read_snapshot

MAX_NEW_TOKENS = 16
SLOTS = 8
SHORT = (4, 13, 5, 14)
LONG = tuple(3 + i * i % 12 for i in range(70))  # Two whole blocks of the prefix cache and a bit.


class Generated(msgspec.Struct):
    """One request and its sample. `version` is the engine's when it was submitted."""

    prompt_ids: tuple[int, ...]
    temperature: float
    version: int
    sample: Sample


class Report(msgspec.Struct):
    """Samples by phase of the scenario, and what else it saw. With symbols missing there is nothing but their names."""

    missing_symbols: list[str]
    phases: dict[str, list[Generated]] = {}
    num_unfinished_after_abort: int = 0
    incomplete_error: str = ""


def weights(model_dir: Path, version: int) -> dict[str, torch.Tensor]:
    """The weights called `version`: 0 those in `model_dir`, others as far from them as from each other."""
    generator = torch.Generator().manual_seed(version)
    state = load_file(model_dir / "model.safetensors")
    return {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) if version else tensor for name, tensor in state.items()}


class Scenario:
    """Submits to one engine and keeps what comes back, by phase."""

    def __init__(self, model_dir: Path) -> None:
        config = ActorsConfig(slots=SLOTS, max_new_tokens=MAX_NEW_TOKENS, kv_cache_gib=1 / 64)
        self.model_dir = model_dir
        self.engine = Engine(ModelConfig(path=str(model_dir)), config, max_model_len=len(LONG) + MAX_NEW_TOKENS)
        self.phases: dict[str, list[Generated]] = {}
        self._submitted: dict[str, tuple[str, tuple[int, ...], float, int]] = {}

    def submit(self, phase: str, prompt_ids: tuple[int, ...], count: int, temperature: float = 1.0, seed: int | None = None) -> None:
        for _ in range(count):
            request_id = f"{phase}-{len(self._submitted)}"
            self._submitted[request_id] = (phase, prompt_ids, temperature, self.engine.version)
            self.engine.submit(request_id, prompt_ids, seed=seed, temperature=temperature)

    def step(self, count: int) -> None:
        for _ in range(count):
            for request_id, sample in self.engine.step():
                phase, prompt_ids, temperature, version = self._submitted[request_id]
                self.phases.setdefault(phase, []).append(Generated(prompt_ids, temperature, version, sample))

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
    """An update while all slots are busy with the long prompt and as many requests wait; then new ones with the same prompt."""
    scenario.submit("in flight", LONG, 2 * SLOTS)
    scenario.step(4)
    scenario.load(1)
    scenario.submit("after an update in flight", LONG, SLOTS)
    scenario.finish()


def sabotaged_updates(scenario: Scenario) -> None:
    """Updates with one precaution of the engine taken away each, to show that the tests would see it."""
    repack, actors.engine._repack_head = actors.engine._repack_head, lambda head: None
    scenario.load(3)
    scenario.fresh("head not repacked")
    actors.engine._repack_head = repack
    scenario.load(4)
    scenario.submit("running", LONG, 1)
    scenario.step(2)
    scenario.load(5)
    scenario.engine._num_updates -= 1
    scenario.submit("prefix cache not salted", LONG, SLOTS)
    scenario.finish()


def run(model_dir: Path) -> Report:
    """The whole scenario; its last update leaves the engine unusable."""
    if missing := missing_symbols():
        return Report(missing)
    scenario = Scenario(model_dir)
    scenario.fresh("version 0")
    scenario.submit("seeded", SHORT, 4, seed=7)
    scenario.submit("greedy", SHORT, 2, temperature=0.0)
    scenario.finish()
    scenario.submit("aborted", SHORT, 2 * SLOTS)
    scenario.step(1)
    scenario.engine.abort(list(scenario._submitted))
    num_unfinished = scenario.engine.num_unfinished
    scenario.step(1)
    updates_in_flight(scenario)
    scenario.fresh("version 1")
    scenario.load_snapshot(2)
    scenario.fresh("version 2")
    sabotaged_updates(scenario)
    error = ""
    try:
        scenario.engine.load_weights(6, [(name, tensor) for name, tensor in weights(model_dir, 6).items() if "layers.1.mlp" not in name])
    except SnapshotError as raised:
        error = str(raised)
    return Report([], scenario.phases, num_unfinished, error)


def missing_symbols() -> list[str]:
    """Names in VLLM_SYMBOLS that do not resolve."""
    missing = []
    for symbol in VLLM_SYMBOLS:
        module, _, name = symbol.partition(":")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            missing.append(symbol)
    return missing


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(run(Path(sys.argv[1]))))
