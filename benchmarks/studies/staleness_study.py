"""The staleness study: held-out reward against an enforced lag, for AGRO and its rivals
(benchmarks/studies/lag_lab.py runs each point).

    python -m benchmarks.studies.staleness_study run [--workers 2]          every missing run, then draw
    python -m benchmarks.studies.staleness_study draw                       staleness_study.csv and .png
    python -m benchmarks.studies.staleness_study run --reduced --out DIR    in minutes; only shows that it works

First each method's learning rate is chosen from GRID on a seed of its own, by the mean over CHOICE_LAGS; then
every method runs at every lag with that rate and SEEDS. All runs generate and train on the same number of
groups; at lag L the first L + 1 steps train on samples of the base policy, since nothing older exists: at lag
256 that is most of the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import Config
from learner.catalogue import load_config

LAGS = (0, 1, 4, 16, 64, 256)
SEEDS = (1, 2, 3)
GRID = (1e-4, 3e-4, 1e-3)
CHOICE_SEED = 100
CHOICE_LAGS = (0, 64)
STEPS = 400
EVAL_EVERY = 40
TAIL = 3
"""The score of a run is the mean of its last so many evaluations."""

OUT = Path("docs/figures")
MODEL = ".cache/arithmetic-small"
ROWS = "configs/arithmetic"
METHODS: dict[str, tuple[str, ...]] = {
    "agro, beta 0.01, truncated": (
        "objective.name=agro",
        "objective.beta=0.01",
        "objective.importance_weight=truncated",
        "objective.importance_cap=1.0",
    ),
    "agro, beta 0.01, no weight": (
        "objective.name=agro",
        "objective.beta=0.01",
        "objective.importance_weight=none",
    ),
    "agro, beta 0.1, truncated": (
        "objective.name=agro",
        "objective.beta=0.1",
        "objective.importance_weight=truncated",
        "objective.importance_cap=1.0",
    ),
    "agro, beta 0.1, no weight": (
        "objective.name=agro",
        "objective.beta=0.1",
        "objective.importance_weight=none",
    ),
    "kl_pg, beta 0.01": ("objective.name=kl_pg", "objective.beta=0.01"),
    "grpo": ("objective.name=grpo", "objective.beta=0.0"),
    "ppo_decoupled": ("objective.name=ppo_decoupled", "objective.beta=0.0"),
}


KNOB_METHOD = "agro, beta 0.01, truncated"
KNOB_LR = 3e-4
KNOB_SEEDS = (1, 2)
KNOBS: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {
    "weight token, cap 1": (
        ("objective.importance_weight=token", "objective.importance_cap=1.0"),
        (0, 16, 64),
        0,
    ),
    "weight token, cap 2": (
        ("objective.importance_weight=token", "objective.importance_cap=2.0"),
        (0, 16, 64),
        0,
    ),
    # What is shipped: on the plot, all seeds.
    "weight token, cap 5": (("objective.importance_weight=token", "objective.importance_cap=5.0"), LAGS, 0),
    "weight truncated, cap 3": (("objective.importance_cap=3.0",), (0, 16, 64), 0),
    "weight truncated, cap 5": (("objective.importance_cap=5.0",), LAGS, 0),
    "weight truncated, cap 20": (("objective.importance_cap=20.0",), (0, 16, 64), 0),
    "lr 1e-4": (("learner.lr=1e-4",), (0, 16, 64), 0),
    "n 4, 32 groups": (
        ("actors.group_size=4", "learner.groups_per_step=32", "buffer.capacity=4096"),
        (64,),
        0,
    ),
    "n 16, 8 groups": (("actors.group_size=16", "learner.groups_per_step=8"), (64,), 0),
    "a quarter of the groups fresh": ((), (64,), 4),
    "a quarter fresh, no weight": (("objective.importance_weight=none",), (64,), 4),
}
"""One change each from KNOB_METHOD at KNOB_LR: overrides, lags, fresh groups of a batch."""


@dataclass(frozen=True)
class KnobJob:
    """One run of KNOBS."""

    knob: str
    lag: int
    seed: int
    steps: int


@dataclass(frozen=True)
class Job:
    """One run: `method` of METHODS at `lag` learner steps with `lr`."""

    method: str
    lag: int
    lr: float
    seed: int
    steps: int


def config_of(job: Job, *extra: str) -> Config:
    """Returns the config of one run: the quickstart's, at the job's lag."""
    groups = 16
    overrides = [
        f"run.steps={job.steps}",
        f"run.seed={job.seed}",
        f"model.path={MODEL}",
        f"learner.lr={job.lr:.1e}",
        "learner.schedule=[10,constant]",
        "weights.publish_every=1",
        f"learner.groups_per_step={groups}",
        "learner.micro_batch_tokens=65536",
        f"buffer.max_staleness={job.lag}",
        f"buffer.capacity={(job.lag + 2) * groups}",
        *METHODS[job.method],
        *extra,
    ]
    return load_config("configs/quickstart.yaml", overrides)


def run_job(job: Job) -> dict[str, Any]:
    """Runs the job and returns a record of it, its curve and its score."""
    import torch

    from benchmarks.studies.lag_lab import LagRun, arithmetic_task, timed

    torch.set_num_threads(1)
    rows, seconds = timed(LagRun(config_of(job), arithmetic_task(MODEL, ROWS), job.lag), EVAL_EVERY)
    held_out = [round(row["held_out"], 4) for row in rows]
    kept = {
        name: round(rows[-1][name], 5)
        for name in (
            "objective/kl_ref",
            "objective/ess_fraction",
            "objective/brake_share",
            "objective/importance_weight_mean",
        )
    }
    return {
        **asdict(job),
        "score": round(statistics.fmean(held_out[-TAIL:]), 4),
        "held_out": held_out,
        "seconds": round(seconds, 1),
        **kept,
    }


def run_knob(job: KnobJob) -> dict[str, Any]:
    """Runs the job and returns a record of it and its score."""
    import torch

    from benchmarks.studies.lag_lab import LagRun, arithmetic_task, timed

    torch.set_num_threads(1)
    overrides, _, fresh_groups = KNOBS[job.knob]
    config = config_of(Job(KNOB_METHOD, job.lag, KNOB_LR, job.seed, job.steps), *overrides)
    rows, seconds = timed(
        LagRun(config, arithmetic_task(MODEL, ROWS), job.lag, fresh_groups=fresh_groups), EVAL_EVERY
    )
    held_out = [round(row["held_out"], 4) for row in rows]
    return {
        **asdict(job),
        "score": round(statistics.fmean(held_out[-TAIL:]), 4),
        "held_out": held_out,
        "seconds": round(seconds, 1),
    }


def knob_jobs(steps: int) -> Iterator[KnobJob]:
    """Returns every point of KNOBS, whole seeds first."""
    for seed in SEEDS:
        for knob, (_, lags, _) in KNOBS.items():
            if seed in KNOB_SEEDS or lags == LAGS:
                yield from (KnobJob(knob, lag, seed, steps) for lag in lags)


def choice_jobs(steps: int) -> Iterator[Job]:
    """Returns the runs by which learning rates are chosen."""
    for method in METHODS:
        for lr in GRID:
            yield from (Job(method, lag, lr, CHOICE_SEED, steps) for lag in CHOICE_LAGS)


def chosen_rates(records: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the best rate of GRID for each method, by the mean score over CHOICE_LAGS on CHOICE_SEED."""
    rates = {}
    for method in METHODS:
        scores = {
            lr: [
                r["score"]
                for r in records
                if r["method"] == method and r["lr"] == lr and r["seed"] == CHOICE_SEED
            ]
            for lr in GRID
        }
        rates[method] = max(scores, key=lambda lr: statistics.fmean(scores[lr]) if scores[lr] else -1.0)
    return rates


def study_jobs(
    rates: dict[str, float], steps: int, lags: tuple[int, ...] = LAGS, seeds: tuple[int, ...] = SEEDS
) -> Iterator[Job]:
    """Returns every point of the study, whole seeds first, so that what is there is always balanced."""
    for seed in seeds:
        for lag in lags:
            yield from (Job(method, lag, rates[method], seed, steps) for method in METHODS)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns all runs so far."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def run_missing(jobs: Iterator[Any], path: Path, workers: int, run: Callable[[Any], dict[str, Any]]) -> None:
    """Runs those jobs (dataclasses) whose records `path` does not hold yet by `run`, `workers` at a time, and
    appends each record.
    """
    records = read_records(path)
    missing = [
        job
        for job in jobs
        if not any(asdict(job).items() <= record.items() for record in map(_hashable, records))
    ]
    if not missing:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a", encoding="utf-8") as file:
        for number, record in enumerate(pool.imap(run, missing), 1):
            file.write(json.dumps(record) + "\n")
            file.flush()
            left_s = (time.monotonic() - started) / number * (len(missing) - number)
            what = ", ".join(str(value) for value in asdict(missing[number - 1]).values())
            print(
                f"{number}/{len(missing)}  {what}: {record['score']:.3f}  ({left_s / 60:.0f} min left)",
                flush=True,
            )


def _hashable(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not isinstance(value, list)}


def table(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per method and lag: mean score, standard error over seeds, number of seeds."""
    rates = chosen_rates(records)
    rows = []
    for method in METHODS:
        for lag in LAGS:
            scores = [
                r["score"]
                for r in records
                if (r["method"], r["lag"], r["lr"]) == (method, lag, rates[method]) and r["seed"] in SEEDS
            ]
            if scores:
                rows.append({"method": method, "lag": lag, "lr": rates[method], **_mean_of(scores)})
    return rows


def shipped_rows(knobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows, as `table` does, for the knobs that ran at every lag."""
    rows = []
    for knob, (_, lags, _) in KNOBS.items():
        for lag in lags if lags == LAGS else ():
            if scores := [r["score"] for r in knobs if (r["knob"], r["lag"]) == (knob, lag)]:
                rows.append(
                    {
                        "method": f"{KNOB_METHOD.removesuffix('truncated')}{knob.removeprefix('weight ')}",
                        "lag": lag,
                        "lr": KNOB_LR,
                        **_mean_of(scores),
                    }
                )
    return rows


def _mean_of(scores: list[float]) -> dict[str, float]:
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return {
        "mean": round(statistics.fmean(scores), 4),
        "standard_error": round(error, 4),
        "seeds": len(scores),
    }


def write_knobs(records: list[dict[str, Any]], path: Path) -> None:
    """Writes one row per knob and lag."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["knob", "lag", "mean", "low", "high", "seeds"])
        for knob, (_, lags, _) in KNOBS.items():
            for lag in lags:
                scores = [r["score"] for r in records if (r["knob"], r["lag"]) == (knob, lag)]
                if scores:
                    writer.writerow(
                        [knob, lag, round(statistics.fmean(scores), 4), min(scores), max(scores), len(scores)]
                    )


def draw(records: list[dict[str, Any]], knobs: list[dict[str, Any]], out_dir: Path) -> None:
    """Draws staleness_study.csv and staleness_study.png in `out_dir`, and staleness_knobs.csv if there are
    any.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [*table(records), *shipped_rows(knobs)]
    if knobs:
        write_knobs(knobs, out_dir / "staleness_knobs.csv")
    with (out_dir / "staleness_study.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = plt.subplots(figsize=(10, 4.8), layout="constrained")
    base = statistics.fmean(r["held_out"][0] for r in records)
    axes.axhline(base, color="grey", linewidth=0.8, linestyle=":", label="base model")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [row for row in rows if row["method"] == method]
        places = [LAGS.index(row["lag"]) + 0.04 * (number - 3) for row in points]
        style = "--" if method.startswith("agro") else ":"
        if "truncated" in method:
            style = "-"
        cap = ", cap 1" if method.endswith("truncated") else ""
        label = f"{method}{cap} (lr {points[0]['lr']:g})"
        means, errors = [row["mean"] for row in points], [row["standard_error"] for row in points]
        axes.errorbar(
            places, means, yerr=errors, marker="o", markersize=4, capsize=2, linestyle=style, label=label
        )
    axes.set_xticks(range(len(LAGS)), [str(lag) for lag in LAGS])
    axes.set_xlabel("lag of every sample, learner steps")
    axes.set_ylabel(f"held-out solve rate, mean of the last {TAIL} evaluations")
    seeds = max(row["seeds"] for row in rows)
    axes.set_title(
        f"Sums, 0.1 M parameters, {records[-1]['steps']} steps, {seeds} seeds, bars: standard error",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(out_dir / "staleness_study.png", dpi=120)


def main() -> None:
    """Runs the command named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help=f"default: {OUT}; needed with --reduced")
    parser.add_argument("--reduced", action="store_true", help="few steps, two lags, one seed")
    arguments = parser.parse_args()
    if arguments.reduced and arguments.out is None:
        parser.error("--reduced needs --out: its short runs do not belong among the study's")
    out_dir = arguments.out or OUT
    path = out_dir / "staleness_runs.jsonl"
    if arguments.what == "run":
        if not Path(MODEL).exists():
            from recipes.arithmetic import make_small_base

            make_small_base(MODEL)
        steps = 20 if arguments.reduced else STEPS
        run_missing(choice_jobs(steps), path, arguments.workers, run_job)
        rates = chosen_rates(read_records(path))
        lags, seeds = ((0, 16), SEEDS[:1]) if arguments.reduced else (LAGS, SEEDS)
        run_missing(study_jobs(rates, steps, lags, seeds), path, arguments.workers, run_job)
        if not arguments.reduced:
            run_missing(knob_jobs(steps), out_dir / "knob_runs.jsonl", arguments.workers, run_knob)
    draw(read_records(path), read_records(out_dir / "knob_runs.jsonl"), out_dir)


if __name__ == "__main__":
    main()
