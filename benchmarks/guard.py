"""Tells in two minutes whether this system has become slower: `make bench-guard`.

Five ratios, each the share that this system reaches of something bare in the same run, in CPU seconds where
others on the machine would count by the clock:

    actor     samples a CPU second, of bare vLLM's at its cheapest settings; 0.3M parameters, sums
    update    an actor's pause for new weights: of the CPU time that vLLM's own load of them takes
    learner   tokens a CPU second, of a plain PyTorch loop's; 0.3M parameters, sums
    buffer    durable inserts, eight a transaction, of bare sqlite's with the same bytes and pragmas
    whole     samples a CPU second of all processes of a quickstart, of bare vLLM's and the plain loop's together

    python -m benchmarks.guard              measures, and compares with benchmarks/results/guard-*.json
    python -m benchmarks.guard --commit     measures, and writes that file

A ratio is `worse` or `better` when it differs from the committed one by more than its noise: the spread of
the pairs, here or there, and at least NOISE. It never fails: a busy machine is nobody's fault.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from benchmarks.pairs import Ratio
from benchmarks.processes import tree_cpu_s
from benchmarks.results import measure_load, path_of, save, show

Row: TypeAlias = dict[str, float]
NOISE = 0.07
WHOLE_STEPS = (20, 40, 60, 80)
"""From each of these steps to the next a quickstart is measured."""
PART_TIMEOUT_S = 300.0


def actor_rows() -> dict[str, Row]:
    """Returns `actor` and `update`, and bare vLLM's CPU seconds a sample."""
    import ray

    from benchmarks.actors.against_bare import both, pause, speed
    from benchmarks.actors.rig import prepare

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(Path(directory), "actors.num_cpus=1", "buffer.capacity=256")
        with both(Path(directory, "run"), prepared) as (rig, bare):
            spent, paused = speed(rig, bare, rounds=3, window_s=3.0), pause(rig, bare, rounds=9)
    ray.shutdown()
    update = {name: paused[f"of_bare_cpu{name}"] for name in ("", "_most", "_least")}
    return {
        "actor": _row(Ratio(*(spent[f"of_bare_cpu{name}"] for name in ("", "_least", "_most")))),
        "update": _row(Ratio(1 / update[""], 1 / update["_most"], 1 / update["_least"])),
        "floor": {"generation_cpu_s": spent["bare_cpu_ms_a_sample"] / 1e3},
    }


def learner_rows() -> dict[str, Row]:
    """Returns `learner`, and the plain loop's CPU seconds a sample."""
    import torch

    from benchmarks.learner.cases import GROUP_SIZE, SHAPES
    from benchmarks.learner.speed import measure_speed

    torch.set_num_threads(1)
    shape = SHAPES[0]
    found = measure_speed("cpu", [shape])[0]
    tokens_a_sample = found["tokens_per_step"] / (shape.groups * GROUP_SIZE)
    return {
        "learner": _row(Ratio(*(found[f"of_plain{name}"] for name in ("", "_least", "_most")))),
        "floor": {"training_cpu_s": tokens_a_sample / found["plain_loop"]},
    }


def buffer_rows() -> dict[str, Row]:
    """Returns `buffer`."""
    from benchmarks.buffer import rates

    found = asyncio.run(rates("normal", 8))
    return {"buffer": _row(Ratio(*(found[f"ratio{name}"] for name in ("", "_least", "_most"))))}


def whole_rows() -> dict[str, Row]:
    """Returns the CPU seconds that a quickstart needs for a sample, start and end left out."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory, "run")
        overrides = [f"run.dir={run_dir}", "eval.every=600", "checkpoint.every=0"]
        command = [sys.executable, "launch.py", "train", "configs/quickstart.yaml", *overrides]
        with Path(directory, "said").open("wb") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            marks = [_reach(process, run_dir / "metrics.jsonl", step) for step in WHOLE_STEPS]
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
    spent = sorted(
        (cpu_s - cpu_before_s) / (samples - samples_before)
        for (samples_before, cpu_before_s), (samples, cpu_s) in itertools.pairwise(marks)
    )
    return {"whole": {"least_cpu_s": spent[0], "cpu_s": statistics.median(spent), "most_cpu_s": spent[-1]}}


def _reach(process: subprocess.Popen[bytes], metrics: Path, step: int) -> tuple[float, float]:
    """Waits for this step of the run, and returns the samples trained and the CPU seconds spent so far."""
    deadline_s = time.monotonic() + PART_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        if len(lines) >= step:
            return json.loads(lines[-1])["progress/samples"], tree_cpu_s(process.pid)
        time.sleep(0.1)
    said = metrics.parent.with_name("said").read_text(encoding="utf-8").strip().splitlines()[-1:]
    raise RuntimeError(f"the quickstart did not come to step {step}: {said}")


PARTS: dict[str, Callable[[], dict[str, Row]]] = {
    "actor": actor_rows,
    "learner": learner_rows,
    "buffer": buffer_rows,
    "whole": whole_rows,
}


def measure() -> dict[str, Row]:
    """Returns the five ratios, each part measured in a process of its own; a part that fails is told and left
    out.
    """
    found: dict[str, Row] = {"floor": {}}
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.guard", "--part", part]
        ran = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if ran.returncode:
            print(f"{part} could not be measured: {ran.stderr.strip()[-300:] or ran.returncode}")
            continue
        for name, row in json.loads(ran.stdout.splitlines()[-1]).items():
            found[name] = {**found.get(name, {}), **row}
    floor = found.pop("floor")
    if len(floor) == 2 and "whole" in found:
        spent, bare_cpu_s = found["whole"], sum(floor.values())
        ratio = Ratio(*(bare_cpu_s / spent[name] for name in ("cpu_s", "most_cpu_s", "least_cpu_s")))
        found["whole"] = {**_row(ratio), "cpu_ms_a_sample": 1e3 * spent["cpu_s"]}
    return found


def judge(now: Row, before: Row) -> str:
    """Returns what a ratio has become against the committed one: worse, better, or nothing to speak of."""
    spreads = [(row["most"] - row["least"]) / 2 / row["ratio"] for row in (now, before)]
    change, noise = now["ratio"] / before["ratio"] - 1, max(NOISE, *spreads)
    if abs(change) <= noise:
        return f"as before (noise {noise:.0%})"
    return f"{'worse' if change < 0 else 'better'} by {abs(change):.0%} (noise {noise:.0%})"


def _row(ratio: Ratio) -> Row:
    return {"ratio": ratio.median, "least": ratio.least, "most": ratio.most}


def main() -> None:
    """Measures, prints what has changed, and with --commit writes what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--commit", action="store_true", help="write benchmarks/results/guard-*.json")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part]()))
        return
    load, found, path = measure_load(), measure(), path_of("guard")
    committed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = []
    for name, row in found.items():
        verdict = judge(row, committed[name]) if name in committed else "nothing committed"
        rows.append(
            {"": name, **row, "committed": committed.get(name, {}).get("ratio", ""), "verdict": verdict}
        )
    columns = ["", "ratio", "least", "most", "committed", "verdict"]
    show(
        f"shares of what is bare (load before: {load})", [{key: row[key] for key in columns} for row in rows]
    )
    if arguments.commit:
        print(f"written to {save('guard', {**found, 'load': load})}")


if __name__ == "__main__":
    main()
