"""What tests of the monitor share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.config import Config
from core.evaluation.records import Evaluation
from tests.support.configs import make_config


def monitored(steps: int = 10, name: str = "unit", **sections: Any) -> Config:
    return make_config(run={"name": name, "steps": steps}, **sections)


def evaluation(version: int, solve_rate: float) -> Evaluation:
    return Evaluation(
        suite="held_out",
        policy_version=version,
        solve_rate=solve_rate,
        num_problems=4,
        num_samples=8,
        num_errors=0,
        metrics={"avg@2": solve_rate, "avg@2_standard_error": 0.1},
    )


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s
