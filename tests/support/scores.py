"""Scores of functions, as a group gets them, and rows of a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewards.registry import WeightedReward
from rewards.scoring import score_group


def constant(values):
    return lambda prompts, completions, **columns: values


def score(*functions, completions=("a", "b"), columns=None):
    rewards = [
        WeightedReward(f"f{index}", weight, function) for index, (function, weight) in enumerate(functions)
    ]
    return score_group(rewards, "question", list(completions), columns or {})


GIVEN = {"prompts": ["question"] * 2, "completions": ["a", "b"], "answer": ["72"] * 2, "solution": ["7"] * 2}


def write_rows(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
