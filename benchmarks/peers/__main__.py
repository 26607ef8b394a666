"""Compares this system with TRL and with a plain synchronous loop, in turns: `make bench-peers`.

    python -m benchmarks.peers [--rounds N] [--jobs sums,tail,turns] [--systems ours,trl,plain]

Every figure of another system stands beside ours of the same round; the ratios are medians over the rounds,
with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pairs import compare
from benchmarks.peers.jobs import JOBS, PeerJob, told
from benchmarks.peers.measured import measure, rows_of_ours, rows_of_peers
from benchmarks.results import measure_load, save, show
from cluster.preparation.prepare import ensure_model
from core.config import Config
from learner.catalogue import load_config

PEERS_PYTHON = Path(".cache/peers/venv/bin/python")
SYSTEMS = ("ours", "trl", "plain")
FIGURES = (
    "samples_per_s",
    "tokens_per_s",
    "cpu_ms_per_sample",
    "peak_memory_mib",
    "first_step_s",
    "solved_s",
    "cores_used",
    "steps",
    "reward",
)
OVER_OURS = ("cpu_ms_per_sample", "peak_memory_mib", "first_step_s", "solved_s")
"""What is better where it is less."""


def run(system: str, job: PeerJob, config: Config, place: Path) -> dict[str, Any]:
    """Returns the figures of one system on one job; `place` is an empty directory for what it writes."""
    rows_path, run_dir = place / "rows.jsonl", place / "run"
    environment: dict[str, str] = {"TOKENIZERS_PARALLELISM": "false"}
    rows = rows_of_peers(rows_path)
    if system == "trl":
        job_path = place / "job.json"
        job_path.write_text(json.dumps(told(job, config)), encoding="utf-8")
        command = [str(PEERS_PYTHON), "benchmarks/peers/trl_grpo.py", str(job_path), str(rows_path)]
        environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
    elif system == "plain":
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers.plain_sync",
            str(job.config_path),
            str(rows_path),
        ]
        environment["OMP_NUM_THREADS"] = str(job.threads)
    else:
        command = [sys.executable, "launch.py", "train", str(job.config_path), f"run.dir={run_dir}"]
        rows = rows_of_ours(run_dir)
    return measure(job, command, rows, place / "log", environment)


def measure_job(job: PeerJob, systems: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the figures of each system in each round; every other round goes backwards."""
    config = ensure_model(load_config(job.config_path, []))
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for number in range(rounds):
        for system in systems[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as place:
                load = measure_load()
                try:
                    figures = run(system, job, config, Path(place))
                except RuntimeError as error:  # The other systems and jobs are measured all the same.
                    print(f"  {job.name} round {number + 1}/{rounds} {system} failed: {error}", flush=True)
                    figures = {**dict.fromkeys(FIGURES, math.nan), "cpu_ms_per_sample_by": {}, "failed": True}
            found[system].append({**figures, "load": load})
            said = ", ".join(f"{name} {figures[name]:.4g}" for name in FIGURES)
            print(f"  {job.name} round {number + 1}/{rounds} {system}: {said}", flush=True)
            spent = figures["cpu_ms_per_sample_by"].items()
            print("    CPU ms a sample: " + ", ".join(f"{kind} {ms:.3f}" for kind, ms in spent), flush=True)
    return found


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the median of each figure over the rounds that did not fail; infinity where most did not get
    there.
    """
    done = [one for one in rounds if "failed" not in one]
    return {
        name: statistics.median(_last(one[name]) for one in done) if done else math.nan for name in FIGURES
    }


def _last(value: float) -> float:
    """Returns what was not reached as later than anything, so that it has a median."""
    return math.inf if math.isnan(value) else value


def ratios(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a row for each other system: ours divided by it, round by round."""
    table = []
    for system in (name for name in found if name != "ours"):
        row: dict[str, Any] = {"ours over": system}
        for name in ("samples_per_s", *OVER_OURS):
            pairs = [
                (mine[name], other[name])
                for mine, other in zip(found["ours"], found[system], strict=True)
                if not (math.isnan(mine[name]) or math.isnan(other[name]))
            ]
            if pairs:
                row |= compare([mine for mine, _ in pairs], [other for _, other in pairs]).fields(name)
        table.append(row)
    return table


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row without the least and the most of each ratio."""
    return {name: value for name, value in row.items() if not name.endswith(("_least", "_most"))}


def main() -> None:
    """Measures the jobs and systems named on the command line, prints and saves what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    load = measure_load()
    for job in (JOBS[name] for name in arguments.jobs.split(",")):
        found = measure_job(job, arguments.systems.split(","), arguments.rounds)
        table = [{"system": system, **medians(rounds)} for system, rounds in found.items()]
        show(f"{job.name}: medians of {arguments.rounds} rounds", table)
        result[job.name] = {"medians": table, "rounds": found}
        if "ours" in found and len(found) > 1:
            result[job.name]["ratios"] = ratios(found)
            show(f"{job.name}: ours divided by others", [_short(row) for row in result[job.name]["ratios"]])
        save("peers", {"load_at_start": load, **result}, keep=True)
    print(f"saved {save('peers', result, keep=True)}")


if __name__ == "__main__":
    main()
