"""The simplest reward: the completion is the answer."""

from __future__ import annotations

from typing import Any


def exact_match(prompts: list[str], completions: list[str], *, answer: list[Any], **columns: list[Any]) -> list[float | None]:
    """1.0 where the completion, stripped, equals the row's `answer`, stripped; else 0.0. Answers that are no text are compared as `str`."""
    return [float(completion.strip() == str(gold).strip()) for completion, gold in zip(completions, answer, strict=True)]


exact_match.answer = str.strip  # type: ignore[attr-defined]
