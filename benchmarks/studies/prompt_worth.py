"""Says what a run needed to solve a share of the held-out prompts: learner steps and generated tokens.

    python -m benchmarks.studies.prompt_worth RUN_DIR... > docs/figures/prompt_worth.jsonl

One evaluation scatters (400 samples: a standard error of 0.015), so that a share counts as reached at the
first version at which it and the evaluations before and after it have it on average. Tokens are those of all
groups that had come by then, left out or not, at the mean length of those trained.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

SHARE = 0.9


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def first_version(rates: list[tuple[int, float]], share: float) -> int | None:
    """Returns the first version at which three evaluations one after another have this mean; None: none."""
    for (before, now), (_, after) in zip(pairwise(rates), list(pairwise(rates))[1:], strict=False):
        if statistics.fmean((before[1], now[1], after[1])) >= share:
            return now[0]
    return None


def figures(run_dir: Path) -> dict[str, Any]:
    """Returns the settings of a run, its held-out solve rates, and what they had cost at SHARE."""
    rows = {int(row["progress/step"]): row for row in read_lines(run_dir / "metrics.jsonl")}
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    rates = [
        (each["policy_version"], each["solve_rate"]) for each in read_lines(run_dir / "evaluations.jsonl")
    ]
    found: dict[str, Any] = {
        "skip_equal_rewards": config["buffer"].get("skip_equal_rewards", False),
        "curriculum": config["data"].get("curriculum"),
        "seed": config["run"].get("seed", 0),
        "held_out": rates,
    }
    if (step := first_version(rates, SHARE)) is None:
        return found
    row = rows[step]
    length = statistics.fmean(rows[each]["completions/mean_length"] for each in rows if each <= step)
    num_samples = row["buffer/samples_total"]
    return found | {
        "steps": step,
        "generated_groups": row["buffer/inserted"],
        "generated_tokens": round(num_samples * length),
        "trained_tokens": row["progress/sampled_tokens"],
        "left_out": row.get("buffer/evicted_equal", 0.0),
        "passed_over": row.get("buffer/rested", 0.0),
        "resting": row.get("buffer/resting", 0.0),
    }


def main() -> None:
    """Prints the figures of each run, one JSON object a line."""
    for name in sys.argv[1:]:
        print(json.dumps(figures(Path(name))))


if __name__ == "__main__":
    main()
