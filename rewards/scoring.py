"""What one function says of the completions of one prompt, and what its values come to: every value is
checked. Pure; `call` runs inside the workers of `rewards.pool`, but for functions that need none.

    call, call_async --values: a number, None, or why there is none--> Summand per function --joined--> Scored

A failure is never reward 0. Where a function raises, or returns the wrong number of values or a value that is
no finite number, the samples concerned become errors, whatever the other functions say. None says that a
function does not apply (TRL's convention): it is left out of the sum where another function scored, and an
error where none did.
"""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec

from core.errors import RewardError
from core.sums import total
from core.users import pictures
from core.users.code import place_of
from rewards.registry import WeightedReward
from rewards.signature import OWN

MAX_ERROR_CHARS = 400
Value: TypeAlias = float | str | None
"""What a function says of a completion: a finite number, None (it does not apply), or text: why there is
none.
"""


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


class Completions(NamedTuple):
    """The completions of one prompt, as functions get them.

    columns  the dataset row; each value is repeated per completion
    own      by name what belongs to each completion (signature.OWN): `num_tokens`; `environments`, as
             `core.users.pictures` packs them; `messages`, what was said after the prompt by (role, text)
    asked    the prompt as messages, where the caller knows it; else the row's `prompt` or `question`
    """

    prompt: str
    texts: Sequence[str]
    columns: Mapping[str, Any]
    own: Mapping[str, Sequence[Any]] = {}
    asked: Sequence[Mapping[str, Any]] = ()

    def chosen(self, places: Sequence[int]) -> Completions:
        """Returns the completions at these places alone."""
        if len(places) == len(self.texts):
            return self
        own = {name: [values[place] for place in places] for name, values in self.own.items()}
        return self._replace(texts=[self.texts[place] for place in places], own=own)


class Summand(NamedTuple):
    """What one source of rewards says: a value per completion, to be multiplied by `weight`. `remedy` is what
    helps where it returned None and nothing else scored.
    """

    name: str
    weight: float
    values: Sequence[Value]
    remedy: str = ""


class CallFailed(RewardError):
    """A function raised; the text says what, and where."""


def joined(
    parts: Sequence[Summand], num_completions: int, answers: Sequence[str | None] | None = None
) -> list[Scored]:
    """Returns one Scored per completion: the sum over the parts of weight times value.

    A part whose value is None is left out of the sum where another has one. `answers` are the completions'
    votes.
    """
    votes = answers or [None] * num_completions
    return [
        _sum([(part, part.values[place]) for part in parts], votes[place]) for place in range(num_completions)
    ]


def _sum(terms: Sequence[tuple[Summand, Value]], answer: str | None) -> Scored:
    errors = [value for _, value in terms if isinstance(value, str)]
    given = [(part, value) for part, value in terms if value is not None and not isinstance(value, str)]
    if not errors and not given:
        errors = [_could_not_score(part) for part, _ in terms] or ["nothing scored it"]
    if errors:
        return Scored(error=shorten("; ".join(errors)))
    reward = total([part.weight * value for part, value in given])
    if math.isfinite(reward):
        return Scored(reward, answer=answer)
    names = ", ".join(part.name for part, _ in given)
    products = ", ".join(f"{part.weight:g} * {value:g}" for part, value in given)
    return Scored(error=shorten(f"the weighted sum of {names} is {reward}: {products}"))


def _could_not_score(part: Summand) -> str:
    return f"{part.name} returned None (could not score)" + (f": {part.remedy}" if part.remedy else "")


def complete(future: Future[list[Scored]], num: int, find: Callable[[], list[Scored]]) -> None:
    """Completes a future of `num` values with what `find` returns, or with why it cannot tell: a callback's
    exception would leave the future open for ever.
    """
    try:
        found = find()
    except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for the future
        found = [Scored(error=shorten(f"the rewards cannot be added up: {_line(error)}"))] * num
    future.set_result(found)


def call(reward: WeightedReward, completions: Completions) -> list[Value]:
    """Returns a plain function's value of each completion. Raises CallFailed for what it raises."""
    try:
        positional, named = _arguments(reward, completions)
        values = _as_list(reward.function(*positional, **named))
    except CallFailed:
        raise
    # Rust's panics (pyo3) and SystemExit are no Exceptions.
    except BaseException as error:  # noqa: BLE001 - the user's code; the error goes into the record
        raise CallFailed(describe(reward, error)) from None
    if inspect.iscoroutine(values):
        values.close()
        raise CallFailed(f"{reward.name} is asynchronous: it returned a coroutine; write `async def`")
    return _values(reward.name, values, len(completions.texts))


async def call_async(reward: WeightedReward, completions: Completions) -> list[Value]:
    """Returns an `async def` function's value of each completion. Raises CallFailed for what it raises."""
    try:
        positional, named = _arguments(reward, completions)
        awaited: Awaitable[Any] = reward.function(*positional, **named)  # type: ignore[assignment]
        values = _as_list(await awaited)
    except CallFailed:
        raise
    # Others than these two would not end the event loop: rewards/workers/event_loop.py takes them.
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - the user's code, as in `call`
        raise CallFailed(describe(reward, error)) from None
    return _values(reward.name, values, len(completions.texts))


def read_answers(reward: WeightedReward, completions: Completions) -> list[str | None]:
    """Returns what each completion votes for, None where the reward's `answer` cannot tell."""
    read_answer = reward.answer
    if read_answer is None:
        return [None] * len(completions.texts)
    return [_answer(read_answer, text) for text in completions.texts]


def shorten(text: str) -> str:
    """Returns `text` cut to MAX_ERROR_CHARS characters, with an ellipsis where it was cut."""
    text = text.encode(errors="replace").decode()  # Half a surrogate pair would end the worker that sends it.
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."


def _arguments(reward: WeightedReward, completions: Completions) -> tuple[list[Any], dict[str, Any]]:
    """Returns what the function is called with. Raises CallFailed where a needed column is missing."""
    columns, num = completions.columns, len(completions.texts)
    signature = reward.signature
    if missing := [column for column in signature.columns if column not in columns]:
        raise CallFailed(
            f"{reward.name} needs {_quoted(missing)}, which the row does not have (it has {_quoted(columns)})"
        )
    given = {name: [value] * num for name, value in columns.items()}
    given |= {name: list(completions.own[name]) for name in OWN if name in completions.own}
    if "environments" in given and "environments" in completions.own:
        given["environments"] = [pictures.show(picture) for picture in completions.own["environments"]]
    given |= {"prompts": [completions.prompt] * num, "completions": list(completions.texts)}
    if reward.messages:
        given |= _as_messages(completions)
    if missing := [name for name in signature.own if name not in given]:
        raise CallFailed(f"{reward.name} needs {_quoted(missing)}, and this run has none")
    return signature.arguments(given)


def _values(name: str, values: Any, num: int) -> list[Value]:
    """Returns one entry per completion of what a function returned: its value, or why it has none."""
    if not isinstance(values, list | tuple):
        return [f"{name} returned {_kind(values)}, expected a list of {num} numbers"] * num
    if len(values) != num:
        return [f"{name} returned {len(values)} values for {num} completions"] * num
    return [_checked(name, value) for value in values]


def _as_messages(completions: Completions) -> dict[str, list[Any]]:
    """Returns prompts and completions as TRL gives them where the prompts are conversations."""
    columns, num = completions.columns, len(completions.texts)
    source = next((columns[name] for name in ("prompt", "question") if name in columns), completions.prompt)
    messages = source if isinstance(source, list) else [{"role": "user", "content": source}]
    messages = list(completions.asked) or messages
    said = completions.own.get("messages") or [()] * num
    answers = [
        [{"role": role, "content": content} for role, content in turns or (("assistant", text),)]
        for turns, text in zip(said, completions.texts, strict=True)
    ]
    return {"prompts": [messages] * num, "completions": answers}


def _answer(read_answer: Callable[[str], Any], completion: str) -> str | None:
    try:
        answer = read_answer(completion)
        return answer if isinstance(answer, str) and answer.encode() is not None else None
    except BaseException:  # noqa: BLE001 - the user's code; without an answer there is no vote
        return None


def _as_list(values: Any) -> Any:
    """Returns an array or tensor of one dimension as a list, and anything else unchanged."""
    return values.tolist() if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist") else values


def _checked(name: str, value: Any) -> Value:
    """Returns the number that `value` is (also a scalar of numpy or torch, a Decimal or a Fraction), None as
    it is, else what is wrong with it. An exception among the values is the error of its completion.
    """
    if value is None:
        return None
    if isinstance(value, BaseException):
        return f"{name}: {_line(value)[: MAX_ERROR_CHARS - 100]}"
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


def describe(reward: WeightedReward, error: BaseException) -> str:
    """Returns `name raised ValueError: message (file.py:12 in function)`, the user's last line
    in the traceback.
    """
    message = _line(error)
    place = place_of(error, __file__)
    where = f" ({Path(place.filename).name}:{place.lineno} in {place.name})" if place else ""
    wants_messages = not reward.messages and "string indices must be integers" in message
    hint = ". It may want messages: write ?messages behind its name" if wants_messages else ""
    return f"{reward.name} raised {message[: MAX_ERROR_CHARS - 200]}{where}{hint}"


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())
