"""What the learner costs, as ratios within one process: against a plain PyTorch loop, packed against padded,
chunked against whole logits.

    python -m benchmarks.learner [speed] [ranks] [layouts] [memory] [checkpoint] [gpu]     all by default

speed    Trained tokens/s of Updater and ZeroPolicy (one rank) against the shortest loop that trains the same:
         same model, batches, micro-batches, attention and objective; whole logits, AdamW, no DeepSpeed, no
         metrics. Steps alternate. Beside it our Updater without DeepSpeed: what lies between them is ours,
         the rest DeepSpeed's.
ranks    Two ranks against twice one, by the clock (benchmarks/learner/ranks.py).
layouts  Forward and backward over the same sequences: padded, packed under transformers' block mask, packed
         by learner/policy/attention.py.
memory   Growth of the peak by log-probs of T tokens and their gradient, one process each.
checkpoint  What a save costs and how long a resume takes (benchmarks/learner/checkpoint.py).
gpu      A 1.1B model on a GPU (benchmarks/learner/gpu.py): tokens/s, MFU, peak memory against the estimate.

Lengths are those of GSM8K's questions and answers, at 4 characters a token. On a CPU times are the process's
own CPU seconds on one thread, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learner.cases import (
    LAYOUT_SHAPE,
    TEMPERATURE,
    make_batch,
    make_model,
)
from benchmarks.learner.checkpoint import measure_checkpoint, measure_saves
from benchmarks.learner.gpu import measure_case, measure_gpu
from benchmarks.learner.ranks import measure_ranks
from benchmarks.learner.speed import clocked, measure_speed
from benchmarks.pairs import compare, interleave
from benchmarks.results import measure_load, save, show

MIB = 2**20
LAYOUT_BUDGETS = (1024, 2048, 4096, 8192)
MEMORY_TOKENS = (2048, 8192, 16384)
MEMORY_VOCABULARIES = (8192, 32768)
MEMORY_HIDDEN = 128


# --- layouts ---


def measure_layouts(device: str) -> list[dict[str, Any]]:
    """Returns tokens/s of one pass over a batch at several budgets, and the share of positions that are
    padding.
    """
    from learner.step.packing import TokenLogprobs, collate, plan_micro_batches
    from learner.step.samples import sequences_of

    shape, batch = LAYOUT_SHAPE, make_batch(LAYOUT_SHAPE)
    rows_of = [(group, sample) for group in batch.groups for sample in group.samples]
    sequences = [sequences_of(sample)[0] for _, sample in rows_of]  # One segment each.
    lengths, groups = [s.num_tokens for s in sequences], [group.group_id for group, _ in rows_of]
    models = {}
    for name, layout, attention in (
        ("padded", "padded", "sdpa"),
        ("packed, mask", "packed", ""),
        ("packed", "packed", "sdpa"),
    ):
        module = make_model(shape).to(device)
        models[name] = (module, layout, TokenLogprobs(module, layout, attention))  # type: ignore[arg-type]
    found = []
    for budget in LAYOUT_BUDGETS:
        calls, padding = {}, {}
        for name, (module, layout, token_logprobs) in models.items():
            plan = plan_micro_batches(lengths, groups, budget, layout)  # type: ignore[arg-type]
            inputs = [
                collate([sequences[i] for i in micro.indices], layout, 0, device)  # type: ignore[arg-type]
                for micro in plan
            ]
            padding[name] = 1 - sum(lengths) / sum(one.input_ids.numel() for one in inputs)
            calls[name] = clocked(functools.partial(pass_over, module, inputs, token_logprobs), device)
        seconds = interleave(calls, LAYOUT_SHAPE.rounds, warm_rounds=1)
        found += [
            {
                "budget_tokens": budget,
                "layout": name,
                "tokens_per_s": sum(lengths) / statistics.median(seconds[name]),
                **compare(seconds["padded"], seconds[name]).fields("against_padded"),
                "padding": padding[name],
            }
            for name in models
        ]
    return found


def pass_over(module: Any, inputs: list[Any], token_logprobs: Any) -> None:
    """Runs forward and backward over all of `inputs`."""
    for one in inputs:
        token_logprobs(module, one, TEMPERATURE).sum().backward()
    module.zero_grad()


# --- memory ---


def measure_memory() -> list[dict[str, Any]]:
    """Returns the peak growth of chunked and whole log-probs, forward and backward, in MiB; float32, hidden
    size MEMORY_HIDDEN.
    """
    found = []
    for vocabulary in MEMORY_VOCABULARIES:
        for tokens in MEMORY_TOKENS:
            row: dict[str, Any] = {
                "vocabulary": vocabulary,
                "tokens": tokens,
                "logits_mib": tokens * vocabulary * 4 // MIB,
            }
            for method in ("chunked", "whole"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.learner",
                    "peak",
                    method,
                    str(tokens),
                    str(vocabulary),
                ]
                row[f"{method}_mib"] = round(
                    float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
                )
            found.append(row)
    return found


def peak_growth(method: str, tokens: int, vocabulary: int) -> float:
    """Returns by how many MiB the peak of this process's memory grows."""
    import torch

    from learner.step.logprobs import linear_logprobs

    torch.set_num_threads(1)
    hidden = torch.randn(tokens, MEMORY_HIDDEN, requires_grad=True)
    weight = torch.randn(vocabulary, MEMORY_HIDDEN, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    # Libraries, and room for the gradients.
    linear_logprobs(hidden[:8], weight, targets[:8], TEMPERATURE).sum().backward()
    before_mib = peak_mib()
    if method == "chunked":
        logprobs = linear_logprobs(hidden, weight, targets, TEMPERATURE)
    else:
        logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])
    logprobs.sum().backward()
    return peak_mib() - before_mib


def peak_mib() -> float:
    """Returns the most memory that was resident in this process; not by getrusage, which begins with the
    parent's peak.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# --- the command ---


def main() -> None:
    """Measures the parts asked for, prints them and writes them to benchmarks/results/."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        default=["speed", "ranks", "layouts", "memory", "checkpoint", "gpu"],
        help="speed, ranks, layouts, memory, checkpoint, gpu",
    )
    parts = parser.parse_args().parts
    os.environ["OMP_NUM_THREADS"] = "1"
    if parts[0] == "peak":
        print(peak_growth(parts[1], int(parts[2]), int(parts[3])))
        return
    if parts[0] == "checkpoint-case":
        print(json.dumps(measure_saves()))
        return
    if parts[0] == "gpu-case":
        print(json.dumps(measure_case(parts[1], int(parts[2]), parts[3], parts[4])))
        return
    import torch

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = measure_load()
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "speed": lambda: measure_speed(device),
        "ranks": measure_ranks,
        "layouts": lambda: measure_layouts(device),
        "memory": measure_memory,
        "checkpoint": measure_checkpoint,
        "gpu": measure_gpu,
    }
    for part in parts:
        found = measures[part]()
        show(part, found)
        print(save("learner", {part: found, "load": load}, keep=True))


if __name__ == "__main__":
    main()
