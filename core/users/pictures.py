"""A picture of an object's public attributes, taken in one process and looked at in another: reward functions
that read `environments[i].score`, as TRL's do, find the attributes that an environment had when its episode
was over.

    take(environment) --bytes--> actor, which never unpickles it --bytes--> show: Picture, in the reward worker

Each attribute is pickled by itself, so that one that cannot be costs itself alone.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import msgspec

MAX_BYTES = 2**20
"""An attribute that is larger, or goes beyond this with those before it, is left out."""


def take(pictured: object) -> bytes:
    """Returns the public attributes of the object, properties and class attributes among them, without its
    methods. What cannot be pickled, or is too large, is left out with the reason.
    """
    kept: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    num_bytes = 0
    for name in dir(pictured):
        if name.startswith("_"):
            continue
        try:
            value = getattr(pictured, name)
            if inspect.isroutine(value):
                continue
            packed = pickle.dumps(value)
        except Exception as error:  # noqa: BLE001 - a user's property or __reduce__ may raise anything
            left_out[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        if num_bytes + len(packed) > MAX_BYTES:
            left_out[name] = f"it takes {len(packed):,} bytes, and all together may take {MAX_BYTES:,}"
            continue
        num_bytes += len(packed)
        kept[name] = packed
    return msgspec.msgpack.encode((kept, left_out))


NOTHING = msgspec.msgpack.encode(({}, {}))
"""The picture of what has no attributes (yet)."""


def show(picture: bytes | None) -> Picture:
    """Returns the attributes that `take` packed; none where there is no picture, as of an episode that
    failed.
    """
    if picture is None:
        return Picture({}, {})
    kept, left_out = msgspec.msgpack.decode(picture, type=tuple[dict[str, bytes], dict[str, str]])
    return Picture(kept, left_out)


class Picture:
    """The attributes of an object elsewhere, to be read: `show(take(game)).score`.

    Reading one that is missing raises AttributeError, which says what is there, or why it is not.
    """

    def __init__(self, kept: dict[str, bytes], left_out: dict[str, str]) -> None:
        _set(self, "_kept", kept)
        _set(self, "_left_out", left_out)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._kept:
            value = pickle.loads(self._kept[name])
            _set(self, name, value)
            return value
        there = ", ".join(sorted(self._kept)) or "nothing"
        if name in self._left_out:
            raise AttributeError(f"the environment's {name!r} could not be sent here: {self._left_out[name]}")
        raise AttributeError(
            f"the environment's {name!r} is not here: a reward function sees its public attributes, and no methods; "
            f"keep what it needs in an attribute (when the episode was over, it had: {there})"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"this is a picture of an environment: {name!r} cannot be set")


_set: Callable[[object, str, Any], None] = object.__setattr__
