"""Turns the name in a config into a reward function."""

from __future__ import annotations

import difflib
import functools
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgspec

from core.errors import RewardError
from core.users.code import find
from rewards.signature import Signature, read_signature

RewardCallable: TypeAlias = Callable[..., list[float | None]]

MESSAGES = "messages"
"""Behind the `?` of a name, says that a function takes lists of messages."""
BUILTINS = {
    "exact_match": "rewards.exact_match:exact_match",
    "math_verify": "rewards.math:math_verify",
    "overlong": "rewards.overlong:Overlong",
    "python_tests": "rewards.python_tests:PythonTests",
    "reasoning_gym": "rewards.reasoning_gym:reasoning_gym",
}
"""What the built-in names mean: a function, or a msgspec Struct whose fields are the parameters behind `?`
and whose objects are called as functions are.
"""
INSTANT = ("exact_match", "overlong")
"""Those of BUILTINS that compare or count and can neither hang nor take memory: they are called where they
are asked for, since a message to a worker and back costs fifty times as much.
"""
ELSEWHERE = ("environment", "reward_model")
"""What gives rewards and is no function in a worker: the environment's own reward, and hosted models
(`reward_model:PATH`). Their values join the sum in actors/scoring.py.
"""


class RewardName(NamedTuple):
    """A name of `rewards.functions`, read: `overlong?from=192&to=256` is `overlong` with two parameters."""

    plain: str
    parameters: Mapping[str, str] = {}
    messages: bool = False

    @property
    def is_builtin(self) -> bool:
        """Returns whether the function is one of BUILTINS."""
        return self.plain in BUILTINS

    @property
    def is_instant(self) -> bool:
        """Returns whether the function needs no worker process: it is one of INSTANT."""
        return self.plain in INSTANT

    @property
    def is_local(self) -> bool:
        """Returns whether it is a function that is loaded and called, in a worker process or here."""
        return self.plain not in ELSEWHERE and not self.plain.startswith(f"{ELSEWHERE[1]}:")


def read_name(name: str) -> RewardName:
    """Returns what a name in a config says. Raises RewardError where what follows the `?` cannot be read."""
    plain, _, query = name.partition("?")
    parameters = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if key in parameters or not key or (not equals and key != MESSAGES):
            raise RewardError(
                f"reward function {name!r}: {part!r} behind the ? is no parameter; expected NAME=VALUE, each "
                f"name once and joined by &, or {MESSAGES}"
            )
        parameters[key] = urllib.parse.unquote(value)
    if plain == ELSEWHERE[0] and parameters:
        raise RewardError(f"reward function {name!r}: the environment's own reward takes no parameters")
    return RewardName(plain, parameters, parameters.pop(MESSAGES, None) is not None)


@dataclass(frozen=True)
class WeightedReward:
    """A loaded function with the name it was asked for by and its weight in the sum; worker processes
    call it (rewards/workers/), or the pool itself where it is one of INSTANT.

    `messages` says that the function gets lists of messages instead of texts.
    """

    name: str
    weight: float
    function: RewardCallable
    messages: bool = False

    @functools.cached_property
    def signature(self) -> Signature:
        """Returns how the function is called. Raises RewardError when it cannot be."""
        return read_signature(self.name, self.function)

    @property
    def answer(self) -> Callable[[str], str | None] | None:
        """Returns the function that reads a completion's answer, if this reward offers one."""
        found = getattr(self.function, "answer", None)
        return found if callable(found) else None


def load_reward(name: str) -> RewardCallable:
    """Returns the function that `name` means: a built-in name with its parameters, or `module:function` on
    the path or in the working directory, with `?messages` behind it or not.

    Raises RewardError for an unknown name (it tells the nearest built-in), for parameters that a function
    does not take, for a module that does not import (with its error), and for a function that is missing,
    cannot be called, or takes no completions.
    """
    read = read_name(name)
    path = BUILTINS.get(read.plain, read.plain)
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        near = difflib.get_close_matches(read.plain, BUILTINS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"built in: {', '.join(BUILTINS)}."
        raise RewardError(
            f"reward function {name!r} is not known; {hint} Your own function is written module:function."
        )
    function = find(f"reward function {name!r}", path, RewardError)
    if read.is_builtin:
        function = _with_parameters(name, function, read.parameters)
    elif read.parameters:
        raise RewardError(
            f"reward function {name!r}: parameters behind the ? go to built-in functions only; give yours in its "
            f"module, mine = functools.partial({function_name}, {next(iter(read.parameters))}=...), and name mine"
        )
    read_signature(name, function)
    return function


def _with_parameters(name: str, function: Any, parameters: Mapping[str, str]) -> Any:
    """Returns a built-in function, made with its parameters where it takes any."""
    if isinstance(function, type) and issubclass(function, msgspec.Struct):
        try:
            return msgspec.convert(parameters, function, strict=False)
        except msgspec.ValidationError as error:
            known = "&".join(
                f"{field.encode_name}=" + ("..." if field.required else str(field.default))
                for field in msgspec.structs.fields(function)
            )
            plain = name.partition("?")[0]
            raise RewardError(f"reward function {name!r}: {error}; expected {plain}?{known}") from None
    if parameters:
        raise RewardError(
            f"reward function {name!r}: {name.partition('?')[0]} takes no parameter {next(iter(parameters))!r}, nor any other"
        )
    return function
