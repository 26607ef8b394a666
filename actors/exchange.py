"""What an actor sends to buffer and board and must arrive: looked after between two engine steps, never
waited for there.

    outbox.deliver(call, ordinals) --> the peer acknowledges --> poll() returns the ordinals
                            ^                |
                            `---a second-----'  a full disk refused it
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from buffer.store import DiskFullError
from core.calls import Call, Calls, Pending

RETRY_S = 1.0
"""The pause before a peer is asked again for what it refused, or could not give."""


@dataclass
class _Parcel:
    """A delivery; `pending` is None while it waits to be sent again."""

    call: Call[Any]
    ordinals: tuple[int, ...]
    pending: Pending[Any] | None = None


class Outbox:
    """Deliveries in any order, each kept with the claim on its work items until the receiver has acknowledged
    it.

    What a full disk refuses (DiskFullError) is sent again every second, and counted; the driver tells of the
    disk (cluster/health.py), once for all actors.

    refused_by  names the receivers that refused what was last sent to them: what one of them takes says
                nothing of another
    retries     counts the deliveries that were sent again
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._parcels: list[_Parcel] = []
        self._retry_at_s = 0.0
        self.refused_by: set[str] = set()
        self.retries = 0

    def __len__(self) -> int:
        return len(self._parcels)

    @property
    def pendings(self) -> list[Pending[Any]]:
        """Returns the deliveries that are under way."""
        return [parcel.pending for parcel in self._parcels if parcel.pending is not None]

    def deliver(self, call: Call[Any], ordinals: Iterable[int] = ()) -> None:
        """Sends, again if need be: the call must be idempotent. `ordinals` are the items that it ends."""
        self._parcels.append(_Parcel(call, tuple(ordinals), self._calls.start(call)))

    def poll(self) -> Collection[int]:
        """Takes the answers that came, and sends again what was refused. Returns the ordinals of what has
        arrived since.

        Raises PeerTimeout, and what a receiver raised other than DiskFullError.
        """
        arrived: list[int] = []
        kept = []
        for parcel in self._parcels:
            if self._settle_parcel(parcel):
                arrived += parcel.ordinals
            else:
                kept.append(parcel)
        self._parcels = kept
        if time.monotonic() >= self._retry_at_s:
            for parcel in kept:
                if parcel.pending is None:
                    self.retries += 1
                    parcel.pending = self._calls.start(parcel.call)
        return arrived

    def _settle_parcel(self, parcel: _Parcel) -> bool:
        """Takes the answer if it came; True when the parcel was taken."""
        if parcel.pending is None or not parcel.pending.is_done():
            return False
        who = parcel.call.who
        try:
            parcel.pending.result()
        except DiskFullError:
            parcel.pending = None
            self._retry_at_s = time.monotonic() + RETRY_S
            self.refused_by.add(who)
            return False
        if not any(other.pending is None and other.call.who == who for other in self._parcels):
            self.refused_by.discard(who)
        return True
