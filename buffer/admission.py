"""Which WorkItems exist, and who may lease how many. Pure: no clock, no disk, no Ray.

An item is *open* from its first lease until it ends: inserted or failed. While open it is either held by one actor or
waiting to be issued again. Invariants:
  - items below `frontier` and not open have ended, all others were never leased: three states, told apart in O(open);
  - `open + stored-unconsumed <= allowed`: a new item is leased only below the bound; one issued again changes no count.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from buffer.records import WorkItem
from cluster.errors import AgroError


class LeaseError(AgroError, LookupError):
    """A report about an item that was never leased."""


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """int64[num_rows]. Sorted raw PCG64 draws: numpy promises that stream for ever, but not `Generator.permutation`'s."""
    keys = np.random.PCG64([seed, epoch]).random_raw(num_rows)
    return np.argsort(keys, kind="stable")


def work_item(ordinal: int, *, seed: int, num_rows: int) -> WorkItem:
    """The item at `ordinal` of the prompt stream: a pure function of its arguments, the same in every process.

    Each epoch of `num_rows` ordinals visits every row once, in an order of its own. `WorkItem.seed` is in [0, 2**31).
    """
    if ordinal < 0 or num_rows < 1:
        raise LeaseError(f"no work item {ordinal} over {num_rows} rows: ordinals start at 0 and there must be at least one row.")
    epoch, position = divmod(ordinal, num_rows)
    item_seed = int(np.random.SeedSequence([seed, ordinal]).generate_state(1)[0]) >> 1
    return WorkItem(ordinal=ordinal, row=int(_permutation(seed, epoch, num_rows)[position]), seed=item_seed)


class Admission:
    """Leases on the prompt stream. Times are seconds on any one monotonic clock, given by the caller.

    `counts`: failed, expired (leases that ran out), reissued, ignored_reports (about items that are another's or ended).
    """

    def __init__(self, allowed: int, lease_timeout_s: float) -> None:
        self.allowed = allowed
        self.lease_timeout_s = lease_timeout_s
        self.frontier = 0
        self.counts: Counter[str] = Counter()
        # Held leases in the order of their start, so that the first is always the next to expire.
        self._held: dict[int, tuple[str, float]] = {}
        self._waiting: dict[int, None] = {}

    @property
    def num_open(self) -> int:
        """Items leased and not ended: held or waiting to be issued again."""
        return len(self._held) + len(self._waiting)

    @property
    def next_expiry_s(self) -> float:
        """When the oldest lease runs out; infinity without leases."""
        return next((since_s + self.lease_timeout_s for _, since_s in self._held.values()), math.inf)

    def num_leasable(self, stored_unconsumed: int) -> int:
        """Items that `lease` would give: those to issue again, and new ones while admitted."""
        return len(self._waiting) + max(0, self.allowed - self.num_open - stored_unconsumed)

    def holder(self, ordinal: int) -> str | None:
        """The actor that holds the item; None when nobody does."""
        return self._held[ordinal][0] if ordinal in self._held else None

    def is_open(self, ordinal: int) -> bool:
        """Whether the item still has to end; False when it has. Raises LeaseError when it was never leased."""
        if not 0 <= ordinal < self.frontier:
            raise LeaseError(
                f"group {ordinal} was never leased: items 0 to {self.frontier - 1} were. "
                "Group ids are the ordinals of leased WorkItems; is this actor of another run?"
            )
        return ordinal in self._held or ordinal in self._waiting

    def lease(self, actor: str, max_items: int, stored_unconsumed: int, now_s: float) -> list[int]:
        """Ordinals now held by `actor`, at most `max_items`: first those to issue again, then new ones while admitted."""
        num_items = max(0, min(max_items, self.num_leasable(stored_unconsumed)))
        again = list(self._waiting)[:num_items]
        for ordinal in again:
            del self._waiting[ordinal]
        num_new = num_items - len(again)
        ordinals = again + list(range(self.frontier, self.frontier + num_new))
        self.frontier += num_new
        self.counts["reissued"] += len(again)
        self._held.update((ordinal, (actor, now_s)) for ordinal in ordinals)
        return ordinals

    def expire(self, now_s: float) -> list[int]:
        """Takes back the leases that ran out; returns their ordinals, which will be issued again."""
        late = [ordinal for ordinal, (_, since_s) in self._held.items() if since_s + self.lease_timeout_s <= now_s]
        self._take_back(late)
        self.counts["expired"] += len(late)
        return late

    def give_back(self, actor: str, ordinals: Sequence[int] | None = None) -> list[int]:
        """Takes back these leases of `actor` (None: all it holds), to be issued again; returns those it did hold."""
        if ordinals is None:
            ordinals = [ordinal for ordinal, (holder, _) in self._held.items() if holder == actor]
        held = [ordinal for ordinal in dict.fromkeys(ordinals) if self.holder(ordinal) == actor]
        self.counts["ignored_reports"] += len(ordinals) - len(held)
        self._take_back(held)
        return held

    def end(self, ordinal: int) -> bool:
        """Ends an open item, whoever holds it; False when it had ended. Raises LeaseError when it was never leased."""
        if not self.is_open(ordinal):
            return False
        self._held.pop(ordinal, None)
        self._waiting.pop(ordinal, None)
        return True

    def fail(self, actor: str, ordinals: Sequence[int]) -> list[int]:
        """Ends items as failed and returns them; those that ended or that another actor holds by now are ignored, counted."""
        ended = [o for o in dict.fromkeys(ordinals) if self.is_open(o) and self.holder(o) in (None, actor)]
        for ordinal in ended:
            self.end(ordinal)
        self.counts["failed"] += len(ended)
        self.counts["ignored_reports"] += len(ordinals) - len(ended)
        return ended

    def get_state(self) -> dict[str, Any]:
        """What must survive: frontier, open ordinals, counts. Holders and times do not: a new process re-issues what is open."""
        return {"frontier": self.frontier, "open": [*self._waiting, *self._held], "counts": dict(self.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over `get_state`'s value. Open items that have a holder here keep it; the others wait to be issued again."""
        still_open = dict.fromkeys(state["open"])
        self.frontier = state["frontier"]
        self.counts = Counter(state["counts"])
        self._held = {ordinal: lease for ordinal, lease in self._held.items() if ordinal in still_open}
        self._waiting = {ordinal: None for ordinal in still_open if ordinal not in self._held}

    def check_valid(self) -> list[str]:
        """What is wrong with the state, in words; empty when nothing is."""
        problems = [f"item {o} is both held and waiting" for o in self._held if o in self._waiting]
        problems += [
            f"open item {o} is not below the frontier {self.frontier}" for o in (*self._held, *self._waiting) if o >= self.frontier
        ]
        return problems

    def _take_back(self, ordinals: Iterable[int]) -> None:
        for ordinal in ordinals:
            del self._held[ordinal]
            self._waiting[ordinal] = None
