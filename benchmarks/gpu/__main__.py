"""What only a machine with a GPU can prove (`make test-gpu`) and measure (`make bench-gpu`). NOT RUN YET: no
GPU was at hand; `--on-cpu` tries the checks of benchmarks/gpu/checks.py here.

    python -m benchmarks.gpu test | bench [--minutes 9] [--again] [--on-cpu]

Each case has a process of its own, and a limit. What is done stands in benchmarks/results/gpu-<card>.json: a
second call goes on with what is not, so that a machine that is lent for minutes at a time gets through. No
case needs the network. Without a GPU the cases are listed, and nothing fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.processes import end_session

RESULTS = Path(__file__).parents[1] / "results"
GRACE_S = 20.0
"""For a case that has had its time: a run writes a checkpoint and ends its actors."""


class Case(NamedTuple):
    """One case: its name, what it shows, the GPUs that it wants and how long it may take."""

    name: str
    shows: str
    gpus: int = 1
    timeout_s: float = 180.0


CASES = {
    "test": (
        Case("engine-float32", "log-probs are transformers', before and after an update in flight (drained)"),
        Case("engine-bfloat16", "the same with CUDA graphs in bfloat16, to its rounding"),
        Case(
            "attention",
            "flash over ragged sequences is attention in buckets, forward and backward",
            timeout_s=60,
        ),
        Case("row-softmax", "liger's kernel computes what torch does", timeout_s=60),
        Case("memory", "a learner's step takes the memory that --dry-run says, within 15 %"),
        Case("offload", "a step with everything in CPU memory gives the loss of one without"),
        Case("run-snapshot", "the quickstart trains, engines and learner on one card", timeout_s=300),
        Case("run-ipc", "the same with weights pushed within the card", timeout_s=300),
        Case("run-nccl", "the same with weights broadcast between two cards", gpus=2, timeout_s=300),
    ),
    "bench": (
        Case("actor", "tokens/s of an engine against bare vLLM's own loop, 0.5 B, bfloat16", timeout_s=240),
        Case("update", "seconds of an update of the same engine while it generates", timeout_s=180),
        Case(
            "learner",
            "tokens/s, share of the card's peak and memory against a plain loop, 1.1 B",
            timeout_s=540,
        ),
    ),
}


def card() -> str | None:
    """Returns the name of the first GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0).replace(" ", "-").lower() if torch.cuda.is_available() else None


def num_gpus() -> int:
    """Returns how many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()


def run_case(case: Case, *, on_cpu: bool) -> dict[str, Any]:
    """Runs one case in a process of its own; returns what it found, or why it has found nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu.checks", case.name, *(["--on-cpu"] if on_cpu else [])]
    mark, value = "AGRO_GPU_CASE", uuid.uuid4().hex
    start_s = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, mark: value},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=case.timeout_s)
    except subprocess.TimeoutExpired:
        return {"ok": False, "found": f"it took more than {case.timeout_s:.0f} s"}
    finally:
        # The next case wants the card, and a run that is left goes on training.
        end_session(process, f"{mark}={value}", GRACE_S)
    has_ended = process.returncode == 0
    lines = (out if has_ended else err).strip().splitlines() or ["no word"]
    found = json.loads(lines[-1]) if has_ended else {"ok": False, "found": lines[-1][:300]}
    return {**found, "wall_s": round(time.perf_counter() - start_s, 1)}


def main() -> int:
    """Runs what is not done yet, prints a table, and returns 1 where a case has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("what", choices=[*CASES])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--again", action="store_true", help="forget what is done")
    parser.add_argument("--on-cpu", action="store_true", help="try what a CPU can")
    given = parser.parse_args()
    cases, name = CASES[given.what], card()
    if name is None and not given.on_cpu:
        print(f"No GPU here: nothing is run. On a machine with one, `make {given.what}-gpu` shows that")
        for case in cases:
            wants = "" if case.gpus == 1 else f" ({case.gpus} GPUs)"
            print(f"  {case.name:<16} {case.shows}{wants}; at most {case.timeout_s:.0f} s")
        return 0
    path = RESULTS / f"gpu-{name or 'cpu'}.json"
    done = {} if given.again or given.on_cpu or not path.exists() else json.loads(path.read_text("utf-8"))
    deadline_s, left_out, has_run = time.monotonic() + 60 * given.minutes, 0, False
    for case in cases:
        if name is not None and case.gpus > num_gpus():
            done[case.name] = {"ok": None, "found": f"not run: it wants {case.gpus} GPUs"}
        elif not done.get(case.name, {}).get("ok"):
            if has_run and time.monotonic() + case.timeout_s > deadline_s:
                left_out += 1
                continue
            done[case.name], has_run = run_case(case, on_cpu=given.on_cpu), True
            if not given.on_cpu:
                path.write_text(json.dumps(done, indent=1) + "\n", "utf-8")
        print(f"{case.name:<16} {done[case.name]}", flush=True)
    if left_out:
        print(f"{left_out} cases have no time left: the same command goes on with them")
    return int(any(done.get(case.name, {}).get("ok") is False for case in cases))


if __name__ == "__main__":
    sys.exit(main())
