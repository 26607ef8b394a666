"""What is known of those that are gone, for as long as it may still matter."""

from __future__ import annotations

from typing import TypeVar

V = TypeVar("V")
MAX_GONE = 1000
"""Actors that are gone are known to so many: a call of one that went earlier is long over."""


class Newest(dict[str, V]):
    """A dict of names that forgets its oldest beyond `limit`: a run of months loses many actors.

    gone: Newest[str] = Newest(limit=1000)
    gone["actor-0"] = "now"                 # put again, a name is among the newest again
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, name: str, value: V) -> None:
        self.pop(name, None)
        super().__setitem__(name, value)
        if len(self) > self._limit:
            del self[next(iter(self))]
