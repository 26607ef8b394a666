"""Scores of functions, as a group gets them, and rows of a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewards.registry import WeightedReward
from rewards.scoring import CallFailed, Completions, Scored, Summand, call, joined, read_answers


def constant(values):
    return lambda prompts, completions, **columns: values


def score_group(functions, prompt, completions, columns) -> list[Scored]:
    """What a worker and the pool make of a group, in this process."""
    given, parts, votes = Completions(prompt, completions, columns), [], None
    for reward in functions:
        try:
            values = call(reward, given)
        except CallFailed as error:
            values = [str(error)] * len(completions)
        parts.append(Summand(reward.name, reward.weight, values))
        if votes is None and reward.answer is not None:
            votes = read_answers(reward, given)
    return joined(parts, len(completions), votes)


def score(*functions, completions=("a", "b"), columns=None):
    rewards = [
        WeightedReward(f"f{index}", weight, function) for index, (function, weight) in enumerate(functions)
    ]
    return score_group(rewards, "question", list(completions), columns or {})


GIVEN = {"prompts": ["question"] * 2, "completions": ["a", "b"], "answer": ["72"] * 2, "solution": ["7"] * 2}


def write_rows(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
