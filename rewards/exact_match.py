"""The simplest reward: the completion is the answer."""

from __future__ import annotations

from typing import Any

from rewards.golds import gold_texts


def exact_match(
    prompts: list[str], completions: list[str], *, answer: list[Any], **columns: list[Any]
) -> list[float | None]:
    """Returns 1.0 where the stripped completion equals the row's stripped `answer`, else 0.0.

    Numbers are compared as they are written. Raises ValueError for an `answer` that is neither text nor a
    number.
    """
    return [
        float(completion.strip() in _gold(gold)) for completion, gold in zip(completions, answer, strict=True)
    ]


def _gold(gold: Any) -> tuple[str, ...]:
    try:
        return gold_texts(gold)
    except ValueError as error:
        raise ValueError(f"the gold answer {error}") from None


def _gold_problem(gold: Any) -> str | None:
    """Returns why `gold` cannot be compared with, or None when it can."""
    try:
        gold_texts(gold)
    except ValueError as error:
        return str(error)
    return None


exact_match.answer = str.strip  # type: ignore[attr-defined]
exact_match.gold_problem = _gold_problem  # type: ignore[attr-defined]
