"""The cases of benchmarks/gpu/, and how one is run: `python -m benchmarks.gpu.cases NAME [--on-cpu]` prints
one line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.processes import end_session

GRACE_S = 20.0
"""For a case that has had its time: a run writes a checkpoint and ends its actors."""


SAID_LINES = 30


class Case(NamedTuple):
    """One case: its name, what it shows, the function that does, with what it is called, the GPUs that it
    wants and how long it may take.
    """

    name: str
    shows: str
    function: str
    given: tuple[Any, ...] = ()
    gpus: int = 1
    timeout_s: float = 240.0


CHECKS, MEASURES = "benchmarks.gpu.checks", "benchmarks.gpu.measures"
CASES = {
    "test": (
        Case(
            "engine-float32",
            "log-probs are transformers', before and after an update in flight (drained)",
            f"{CHECKS}:check_engine",
            ("float32",),
        ),
        Case(
            "engine-bfloat16",
            "the same with CUDA graphs in bfloat16, to its rounding",
            f"{CHECKS}:check_engine",
            ("bfloat16",),
        ),
        Case(
            "engine-divided",
            "the same of a model that is divided among two cards",
            f"{CHECKS}:check_engine",
            ("bfloat16", 2),
            gpus=2,
        ),
        Case("engine-adapters", "the same of LoRA adapters that come alone", f"{CHECKS}:check_adapters"),
        Case(
            "attention",
            "flash over ragged sequences is attention in buckets, forward and backward",
            f"{CHECKS}:check_attention",
            timeout_s=90,
        ),
        Case(
            "row-softmax",
            "liger's kernel computes what torch does",
            f"{CHECKS}:check_row_softmax",
            timeout_s=90,
        ),
        Case(
            "memory",
            "a learner's step takes the memory that --dry-run says, within 15 %",
            f"{CHECKS}:check_memory",
        ),
        Case(
            "offload",
            "a step with everything in CPU memory gives the gradient of one without",
            f"{CHECKS}:check_offload",
        ),
        Case(
            "run-snapshot",
            "the quickstart trains, engines and learner on one card",
            f"{CHECKS}:check_run",
            ("snapshot",),
            timeout_s=300,
        ),
        Case(
            "run-adapters",
            "the same with adapters that are sent alone, in bfloat16",
            f"{CHECKS}:check_run",
            ("adapters",),
            timeout_s=300,
        ),
        Case(
            "run-ipc",
            "the same with weights pushed within the card",
            f"{CHECKS}:check_run",
            ("ipc",),
            timeout_s=300,
        ),
        Case(
            "run-nccl",
            "the same with weights broadcast between two cards",
            f"{CHECKS}:check_run",
            ("nccl",),
            gpus=2,
            timeout_s=300,
        ),
    ),
    "bench": (
        Case(
            "actor-0.5B",
            "tokens/s of an engine against bare vLLM's own loop, 0.5 B, bfloat16",
            f"{MEASURES}:measure_actor",
            ("0.5B",),
        ),
        Case("actor-1.5B", "the same, 1.5 B", f"{MEASURES}:measure_actor", ("1.5B",), timeout_s=300),
        Case(
            "publish-1.5B",
            "a learner's standstill for a publication against a bare copy, 1.5 B",
            f"{MEASURES}:measure_publish",
            ("1.5B",),
        ),
        Case(
            "update-1.5B",
            "an engine's standstill for an update while it generates, 1.5 B",
            f"{MEASURES}:measure_update",
            ("1.5B",),
        ),
        Case(
            "learner-2k",
            "tokens/s, share of the card's peak and memory against a plain loop, 1.1 B, 2,048 tokens at a time",
            f"{MEASURES}:measure_learner",
            ("1.1B", 2048),
            timeout_s=500,
        ),
        Case(
            "learner-8k",
            "the same, 8,192 tokens at a time",
            f"{MEASURES}:measure_learner",
            ("1.1B", 8192),
            timeout_s=500,
        ),
        Case(
            "reward-together",
            "seconds to a reward on sums of reasoning-gym, SmolLM2, learner and actor at once on one card",
            f"{MEASURES}:measure_reward",
            ("together",),
            timeout_s=500,
        ),
        Case(
            "reward-alternating",
            "the same, one after the other",
            f"{MEASURES}:measure_reward",
            ("alternating",),
            timeout_s=500,
        ),
    ),
}


def by_name(name: str) -> Case:
    """Returns the case of this name."""
    return next(case for cases in CASES.values() for case in cases if case.name == name)


def function_of(case: Case) -> Any:
    """Returns the function that shows it."""
    module, _, name = case.function.partition(":")
    return getattr(importlib.import_module(module), name)


def run_case(case: Case, *, on_cpu: bool) -> dict[str, Any]:
    """Runs one case in a process of its own; returns what it found, or why it has found nothing, with the
    last lines that it `said`.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.cases", case.name, *(["--on-cpu"] if on_cpu else [])]
    mark, value = "AGRO_GPU_CASE", uuid.uuid4().hex
    start_s = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, mark: value, "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=case.timeout_s)
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"").decode(errors="replace").splitlines()
        return {"ok": False, "found": f"it took more than {case.timeout_s:.0f} s", "said": said[-SAID_LINES:]}
    finally:
        # The next case wants the card, and a run that is left goes on training.
        end_session(process, f"{mark}={value}", GRACE_S)
    has_ended = process.returncode == 0
    lines = (out if has_ended else err).strip().splitlines() or ["no word"]
    failed = {"ok": False, "found": lines[-1][:300], "said": lines[-SAID_LINES:]}
    found = _found(lines) if has_ended else None
    return {**(found or failed), "wall_s": round(time.perf_counter() - start_s, 1)}


def _found(lines: Sequence[str]) -> dict[str, Any] | None:
    """Returns the newest line that is a case's own: libraries may print more behind it, as they end."""
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and "ok" in said:
                return said
    return None


if __name__ == "__main__":
    asked = by_name(sys.argv[1])
    print("\n" + json.dumps(function_of(asked)(*asked.given, on_gpu="--on-cpu" not in sys.argv)))
