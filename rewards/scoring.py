"""Scoring one group: every function called, every value checked. Pure; runs inside the workers of `rewards.pool`.

A failure is never reward 0. A function that raises, or returns the wrong number of values or something that is no finite
number, makes the samples it concerns errors, whatever the other functions say.
"""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rewards.registry import WeightedReward

MAX_ERROR_CHARS = 400


class Scored(msgspec.Struct, frozen=True):
    """The reward of one completion: a finite weighted sum, or None and the reason in `error`. Exactly one of the two is set.

    `answer` is what votes as the completion's answer, by the first function that can tell; None: nothing, or it failed.
    """

    reward: float | None = None
    error: str | None = None
    answer: str | None = None


def score_group(functions: Sequence[WeightedReward], prompt: str, completions: Sequence[str], columns: Mapping[str, Any]) -> list[Scored]:
    """One Scored per completion of `prompt`: sum over functions of weight times value. Never raises for what a function does.

    columns  the dataset row; each value is repeated per completion
    """
    values_per_function = [_call(reward, prompt, list(completions), columns) for reward in functions]
    read_answer = next((reward.answer for reward in functions if reward.answer is not None), lambda completion: None)
    scored = []
    for completion, *values in zip(completions, *values_per_function, strict=True):
        errors = [value for value in values if isinstance(value, str)]
        if errors:
            scored.append(Scored(error=shorten("; ".join(errors))))
            continue
        total = math.fsum(reward.weight * value for reward, value in zip(functions, values, strict=True))
        if math.isfinite(total):
            scored.append(Scored(total, answer=_answer(read_answer, completion)))
        else:
            scored.append(Scored(error=f"the weighted sum of {_names(functions)} is {total}"))
    return scored


def shorten(text: str) -> str:
    """`text` cut to MAX_ERROR_CHARS characters, with an ellipsis where it was cut."""
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."


def _call(reward: WeightedReward, prompt: str, completions: list[str], columns: Mapping[str, Any]) -> list[float | str]:
    """One entry per completion: its value, or the reason why it has none."""
    num = len(completions)
    try:
        values = reward.function([prompt] * num, list(completions), **{name: [value] * num for name, value in columns.items()})
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything; the error goes into the record
        return [_describe(reward.name, error)] * num
    if not isinstance(values, list | tuple):
        return [f"{reward.name} returned {type(values).__name__}, expected a list of {num} numbers"] * num
    if len(values) != num:
        return [f"{reward.name} returned {len(values)} values for {num} completions"] * num
    return [_checked(reward.name, value) for value in values]


def _answer(read_answer: Callable[[str], Any], completion: str) -> str | None:
    try:
        answer = read_answer(completion)
        return answer if isinstance(answer, str) and answer.encode() is not None else None
    except (Exception, SystemExit):  # noqa: BLE001 - the user's code may raise anything; without an answer there is no vote
        return None


def _checked(name: str, value: Any) -> float | str:
    if value is None:
        return f"{name} returned None (could not score)"
    if not isinstance(value, numbers.Real):
        return f"{name} returned a {type(value).__name__}, expected a number"
    try:
        number = float(value)
    except OverflowError:
        return f"{name} returned a number beyond the range of floats"
    return number if math.isfinite(number) else f"{name} returned {number}"


def _describe(name: str, error: BaseException) -> str:
    """`name raised ValueError: message (file.py:12 in function)`: the last lines of the traceback, on one."""
    message = " ".join(traceback.format_exception_only(error)[-1].split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{name} raised {message[: MAX_ERROR_CHARS - 100]}{where}"


def _names(functions: Sequence[WeightedReward]) -> str:
    return ", ".join(reward.name for reward in functions)
