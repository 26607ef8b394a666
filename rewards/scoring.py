"""Scores one group: every function is called and every value is checked. Pure; runs inside the workers of
`rewards.pool`.

A failure is never reward 0. Where a function raises, or returns the wrong number of values or a value that is
no finite number, the samples concerned become errors, whatever the other functions say.
"""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rewards.registry import WeightedReward
from rewards.signature import read_signature

MAX_ERROR_CHARS = 400


class Scored(msgspec.Struct, frozen=True):
    """The reward of one completion: either a finite weighted sum in `reward`, or None and the reason in
    `error`.

        Scored(reward=1.0, answer="72")
        Scored(error="my_rewards:judge raised ValueError: no score (my_rewards.py:12 in judge)")

    `answer` is what the completion votes for, by the first function that can tell; None where none can, or
    where it failed.
    """

    reward: float | None = None
    error: str | None = None
    answer: str | None = None


def score_group(
    functions: Sequence[WeightedReward],
    prompt: str,
    completions: Sequence[str],
    columns: Mapping[str, Any],
    own: Mapping[str, Sequence[Any]] | None = None,
) -> list[Scored]:
    """Returns one Scored per completion of `prompt`: the sum over functions of weight times value.

    `columns` is the dataset row; each value is repeated per completion. `own` has by name what belongs to
    each completion (signature.OWN). Never raises for what a function does.
    """
    values_per_function = [
        _call(reward, prompt, list(completions), columns, own or {}) for reward in functions
    ]
    read_answer = next(
        (reward.answer for reward in functions if reward.answer is not None), lambda completion: None
    )
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
    """Returns `text` cut to MAX_ERROR_CHARS characters, with an ellipsis where it was cut."""
    text = text.encode(errors="replace").decode()  # Half a surrogate pair would end the worker that sends it.
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."


def _call(
    reward: WeightedReward,
    prompt: str,
    completions: list[str],
    columns: Mapping[str, Any],
    own: Mapping[str, Sequence[Any]],
) -> list[float | str]:
    """Returns one entry per completion: its value, or the reason why it has none."""
    num = len(completions)
    signature = read_signature(reward.name, reward.function)
    if missing := [column for column in signature.columns if column not in columns]:
        return [
            f"{reward.name} needs {_quoted(missing)}, which the row does not have (it has {_quoted(columns)})"
        ] * num
    given = {name: [value] * num for name, value in columns.items()}
    given |= {name: list(values) for name, values in own.items()}
    given |= {"prompts": [prompt] * num, "completions": list(completions)}
    if reward.messages:
        given |= _as_messages(prompt, completions, columns)
    positional, named = signature.arguments(given)
    try:
        values = _as_list(reward.function(*positional, **named))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code; the error goes into the record
        return [_describe(reward, error)] * num
    if inspect.iscoroutine(values):
        values.close()
        return [f"{reward.name} is asynchronous: it returned a coroutine; write a plain function"] * num
    if not isinstance(values, list | tuple):
        return [f"{reward.name} returned {_kind(values)}, expected a list of {num} numbers"] * num
    if len(values) != num:
        return [f"{reward.name} returned {len(values)} values for {num} completions"] * num
    return [_checked(reward.name, value) for value in values]


def _as_messages(prompt: str, completions: Sequence[str], columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns prompts and completions as TRL gives them where the prompts are conversations."""
    source = next((columns[name] for name in ("prompt", "question") if name in columns), prompt)
    messages = source if isinstance(source, list) else [{"role": "user", "content": source}]
    answers = [[{"role": "assistant", "content": completion}] for completion in completions]
    return {"prompts": [messages] * len(completions), "completions": answers}


def _answer(read_answer: Callable[[str], Any], completion: str) -> str | None:
    try:
        answer = read_answer(completion)
        return answer if isinstance(answer, str) and answer.encode() is not None else None
    except (Exception, SystemExit):  # noqa: BLE001 - the user's code; without an answer there is no vote
        return None


def _as_list(values: Any) -> Any:
    """Returns an array or tensor of one dimension as a list, and anything else unchanged."""
    return values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values


def _checked(name: str, value: Any) -> float | str:
    """Returns the number that `value` is (also a scalar of numpy or torch, a Decimal or a Fraction), else
    what is wrong with it.
    """
    if value is None:
        return f"{name} returned None (could not score)"
    is_text = isinstance(value, str | bytes | bytearray)
    # numpy's become floats, half of them.
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if is_text or is_complex or not hasattr(type(value), "__float__") or tuple(getattr(value, "shape", ())):
        return f"{name} returned a {_kind(value)}, expected a number"
    try:
        number = float(value)
    except OverflowError:
        return f"{name} returned a number beyond the range of floats"
    # Raised by a symbol of sympy's, a signalling NaN, a tensor without data.
    except (TypeError, ValueError, RuntimeError):
        return f"{name} returned a {_kind(value)}, expected a number"
    return number if math.isfinite(number) else f"{name} returned {number}"


def _kind(value: Any) -> str:
    shape = tuple(getattr(value, "shape", ()) or ())
    return f"{type(value).__name__} of shape {shape}" if shape else type(value).__name__


def _describe(reward: WeightedReward, error: BaseException) -> str:
    """Returns `name raised ValueError: message (file.py:12 in function)`, the end of the traceback in one
    line.
    """
    message = " ".join(traceback.format_exception_only(error)[-1].split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    wants_messages = not reward.messages and "string indices must be integers" in message
    hint = ". It may want messages: write ?messages behind its name" if wants_messages else ""
    return f"{reward.name} raised {message[: MAX_ERROR_CHARS - 200]}{where}{hint}"


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _names(functions: Sequence[WeightedReward]) -> str:
    return ", ".join(reward.name for reward in functions)
