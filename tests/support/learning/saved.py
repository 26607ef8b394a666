"""A checkpoint of three ranks, as a run leaves it, of any model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.config.files import dump_config
from learner.catalogue import parse_config
from learner.checkpoints.checkpoint import TensorPart, partition
from learner.checkpoints.writer import CheckpointWriter
from learner.policy.lora import persistent_buffers
from tests.support.configs import update_config

NUM_RANKS = 3


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def save_checkpoint(
    run_dir: Path, model: Any, model_dir: Path, *, step: int = 5, dtype: str = "float32"
) -> None:
    """What ranks would save of `model`: its weights in fp32 and moments."""
    tree = update_config(str(model_dir)).model_dump()
    tree["model"]["dtype"] = dtype
    config = dump_config(parse_config(tree))
    writers = [CheckpointWriter(run_dir, rank, NUM_RANKS, session="s") for rank in range(NUM_RANKS)]
    for rank, writer in enumerate(writers):
        writer.save(step, parts_of(model, rank), {"config": config})
    for writer in writers:
        writer.close()


def parts_of(model: Any, rank: int) -> Iterator[TensorPart]:
    for name, parameter in model.named_parameters():
        start, stop = partition(parameter.numel(), NUM_RANKS, rank)
        values = parameter.detach().flatten()[start:stop].float()
        yield TensorPart(f"master/{name}", tuple(parameter.shape), values)
        yield TensorPart(f"exp_avg/{name}", tuple(parameter.shape), values * 2)
    for name, buffer in persistent_buffers(model):
        start, stop = partition(buffer.numel(), NUM_RANKS, rank)
        yield TensorPart(f"buffer/{name}", tuple(buffer.shape), buffer.flatten()[start:stop])
