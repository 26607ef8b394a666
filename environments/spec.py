"""What an environment is, known before anything runs in it: `describe` asks a process of its own, since a
user's module is never imported by a driver or an actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["turns", "tools", "harness"]


class EnvironmentSpec(msgspec.Struct, frozen=True):
    """What `describe` found behind a name of `environments`.

    name        the name in the config
    path        `module:Class` or `module:function`
    kind        turns: a class with `step(text)`; tools: a class whose public typed methods are the tools;
                harness: a function that calls the OpenAI API
    tools       the tools' JSON schemas, as a chat template takes them
    is_async    whether episodes share processes with an event loop
    has_reward  whether it may give a reward itself
    columns     the dataset's columns without which it cannot be reset
    """

    name: str
    path: str
    kind: Kind
    tools: tuple[dict[str, Any], ...] = ()
    is_async: bool = False
    has_reward: bool = False
    columns: tuple[str, ...] = ()


def describe(paths: Mapping[str, str]) -> dict[str, EnvironmentSpec]:
    """Returns what each environment is, by name. Raises ConfigError, in one line, when one cannot be loaded
    or is none.
    """
    raise NotImplementedError(f"processes that describe {sorted(paths)}")
