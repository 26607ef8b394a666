"""Decides how a reward function is called: by name, with what it names of `prompts`, `completions` and the
dataset's columns.

    (prompts, completions, **columns)      gets everything
    (completions, **kwargs)                gets everything
    (completions, solution, **kwargs)      needs the column
    (completions, target=None)             gets the column where there is one
    (*, completions, answer)               gets these two
    (p, c, **columns)                      is an abbreviation, in this order

A parameter without default that is neither `prompts` nor `completions` must be a column of the dataset: a run
checks `Signature.columns` before it starts.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

from core.errors import RewardError

BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
TEXTS = ("prompts", "completions")
OWN = ("num_tokens", "environments")
"""What a function gets of the completions themselves, by name: how many tokens of each were sampled, and the
public attributes of the environment that each was said to.
"""
REMEDY = (
    "A reward function takes by name what it needs of prompts, completions and the dataset's columns: "
    "(completions, answer, **columns)."
)


class Signature(NamedTuple):
    """What a function takes, as `read_signature` found it.

    positional  what it gets by position, in order: names of TEXTS or of columns
    named       what it gets by keyword, where that exists
    columns     the columns without which it cannot be called
    own         the names of OWN without which it cannot be called
    takes_all   whether it ends in **columns
    bound       what a functools.partial has given it already
    """

    positional: tuple[str, ...]
    named: tuple[str, ...]
    columns: tuple[str, ...]
    takes_all: bool
    bound: frozenset[str] = frozenset()
    own: tuple[str, ...] = ()

    def arguments(self, given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Returns positional and keyword arguments out of `given`, which holds TEXTS and columns by name."""
        # A positional parameter that is not given has a default; nothing behind it can go by position.
        count = next(
            (index for index, name in enumerate(self.positional) if name not in given), len(self.positional)
        )
        names = given.keys() - set(self.positional) if self.takes_all else given.keys() & set(self.named)
        names -= self.bound
        return [given[name] for name in self.positional[:count]], {
            name: given[name] for name in given if name in names
        }


def read_signature(name: str, function: Any) -> Signature:
    """Returns how `function`, configured as `name`, is called. Raises RewardError when it cannot be."""
    if not callable(function):
        raise RewardError(f"reward function {name!r} is a {type(function).__name__}, which cannot be called.")
    if inspect.isclass(function):
        raise RewardError(
            f"reward function {name!r} is a class; name a function, or an object of it: `judge "
            f"= {function.__name__}()`."
        )
    if _is(function, inspect.isasyncgenfunction):
        raise RewardError(
            f"reward function {name!r} is an asynchronous generator; return a list instead of yielding."
        )
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError):  # Written in C without a signature: called in the protocol's order.
        return Signature(TEXTS, (), (), takes_all=True)
    kinds = {parameter.kind for parameter in parameters}
    takes_all, takes_rest = Parameter.VAR_KEYWORD in kinds, Parameter.VAR_POSITIONAL in kinds
    parameters = [
        parameter
        for parameter in parameters
        if parameter.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    ]
    positional, rest = _by_position(parameters)
    if (
        "completions" not in positional
        and "completions" not in {parameter.name for parameter in rest}
        and not takes_all
    ):
        if not (takes_rest and not parameters):
            raise RewardError(
                f"reward function {name!r} has the signature {_shown(parameters)}; it does not "
                f"take `completions`. {REMEDY}"
            )
        positional = TEXTS
    is_needed = {parameter.name: parameter.default is Parameter.empty for parameter in parameters}
    names = (*positional, *(parameter.name for parameter in rest))
    columns = tuple(column for column in names if column not in (*TEXTS, *OWN) and is_needed[column])
    bound = frozenset(function.keywords) if isinstance(function, functools.partial) else frozenset[str]()
    own = tuple(column for column in names if column in OWN and is_needed[column])
    return Signature(positional, tuple(parameter.name for parameter in rest), columns, takes_all, bound, own)


def takes_messages(function: Callable[..., Any]) -> bool:
    """Returns whether the annotation of `completions` says that they are lists of messages, as open-r1's
    rewards have it.
    """
    try:
        annotations = {parameter.name: str(parameter.annotation) for parameter in _parameters(function)}
    except (TypeError, ValueError):
        return False
    return re.search(r"\bdict\b|Dict\[|Message", annotations.get("completions", "")) is not None


def _by_position(parameters: Sequence[Parameter]) -> tuple[tuple[str, ...], list[Parameter]]:
    """Returns what is given by position, and the parameters that are given by name."""
    positional = [parameter for parameter in parameters if parameter.kind is Parameter.POSITIONAL_ONLY]
    rest = [parameter for parameter in parameters if parameter.kind in BY_NAME]
    names = [parameter.name for parameter in parameters]
    can_be_ordered = len(parameters) >= 2 and parameters[1].kind is not Parameter.KEYWORD_ONLY
    if can_be_ordered and not set(names) & set(TEXTS) and all(map(_abbreviates, names, TEXTS)):
        return (*TEXTS, *names[2 : len(positional)]), [
            parameter for parameter in rest if parameter.name not in names[:2]
        ]
    return tuple(parameter.name for parameter in positional), rest


def _abbreviates(name: str, word: str) -> bool:
    """Returns whether a parameter's name is a short form of `word`, or says that it is not used (a leading
    underscore).
    """
    return name.startswith("_") or (len(name) <= 4 and word.startswith(name))


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Returns the parameters that can be given; a wrapper that passes everything on has those of the function
    it wraps.
    """
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    if all(parameter.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL) for parameter in parameters):
        return list(inspect.signature(function).parameters.values())
    return parameters


def is_asynchronous(function: Any) -> bool:
    """Returns whether the function, or the object's `__call__`, is written `async def`."""
    return _is(function, inspect.iscoroutinefunction)


def _is(function: Any, check: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return check(function) or check(getattr(function, "__call__", None))  # noqa: B004 - the method itself


def _shown(parameters: Sequence[Parameter]) -> str:
    return str(inspect.Signature(list(parameters)))
