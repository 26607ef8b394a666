"""An actor's outstanding calls to buffer and board, looked at between two engine steps and never waited for
there.

Ask      one call whose answer is looked for
Outbox   what must arrive: kept, and with it the claim on its work items, until the receiver has acknowledged it
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from buffer.store import DiskFullError
from core.calls import Calls
from core.errors import PeerTimeout

T = TypeVar("T")

BUFFER = "the replay buffer"
RETRY_S = 1.0


class Ask(Generic[T]):
    """One call under way. `who` is named when it does not answer `name` within `limit_s`."""

    def __init__(self, calls: Calls, call: Awaitable[T], *, who: str, name: str, limit_s: float) -> None:
        self.future: Future[T] = calls.start(call, who)
        self._who, self._name, self._limit_s = who, name, limit_s
        self._until_s = time.monotonic() + limit_s

    def is_done(self) -> bool:
        """Whether `result` would not wait. Raises PeerTimeout when the answer is overdue."""
        if self.future.done():
            return True
        if time.monotonic() > self._until_s:
            self.future.cancel()
            raise PeerTimeout(
                f"{self._who} did not answer {self._name} within {self._limit_s:.0f} s (run.timeout_s)"
            )
        return False

    def result(self) -> T:
        """The answer, or what the call raised."""
        return self.future.result(0)


@dataclass
class _Parcel:
    """A delivery; `ask` is None while it waits to be sent again."""

    call: Callable[[], Awaitable[Any]]
    who: str
    ordinals: tuple[int, ...]
    ask: Ask[Any] | None = None


class Outbox:
    """Deliveries in any order. What a full disk refuses (DiskFullError) is kept and sent again every second,
    and counted; the driver tells of the disk (cluster/health.py), once for all actors.

    refused_by  receivers that refused what was last sent to them: what one of them takes says nothing of another
    retries     deliveries sent again so far
    """

    def __init__(self, calls: Calls, name: str, limit_s: float) -> None:
        self._calls, self._name, self._limit_s = calls, name, limit_s
        self._parcels: list[_Parcel] = []
        self._retry_at_s = 0.0
        self.refused_by: set[str] = set()
        self.retries = 0

    def __len__(self) -> int:
        return len(self._parcels)

    @property
    def futures(self) -> list[Future[Any]]:
        """Of the deliveries that are under way."""
        return [parcel.ask.future for parcel in self._parcels if parcel.ask is not None]

    def post(self, call: Callable[[], Awaitable[Any]], who: str, ordinals: Iterable[int] = ()) -> None:
        """Sends; `call` makes the same idempotent call each time, `ordinals` are the work items it ends."""
        parcel = _Parcel(call, who, tuple(ordinals))
        self._send(parcel)
        self._parcels.append(parcel)

    def look(self) -> Collection[int]:
        """Takes note of what was answered, sends again what was refused; the ordinals of what has arrived
        since.

        Raises PeerTimeout, and what a receiver raised other than DiskFullError.
        """
        arrived: list[int] = []
        kept = []
        for parcel in self._parcels:
            if self._is_delivered(parcel):
                arrived += parcel.ordinals
            else:
                kept.append(parcel)
        self._parcels = kept
        if time.monotonic() >= self._retry_at_s:
            for parcel in kept:
                if parcel.ask is None:
                    self.retries += 1
                    self._send(parcel)
        return arrived

    def _send(self, parcel: _Parcel) -> None:
        parcel.ask = Ask(self._calls, parcel.call(), who=parcel.who, name=self._name, limit_s=self._limit_s)

    def _is_delivered(self, parcel: _Parcel) -> bool:
        if parcel.ask is None or not parcel.ask.is_done():
            return False
        try:
            parcel.ask.result()
        except DiskFullError:
            parcel.ask = None
            self._retry_at_s = time.monotonic() + RETRY_S
            self.refused_by.add(parcel.who)
            return False
        if not any(other.ask is None and other.who == parcel.who for other in self._parcels):
            self.refused_by.discard(parcel.who)
        return True
