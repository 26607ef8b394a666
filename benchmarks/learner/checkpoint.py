"""Measures what a checkpoint costs the learner and how long a resume takes: the part `checkpoint` of
benchmarks/learner/.

stall_s    how long a save holds up training
write_s    how long the writer then works beside training (files, hashes, fsync)
by_itself  a bare torch.save of the same tensors, fsync included, for which training would wait
resume_s   verified by its hashes, read, and in place under ZeRO-3; against torch.load of that file
memcpy     of as many bytes into memory that is used again

Figures are medians of REPEATS; one rank, in one process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 5


def measure_checkpoint() -> list[dict[str, Any]]:
    """Runs `measure_saves` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.learner", "checkpoint-case"]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    return [json.loads(ran.stdout.splitlines()[-1])]


def measure_saves() -> dict[str, Any]:
    """Returns the row of figures."""
    import torch

    from benchmarks.learner.cases import SHAPES, config_of, free_port, make_batch, make_model
    from learner.checkpoints.checkpoint import Checkpoint, checkpoint_dirs, verify
    from learner.checkpoints.writer import CheckpointWriter
    from learner.objectives import load_objective
    from learner.policy.zero import ZeroPolicy, init_process_group
    from learner.step.share import Share
    from learner.step.update import Updater

    shape = SHAPES[-1]
    init_process_group(0, 1, "127.0.0.1", free_port(), use_gpu=False, timeout_s=120)
    with tempfile.TemporaryDirectory(dir=".") as directory:  # On a disk, as runs are; /tmp may be memory.
        make_model(shape).save_pretrained(directory)
        config = config_of(shape, directory, "cpu")
        policy = ZeroPolicy(config.model, config.learner)
        objective = load_objective(config.objective)
        Updater(config, policy, objective, pad_id=0, device=torch.device("cpu")).update(
            Share.of(make_batch(shape)), config.learner.lr
        )
        num_bytes = sum(part.values.nbytes for part in policy.parts())
        source, target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
        writer = CheckpointWriter(directory, 0, 1, session="benchmark", keep=1)
        plain = Path(directory) / "plain.pt"
        times: dict[str, list[float]] = {
            name: [] for name in ("memcpy", "stall", "write", "by_itself", "resume", "torch_load")
        }

        def save_plainly() -> None:
            with plain.open("wb") as file:
                torch.save({part.key: part.values for part in policy.parts()}, file)
                file.flush()
                os.fsync(file.fileno())

        def resume() -> None:
            _, newest = checkpoint_dirs(directory)[-1]
            checkpoint = Checkpoint(newest, verify(newest))
            policy.restore(checkpoint.read, policy.adam_steps)

        def save() -> None:
            writer.save(len(times["stall"]) + 1, policy.parts(), {})

        for _ in range(REPEATS + 1):
            times["memcpy"].append(seconds(lambda: target.copy_(source)))
            times["stall"].append(seconds(save))
            times["write"].append(seconds(writer.wait))
            times["by_itself"].append(seconds(save_plainly))
            times["resume"].append(seconds(resume))
            times["torch_load"].append(seconds(lambda: torch.load(plain)))
        writer.close()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "case": shape.name,
        "mib": round(num_bytes / 2**20),
        **{f"{name}_s": round(value, 4) for name, value in medians.items()},
        "stall_against_by_itself": round(medians["stall"] / medians["by_itself"], 4),
        "memcpy_against_stall": round(medians["memcpy"] / medians["stall"], 3),
    }


def seconds(call: Callable[[], Any]) -> float:
    """Returns the seconds that one call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
