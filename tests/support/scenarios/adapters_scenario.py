"""What tests/learner/policy/test_lora_adapters.py looks at: a real vLLM engine that gets adapters alone, in a
process of its own (tests/support/scenarios/reported.py), its model there or divided among two workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import torch

from actors.engine import Engine
from actors.engine_settings import Adapters
from core.config import LORA_ALPHA, ActorsConfig, LearnerConfig, ModelConfig
from core.errors import SnapshotError
from core.weights.snapshots import SnapshotWriter, read_snapshot
from learner.policy.lora import adapters_of, add_adapters, is_adapter
from tests.support.said import Said

PROMPT = (4, 13, 5, 14, 7)
SLOTS = 8
ADAPTERS = Adapters(rank=3, alpha=LORA_ALPHA)


class Report(msgspec.Struct):
    """Samples by phase; `layers` to which vLLM can apply adapters; `refused` what the engine said of
    some, by what is wrong with them.
    """

    phases: dict[str, list[Said]]
    num_bytes: int
    refused: dict[str, str]
    version: int
    ranks: tuple[int, ...]
    layers: set[str]


def adapted_model(model_dir: Path, version: int) -> Any:
    """The model as the learner has it, with adapters that are a function of `version`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    add_adapters(model, LearnerConfig(lora_rank=ADAPTERS.rank), 0)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.3, generator=generator)
    return model


def snapshot(model_dir: Path, version: int) -> tuple[list[tuple[str, torch.Tensor]], int]:
    """The adapters of `version`, as an actor gets them, and their size."""
    writer = SnapshotWriter(2**12)
    for weight in adapters_of(adapted_model(model_dir, version)):
        writer.add(weight.name, weight.value())
    manifest, buckets = writer.finish(version)
    return list(read_snapshot(manifest, buckets)), manifest.num_bytes


def adaptable(worker: Any) -> set[str]:
    """The layers that vLLM can apply adapters to (called where the model is)."""
    return set(worker.get_model().lora_manager.modules)


def main(model_dir: Path, out: Path, tensor_parallel: int) -> None:
    from vllm.config.lora import MaxLoRARanks

    config = ActorsConfig(
        slots=SLOTS, max_new_tokens=16, engine_memory=1 / 64, tensor_parallel=tensor_parallel
    )
    engine = Engine(ModelConfig(path=str(model_dir)), config, max_model_len=48, version=-1, adapters=ADAPTERS)
    layers = engine._engine.collective_rpc(adaptable)
    assert len(layers) == tensor_parallel
    report = Report({}, 0, {}, -1, get_args(MaxLoRARanks), set.intersection(*layers))

    def submit(phase: str) -> None:
        for number in range(2 * SLOTS):
            engine.submit(f"{phase}-{number}", PROMPT)

    def step() -> None:
        for request_id, generation in engine.step():
            report.phases.setdefault(request_id.rpartition("-")[0], []).append(Said.of(generation))

    def finish() -> None:
        while engine.num_unfinished:
            step()

    first, report.num_bytes = snapshot(model_dir, 1)
    engine.load_weights(1, first)
    submit("first")
    finish()
    submit("in flight")
    for _ in range(4):
        step()
    engine.load_weights(2, snapshot(model_dir, 2)[0])
    finish()
    submit("second")
    finish()
    wrong = {
        "layers by another name": [
            (name.replace("model.layers", "language_model.layers"), tensor) for name, tensor in first
        ],
        # These end an engine of several workers: it has read one's answer, and finds the other's next.
        "a layer of no known kind": [("base_model.model.model.nowhere.lora_A.weight", torch.zeros(3, 4))],
        "an A without its B": first[:1],
    }
    for what, weights in wrong.items():
        try:
            engine.load_weights(3, weights)
        except SnapshotError as error:
            report.refused[what] = str(error)
    report.version = engine.version
    out.write_bytes(msgspec.json.encode(report))
