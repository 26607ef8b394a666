"""The staleness study on completions of 256 tokens, with noise between the engine's and the learner's
log-probs.

    python -m benchmarks.studies.long_sequences run [--workers 2]    every missing run, then draw
    python -m benchmarks.studies.long_sequences draw                 long_sequences.csv and .png from what is there

Task: continue a count, d, d+1, d+2, ... modulo 10; the reward is the share of right steps, half of them right
for the base. A change of 0.05 nats a token is 13 nats over the sequence: a ratio of sequences nearly vanishes
where one of tokens does not. The noise stands for kernels that differ: normal, independent, so many nats a
token, on the behaviour log-probs only.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.staleness_study import read_records, run_missing
from learner.catalogue import load_config

MODEL = ".cache/counting-base"
LENGTH = 256
STEPS = 80
EVAL_EVERY = 20
SEEDS = (1, 2)
LR = 3e-4
WEIGHTS = ("none", "truncated, cap 1", "truncated, cap 5", "geometric, cap 1", "token, cap 1", "token, cap 5")
CONDITIONS = ((0, 0.0), (16, 0.05))
"""Lag in learner steps, noise in nats a token."""


@dataclass(frozen=True)
class LongJob:
    """One run of the study."""

    weight: str
    lag: int
    noise: float
    seed: int
    steps: int


def jobs(steps: int = STEPS) -> Iterator[LongJob]:
    """Returns every point of the study, whole seeds first."""
    for seed in SEEDS:
        for lag, noise in CONDITIONS:
            yield from (LongJob(weight, lag, noise, seed, steps) for weight in weights_at(lag))


def weights_at(lag: int) -> tuple[str, ...]:
    """Returns the weights compared at this lag.

    At lag 0 without noise pi is mu, and every weight is 1: one curve stands for all.
    """
    return WEIGHTS if lag else WEIGHTS[:1]


def make_counting_base(out_dir: str) -> None:
    """Makes a one-layer Llama that counts on with probability a half, else says any digit."""
    import torch

    from recipes.arithmetic import make_llama, make_tokenizer

    torch.set_num_threads(1)
    rng, tokenizer = random.Random(0), make_tokenizer()
    first = tokenizer.get_vocab()["0"]
    model = make_llama(len(tokenizer), hidden=32, layers=1)
    model.config.max_position_embeddings = 2 * LENGTH
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        rows = []
        for _ in range(64):
            row = [rng.randrange(10)]
            while len(row) < 64:
                # Right half the time.
                row.append((row[-1] + 1) % 10 if rng.random() < 4 / 9 else rng.randrange(10))
            rows.append([first + digit for digit in row])
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def run_job(job: LongJob) -> dict[str, Any]:
    """Runs the job and returns a record of it, its curve and its score."""
    import torch

    from benchmarks.studies.lag_lab import LagRun, Task, timed

    torch.set_num_threads(1)
    first = 3  # The id of "0" (recipes/arithmetic.py).

    def share_of_right_steps(tokens: Any, row: dict[str, Any]) -> float:
        digits = [row["ids"][-1] - first, *(token - first for token in tokens)]
        return sum(
            0 <= after < 10 and after == (before + 1) % 10 for before, after in itertools.pairwise(digits)
        ) / len(tokens)

    prompts = [{"ids": [first + a, first + b]} for a in range(10) for b in range(10)]
    random.Random(0).shuffle(prompts)
    overrides = [
        f"run.steps={job.steps}",
        f"run.seed={job.seed}",
        f"model.path={MODEL}",
        f"learner.lr={LR:.1e}",
        "learner.schedule=[10,constant]",
        "learner.groups_per_step=8",
        "weights.publish_every=1",
        "learner.micro_batch_tokens=65536",
        f"actors.max_new_tokens={LENGTH}",
        f"buffer.max_staleness={job.lag}",
        f"buffer.capacity={(job.lag + 2) * 8}",
        "objective.beta=0.001",
        f"objective.importance_weight={job.weight.partition(',')[0]}",
        f"objective.importance_cap={job.weight.partition('cap ')[2] or 1}.0",
        "eval.sampling=[1,1.0]",
    ]
    task = Task(prompts[20:], prompts[:20], share_of_right_steps, None)
    rows, seconds = timed(
        LagRun(load_config("configs/quickstart.yaml", overrides), task, job.lag, engine_noise=job.noise),
        EVAL_EVERY,
    )
    held_out = [round(row["held_out"], 4) for row in rows]
    seen = {
        name: round(rows[-1][name], 6)
        for name in ("objective/importance_weight_mean", "objective/ess_fraction", "objective/kl_ref")
    }
    return {
        **asdict(job),
        "score": round(statistics.fmean(held_out[-2:]), 4),
        "held_out": held_out,
        "seconds": round(seconds, 1),
        **seen,
    }


def draw(records: list[dict[str, Any]], out_dir: Path) -> None:
    """Draws long_sequences.csv and long_sequences.png in `out_dir`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    figure, panels = plt.subplots(1, len(CONDITIONS), figsize=(10, 3.8), layout="constrained", sharey=True)
    for axes, (lag, noise) in zip(panels, CONDITIONS, strict=True):
        for weight in weights_at(lag):
            found = [r for r in records if (r["weight"], r["lag"], r["noise"]) == (weight, lag, noise)]
            if not found:
                continue
            curves = list(zip(*(r["held_out"] for r in found), strict=True))
            steps = [EVAL_EVERY * index for index in range(len(curves))]
            (line,) = axes.plot(steps, [statistics.fmean(values) for values in curves], label=weight)
            axes.fill_between(
                steps, [min(v) for v in curves], [max(v) for v in curves], alpha=0.15, color=line.get_color()
            )
            mean_of = {
                key: statistics.fmean(r[key] for r in found)
                for key in ("score", "objective/importance_weight_mean", "objective/ess_fraction")
            }
            rows.append(
                {
                    "weight": weight,
                    "lag": lag,
                    "noise": noise,
                    "seeds": len(found),
                    **{k: round(v, 5) for k, v in mean_of.items()},
                }
            )
        axes.set(title=f"lag {lag}, noise {noise:g} nats a token", xlabel="learner steps")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of right steps, held-out")
    panels[1].legend(title="objective.importance_weight", fontsize=8)
    figure.suptitle(f"Completions of {LENGTH} tokens: mean and range of {len(SEEDS)} seeds", fontsize=10)
    figure.savefig(out_dir / "long_sequences.png", dpi=110)
    with (out_dir / "long_sequences.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Runs the command named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    path = arguments.out / "long_runs.jsonl"
    if arguments.what == "run":
        if not Path(MODEL).exists():
            make_counting_base(MODEL)
        run_missing(jobs(), path, arguments.workers, run_job)
    draw(read_records(path), arguments.out)


if __name__ == "__main__":
    main()
