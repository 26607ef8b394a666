"""From the name in a config to a reward function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from cluster.errors import RewardError

RewardCallable: TypeAlias = Callable[..., list[float | None]]

BUILTINS = {"exact_match": "rewards.exact_match:exact_match", "math_verify": "rewards.math:math_verify"}


class WeightedReward(NamedTuple):
    """A loaded function, the name it was asked for by, and its weight in the sum."""

    name: str
    weight: float
    function: RewardCallable

    @property
    def answer(self) -> Callable[[str], str | None] | None:
        """What reads a completion's answer, if the function offers that."""
        found = getattr(self.function, "answer", None)
        return found if callable(found) else None


def load_reward(name: str) -> RewardCallable:
    """The function that `name` means: a built-in name or `module:function`.

    Raises RewardError: an unknown name (with the nearest built-in), a module that does not import (with its error), a
    function that is missing, cannot be called, is asynchronous, or does not take `(prompts, completions, **columns)`.
    """
    module_name, colon, function_name = BUILTINS.get(name, name).partition(":")
    if not colon or not module_name or not function_name:
        near = difflib.get_close_matches(name, BUILTINS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"built in: {', '.join(BUILTINS)}."
        raise RewardError(f"reward function {name!r} is not known; {hint} Your own function is written module:function.")
    module = _import(name, module_name)
    function = getattr(module, function_name, None)
    if function is None:
        near = difflib.get_close_matches(function_name, [found for found in vars(module) if not found.startswith("_")], n=1)
        raise RewardError(
            f"reward function {name!r}: module {module_name} has no {function_name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
        )
    _check_signature(name, function)
    return function


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise RewardError(
                f"reward function {name!r}: no module named {error.name!r}. "
                "It must be importable where the run starts: in the working directory, or installed."
            ) from None
        raise RewardError(f"reward function {name!r}: importing {module_name} needs a package that is not installed: {error}") from error
    except Exception as error:  # a user's module may raise anything while it is imported
        raise RewardError(f"reward function {name!r}: importing {module_name} raised {type(error).__name__}: {error}") from error


def _check_signature(name: str, function: Any) -> None:
    if not callable(function):
        raise RewardError(f"reward function {name!r} is a {type(function).__name__}, which cannot be called.")
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"reward function {name!r} is asynchronous; write a plain function (it runs in a process of its own).")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: nothing to check before the first call
        return
    takes_columns = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    try:
        signature.bind_partial([], [])
        takes_two = True
    except TypeError:
        takes_two = False
    if not (takes_two and takes_columns):
        raise RewardError(
            f"reward function {name!r} has the signature {signature}; it is called as function(prompts, completions, **columns) "
            "with every column of the dataset: let it end in **columns."
        )
