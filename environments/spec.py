"""What an environment is, known before anything runs in it: `describe` asks a process of its own, since a
user's module is never imported by a driver or an actor.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Mapping
from typing import Any, BinaryIO, Literal, TypeAlias

import msgspec

from core import children
from core.errors import ConfigError
from core.text import key_of

DESCRIBE_TIMEOUT_S = 60.0

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
    if not paths:
        return {}
    child = children.start("environments.describing:serve")
    try:
        child.socket.sendall(msgspec.msgpack.encode(list(paths.items())))
        child.socket.shutdown(socket.SHUT_WR)
        with child.socket.makefile("rb") as answers:
            return {name: _described(name, path, child, answers) for name, path in paths.items()}
    finally:
        child.socket.close()
        children.kill(child.process)
        child.process.wait(1.0)


def _described(name: str, path: str, child: children.Child, answers: BinaryIO) -> EnvironmentSpec:
    """Returns what the process says of its next environment: one that dies, dies of it."""
    child.socket.settimeout(DESCRIBE_TIMEOUT_S)
    what = f"{key_of(name)} = {path}"
    try:
        found = msgspec.json.decode(answers.readline(), type=EnvironmentSpec | str)
    except TimeoutError:
        raise ConfigError(f"{what}: importing it did not end within {DESCRIBE_TIMEOUT_S:g} s") from None
    except (OSError, msgspec.MsgspecError):
        how = "it closed its connection"
        with contextlib.suppress(subprocess.TimeoutExpired):
            how = children.describe_exit(child.process.wait(1.0))
        raise ConfigError(f"{what}: the process that imported it died: {how}") from None
    if isinstance(found, str):
        raise ConfigError(found)
    return found
