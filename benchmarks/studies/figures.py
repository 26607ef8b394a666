"""Draws the paper's language-model figures on the tiny model, by the real system: Ray, vLLM, the buffer and
ZeRO-3.

    python -m benchmarks.studies.figures run  [--only NAME ...]   every missing run (about 40 minutes), then draw
    python -m benchmarks.studies.figures draw                     lm_*.csv and lm_*.png in docs/figures

    figures 2, 3   training and held-out reward, on-policy data: policy gradient, off- and on-policy AGRO
    figure 4       held-out reward against KL from the reference: on- and off-policy runs on one plot
    figure 5       offline data only (samples of the base): AGRO against regularised policy gradient

The offline data is sampled from the base model once, seeded; equal samples count once, as everywhere offline.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RUNS = Path("runs/figures")
OFFLINE = RUNS / "offline.jsonl"
SEEDS = (1, 2, 3)
MODEL = ".cache/arithmetic-small"
OFFLINE_SAMPLES = 16

COMMON = (
    f"model.path={MODEL}",
    "model.make=recipes.arithmetic:make_small_base",
    "learner.schedule=[10,constant]",
    "learner.lr=4e-4",
    "learner.groups_per_step=16",
    "eval.every=20",
)
ON_POLICY = (
    "run.steps=120",
    "weights.publish_every=1",
    "buffer.max_staleness=0",
    "buffer.capacity=16",
    "objective.importance_weight=none",
)
OFF_POLICY = (
    "run.steps=120",
    "weights.publish_every=4",
    "buffer.max_staleness=16",
    "buffer.capacity=128",
    "objective.importance_weight=truncated",
    "objective.importance_cap=5.0",
)
FROM_FILE = (
    "run.steps=160",
    "eval.every=20",
    "weights.publish_every=10",
    "actors.count=1",
    f"data.offline={OFFLINE}",
    "data.path=null",
    "data.eval_path=configs/arithmetic/test.jsonl",
    "objective.importance_weight=none",
    "buffer.capacity=64",
)
METHODS: dict[str, tuple[str, ...]] = {
    "on-policy: kl_pg": (*ON_POLICY, "objective.name=kl_pg", "objective.beta=0.01"),
    "on-policy: AGRO": (*ON_POLICY, "objective.beta=0.01"),
    "on-policy: on-policy AGRO, on_policy_coef 0.02": (
        *ON_POLICY,
        "objective.beta=0.01",
        "objective.on_policy_coef=0.02",
    ),
    "off-policy: AGRO": (*OFF_POLICY, "objective.beta=0.01"),
    "offline: AGRO": (*FROM_FILE, "objective.beta=0.1"),
    "offline: kl_pg": (*FROM_FILE, "objective.name=kl_pg", "objective.beta=0.1"),
}


def run_dir(method: str, seed: int) -> Path:
    """Returns where the run lies."""
    name = "".join(c if c.isalnum() else "-" for c in method)
    return RUNS / f"{name}-{seed}"


def make_offline_rows() -> None:
    """Samples OFFLINE_SAMPLES completions of every training prompt from the base model, with rewards."""
    import torch

    from benchmarks.studies.lag_lab import PlainPolicy, arithmetic_task, sample
    from learner.catalogue import load_config

    config = load_config("configs/quickstart.yaml", [f"model.path={MODEL}"])
    task, policy = arithmetic_task(MODEL, "configs/arithmetic"), PlainPolicy(config, trained=False)
    prompts = [
        json.loads(line)["prompt"]
        for line in Path("configs/arithmetic/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [
        (prompt, row) for prompt, row in zip(prompts, task.train, strict=True) for _ in range(OFFLINE_SAMPLES)
    ]
    made = sample(
        policy.module, [row["ids"] for _, row in rows], 4, 1.0, task.eos_id, torch.Generator().manual_seed(0)
    )
    characters = "0123456789+="  # recipes/arithmetic.py: ids from 3 on
    OFFLINE.parent.mkdir(parents=True, exist_ok=True)
    with OFFLINE.open("w", encoding="utf-8") as file:
        for (prompt, row), (tokens, _) in zip(rows, made, strict=True):
            # Those cut short are left out of a log.
            if tokens[-1] == task.eos_id and min(tokens[:-1], default=0) >= 3:
                completion = "".join(characters[token - 3] for token in tokens[:-1])
                file.write(
                    json.dumps(
                        {"prompt": prompt, "completion": completion, "reward": task.score(tokens, row)}
                    )
                    + "\n"
                )


def run_missing(methods: Iterable[str]) -> None:
    """Runs each method and seed that has no summary yet, one after the other; whole seeds first."""
    methods = list(methods)
    for seed in SEEDS:
        for method in methods:
            directory = run_dir(method, seed)
            if (directory / "summary.json").exists():
                continue
            if directory.exists():
                directory.rename(f"{directory}.cut-short-{len(list(RUNS.glob(f'{directory.name}.cut*')))}")
            if not Path(MODEL).exists():
                subprocess.run(
                    [
                        sys.executable,
                        "-c",
                        f"from recipes.arithmetic import make_small_base as m; m({MODEL!r})",
                    ],
                    check=True,
                )
            if not OFFLINE.exists():
                make_offline_rows()
            overrides = [
                *COMMON,
                *METHODS[method],
                f"run.seed={seed}",
                f"run.dir={directory}",
                f"run.name={directory.name}",
            ]
            print(f"{method}, seed {seed}", flush=True)
            # The later of two wins.
            merged = {override.partition("=")[0]: override for override in overrides}
            subprocess.run(
                [sys.executable, "launch.py", "train", "configs/quickstart.yaml", *merged.values()],
                check=True,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "WANDB_MODE": "disabled"},
            )


def read_run(method: str, seed: int) -> dict[str, list[float]] | None:
    """Returns the curves of a finished run: steps with training reward and KL, versions with held-out reward.

    Returns None when the run is not there.
    """
    directory = run_dir(method, seed)
    if not (directory / "summary.json").exists():
        return None
    steps = [
        json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations = [
        json.loads(line)
        for line in (directory / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations.sort(key=lambda row: row["policy_version"])
    # The row of step s + 1 was measured before its update, on version s; a mean over some batches, since one
    # is noisy.
    kl = [row["objective/kl_policy"] for row in steps]
    return {
        "step": [row["progress/step"] for row in steps],
        "train": [row["reward/mean"] for row in steps],
        "version": [row["policy_version"] for row in evaluations],
        "held_out": [row["solve_rate"] for row in evaluations],
        "kl": [_near(kl, row["policy_version"]) if row["policy_version"] else 0.0 for row in evaluations],
        "staleness": [row["staleness/mean"] for row in steps],
    }


def _near(values: list[float], index: int, reach: int = 4) -> float:
    """Returns the mean of the values within `reach` of `index`."""
    near = [value for value in values[max(0, index - reach) : index + reach + 1] if value is not None]
    return sum(near) / len(near) if near else float("nan")


def draw(out_dir: Path) -> None:
    """Draws all figures whose runs are there."""
    import matplotlib

    matplotlib.use("Agg")
    runs = {method: [run for seed in SEEDS if (run := read_run(method, seed))] for method in METHODS}
    _draw_learning(out_dir, {m: found for m, found in runs.items() if m.startswith("on-policy") and found})
    _draw_kl(out_dir, {m: found for m, found in runs.items() if not m.startswith("offline") and found})
    _draw_offline(out_dir, {m: found for m, found in runs.items() if m.startswith("offline") and found})


def _draw_learning(out_dir: Path, runs: dict[str, list[dict[str, list[float]]]]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    rows = []
    for method, found in runs.items():
        label = method.removeprefix("on-policy: ")
        rows += _band(left, label, [(run["step"], _smooth(run["train"], 8)) for run in found], "train")
        rows += _band(right, label, [(run["version"], run["held_out"]) for run in found], "held_out")
    left.set(title="training reward (running mean of 8 steps)", xlabel="learner steps", ylabel="solve rate")
    right.set(title="held-out reward", xlabel="learner steps")
    figure.suptitle("On-policy data: mean of 3 seeds, band from the lowest to the highest", fontsize=10)
    _finish(figure, [left, right], out_dir / "lm_on_policy", rows)


def _draw_kl(out_dir: Path, runs: dict[str, list[dict[str, list[float]]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    rows = []
    for number, (method, found) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": f"C{number}", "markersize": 4, "linewidth": 0.8, "alpha": 0.7}
        style["marker"] = "o" if method.startswith("on") else "^"
        for index, run in enumerate(found):
            axes.plot(run["kl"], run["held_out"], label=method if index == 0 else None, **style)
            rows += [
                {"method": method, "run": index, "version": version, "kl": kl, "held_out": held_out}
                for version, kl, held_out in zip(run["version"], run["kl"], run["held_out"], strict=True)
            ]
    axes.set(
        xlabel="KL(policy, reference), nats",
        ylabel="held-out solve rate",
        title="Reward against KL: each line one run, a dot an evaluation",
    )
    _finish(figure, [axes], out_dir / "lm_reward_kl", rows)


def _draw_offline(out_dir: Path, runs: dict[str, list[dict[str, list[float]]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows = []
    for method, found in runs.items():
        rows += _band(
            axes,
            method.removeprefix("offline: "),
            [(run["version"], run["held_out"]) for run in found],
            "held_out",
        )
    axes.set(
        title="Only distinct samples of the base, beta 0.1: mean and range",
        xlabel="learner steps",
        ylabel="held-out solve rate",
    )
    _finish(figure, [axes], out_dir / "lm_offline", rows)


def _band(
    axes: Any, label: str, curves: list[tuple[list[float], list[float]]], what: str
) -> list[dict[str, Any]]:
    """Draws mean line and range over the runs, at the x they share, and returns the rows of the CSV."""
    shared = sorted(set.intersection(*(set(x) for x, _ in curves)))
    columns = [dict(zip(x, y, strict=True)) for x, y in curves]
    low, mean, high = (
        [how([column[x] for column in columns]) for x in shared]
        for how in (min, lambda v: sum(v) / len(v), max)
    )
    (line,) = axes.plot(shared, mean, label=f"{label} ({len(curves)} seeds)")
    axes.fill_between(shared, low, high, alpha=0.15, color=line.get_color())
    return [
        {
            "method": label,
            "curve": what,
            "step": x,
            "mean": round(m, 4),
            "low": round(lo, 4),
            "high": round(hi, 4),
        }
        for x, m, lo, hi in zip(shared, mean, low, high, strict=True)
    ]


def _smooth(values: list[float], width: int) -> list[float]:
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def _finish(figure: Any, panels: list[Any], path: Path, rows: list[dict[str, Any]]) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    if rows:
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    """Runs the command named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--only", nargs="*", help="names of methods; all without it", choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    if arguments.what == "run":
        run_missing(arguments.only or METHODS)
    draw(arguments.out)


if __name__ == "__main__":
    main()
