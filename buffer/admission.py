"""Says which WorkItems exist, and who may lease how many. Pure: no clock, no disk, no Ray.

An item is *open* from its first lease until it ends: inserted or failed. While it is open, it is either held
by one actor or waiting to be issued again. An item whose prompt rests when its turn comes
(buffer/curriculum.py) is never leased: it has ended then, passed over. Invariants:

  - Of a shard's items the first `frontier` were leased or passed over; those of them that are not open have
    ended. Telling them apart is O(open).
  - `open + stored-unconsumed <= allowed`: a new item is leased only below the bound; an item that is issued
    again changes no count.
  - An item whose holder died or was late `MAX_LOSSES` times ends as failed: a prompt that kills its actor
    must not kill them all.
  - Where nothing was left to lease, new items are held back until there are `PORTION` batches of them, or
    until less than a batch is stored. Whoever waits for the learner then works in full steps, and on younger
    weights; while they are held back the learner has a batch to take.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from buffer.sources import Part, locate
from core.errors import AgroError
from core.records import WorkItem

MAX_LOSSES = 5
PORTION = 2
"""Batches that are leased at a time once actors wait for the learner, where three or more are admitted."""


class LeaseError(AgroError, LookupError):
    """Somebody reported on an item that was never leased."""


@functools.lru_cache(maxsize=16)
def _permutation(num_prompts: int, *seeds: int) -> np.ndarray:
    """Returns int64[num_prompts], a permutation of the prompts for one epoch.

    It sorts raw PCG64 draws: numpy promises that stream for ever, but not that of `Generator.permutation`.
    """
    keys = np.random.PCG64(list(seeds)).random_raw(num_prompts)
    return np.argsort(keys, kind="stable")


def work_item(
    ordinal: int, *, seed: int, num_prompts: int, parts: tuple[Part, ...] = (), num_shards: int = 1
) -> WorkItem:
    """Returns the item at `ordinal` of the prompt stream: a pure function of its arguments, the same in every
    process.

    Each epoch of `num_prompts` ordinals visits every prompt once, in an order of its own. Where the prompts
    are those of several sources, one after the other, `parts` says so: they take turns by their shares, and
    each has epochs of its own. With `num_shards` above 1 every prompt belongs to one shard: every
    `num_shards`-th ordinal visits one of every `num_shards`-th prompts. `WorkItem.seed` is in [0, 2**31).
    """
    if ordinal < 0 or num_prompts < 1:
        raise LeaseError(
            f"no work item {ordinal} over {num_prompts} prompts: ordinals start at 0 and there must "
            "be at least one prompt."
        )
    item_seed = int(np.random.SeedSequence([seed, ordinal]).generate_state(1)[0]) >> 1
    (turn, shard), first, size = divmod(ordinal, num_shards), 0, num_prompts
    words: tuple[int, ...] = ()
    if parts:
        source, turn = locate(turn, tuple(part.share for part in parts))
        first, size = sum(part.num_prompts for part in parts[:source]), parts[source].num_prompts
        words = (source,)
    if num_shards > 1:
        size, words = len(range(shard, size, num_shards)), (*words, shard)
    epoch, position = divmod(turn, size)
    index = first + shard + num_shards * int(_permutation(size, seed, epoch, *words)[position])
    return WorkItem(ordinal=ordinal, prompt_index=index, seed=item_seed)


class Lease(msgspec.Struct, gc=False):
    """The state of an open item, as `Admission.lease_of` gives it. An empty `actor` means that it waits to be
    issued again.

    `losses` counts the holders that died or were late. `since_s` is when the lease began or was renewed; None
    means that it was held before this process began.
    """

    actor: str
    losses: int = 0
    since_s: float | None = None


class Admission:
    """Keeps the leases on one shard's part of the prompt stream: ordinals `shard`, `shard + num_shards`, ...

        items = admission.lease("actor-0", max_items=4, stored_unconsumed=12, now_s=clock())
        admission.end(items[0])                                   # inserted

    Times are seconds on any one monotonic clock, given by the caller. `passes_over(ordinal)` is asked once of
    each new item, and must not say so for ever. `counts` has failed, expired (leases that ran out), reissued,
    lost_too_often, rested (items passed over), and ignored_reports (about items that ended or that another
    actor holds).
    """

    def __init__(
        self,
        allowed: int,
        lease_timeout_s: float,
        shard: int = 0,
        num_shards: int = 1,
        passes_over: Callable[[int], bool] = lambda _: False,
        batch: int = 0,
    ) -> None:
        """`batch` is how many groups a learner's step takes of this shard; 0: nothing is held back."""
        self.allowed = allowed
        self.lease_timeout_s = lease_timeout_s
        self.shard, self.num_shards = shard, num_shards
        self.frontier = 0
        self.counts: Counter[str] = Counter()
        # Held in the order of their start or renewal, so that the first is always the next to expire; waiting
        # in the order of their loss.
        # OrderedDicts: the first entry of a dict is found by walking over all that were deleted before it.
        self._held: OrderedDict[int, Lease] = OrderedDict()
        self._held_by: dict[str, dict[int, None]] = {}
        self._waiting: OrderedDict[int, Lease] = OrderedDict()
        self._changed: dict[int, None] = {}
        self._batch = batch
        self._is_exhausted = False  # The new items that were leased last were all that there were.
        self._passes_over = passes_over
        self._passed_over: list[int] = []

    @property
    def num_open(self) -> int:
        """Returns how many items are leased and not ended, held or waiting to be issued again."""
        return len(self._held) + len(self._waiting)

    @property
    def next_expiry_s(self) -> float:
        """Returns when the oldest lease runs out; infinity without leases, minus infinity when `expire` must
        be told the time first.
        """
        for lease in self._held.values():
            return -math.inf if lease.since_s is None else lease.since_s + self.lease_timeout_s
        return math.inf

    def num_leasable(self, stored_unconsumed: int) -> int:
        """Returns how many items `lease` would give: those to issue again, and new ones as far as they are
        admitted and not held back.
        """
        return len(self._waiting) + self._num_new(stored_unconsumed)

    def _num_new(self, stored_unconsumed: int) -> int:
        """Returns how many new items may be leased now; none while they are held back."""
        free, portion = self._num_free(stored_unconsumed), PORTION * self._batch
        is_held_back = (
            self._is_exhausted
            and free < portion <= self.allowed - self._batch
            and stored_unconsumed >= self._batch
        )
        return 0 if is_held_back else free

    def _num_free(self, stored_unconsumed: int) -> int:
        return max(0, self.allowed - self.num_open - stored_unconsumed)

    def lease_of(self, ordinal: int) -> Lease | None:
        """Returns the lease of an open item, or None when the item is not open."""
        return self._held.get(ordinal) or self._waiting.get(ordinal)

    def holder(self, ordinal: int) -> str | None:
        """Returns the actor that holds the item, or None when nobody does."""
        return self._held[ordinal].actor if ordinal in self._held else None

    def held_by(self, actor: str) -> list[int]:
        """Returns the ordinals that the actor holds."""
        return list(self._held_by.get(actor, ()))

    def is_open(self, ordinal: int) -> bool:
        """Returns whether the item still has to end. Raises LeaseError when it was never leased here."""
        position, shard = divmod(ordinal, self.num_shards)
        if shard != self.shard or not 0 <= position < self.frontier:
            raise LeaseError(
                f"group {ordinal} was never leased: shard {self.shard} of {self.num_shards} has leased "
                f"{self.frontier} items. "
                "Group ids are the ordinals of leased WorkItems; is this actor of another run?"
            )
        return ordinal in self._held or ordinal in self._waiting

    def lease(self, actor: str, max_items: int, stored_unconsumed: int, now_s: float) -> list[int]:
        """Leases at most `max_items` items to `actor` and returns their ordinals: first those to issue again,
        then new ones.
        """
        num_items = max(0, min(max_items, self.num_leasable(stored_unconsumed)))
        again = list(itertools.islice(self._waiting, num_items))
        new: list[int] = []
        while len(again) + len(new) < num_items:
            ordinal = self.frontier * self.num_shards + self.shard
            self.frontier += 1
            (self._passed_over if self._passes_over(ordinal) else new).append(ordinal)
        self.counts["reissued"] += len(again)
        for ordinal in (*again, *new):
            losses = self._waiting.pop(ordinal).losses if ordinal in self._waiting else 0
            self._hold(ordinal, Lease(actor, losses, now_s))
            self._changed[ordinal] = None
        if new:
            self._is_exhausted = not self._num_free(stored_unconsumed)
        return [*again, *new]

    def expire(self, now_s: float) -> tuple[list[int], list[int]]:
        """Takes back the leases that ran out since they began or were renewed.

        Returns the ordinals to be issued again, and those that were lost too often and have ended.
        """
        self._date(now_s)
        late = []
        for ordinal, lease in self._held.items():
            if lease.since_s is None or lease.since_s + self.lease_timeout_s > now_s:
                break  # Those that follow began or were renewed later.
            late.append(ordinal)
        self.counts["expired"] += len(late)
        return self._lose(late)

    def renew(self, actor: str, ordinals: Sequence[int], now_s: float) -> None:
        """Restarts the time of the leases that `actor` still holds, since it works on them."""
        self._date(now_s)  # Leases without a time come first, and must expire first.
        for ordinal in dict.fromkeys(ordinals):
            if self.holder(ordinal) == actor:
                lease = self._let_go(ordinal)  # Moved to the end, since it is now the last to expire.
                lease.since_s = now_s
                self._hold(ordinal, lease)

    def lose_actor(self, actor: str) -> tuple[list[int], list[int]]:
        """Takes back what a dead actor held.

        Returns the ordinals to be issued again, and those that were lost too often and have ended.
        """
        return self._lose(self.held_by(actor))

    def give_back(self, actor: str, ordinals: Sequence[int]) -> list[int]:
        """Takes back these leases of `actor`, to be issued again, and returns those that it did hold."""
        held = [ordinal for ordinal in dict.fromkeys(ordinals) if self.holder(ordinal) == actor]
        self.counts["ignored_reports"] += len(ordinals) - len(held)
        for ordinal in held:
            self._wait(ordinal, self._held[ordinal].losses)
        return held

    def release_all(self) -> list[int]:
        """Takes back all leases, since their actors belong to an earlier start of the run, and returns their
        ordinals.
        """
        held = list(self._held)
        for ordinal in held:
            self._wait(ordinal, self._held[ordinal].losses)
        return held

    def end(self, ordinal: int) -> bool:
        """Ends an open item, whoever holds it, and returns whether it was open. Raises LeaseError when it was
        never leased.
        """
        if not self.is_open(ordinal):
            return False
        if ordinal in self._held:
            self._let_go(ordinal)
        self._waiting.pop(ordinal, None)
        self._changed[ordinal] = None
        return True

    def fail(self, actor: str, ordinals: Sequence[int]) -> list[int]:
        """Ends items as failed and returns them. Items that ended, or that another actor holds by now, are
        ignored and counted.
        """
        ended = [o for o in dict.fromkeys(ordinals) if self.is_open(o) and self.holder(o) in (None, actor)]
        for ordinal in ended:
            self.end(ordinal)
        self.counts["failed"] += len(ended)
        self.counts["ignored_reports"] += len(ordinals) - len(ended)
        return ended

    def pop_passed_over(self) -> list[int]:
        """Returns the items that were passed over since the last call."""
        ordinals, self._passed_over = self._passed_over, []
        self.counts["rested"] += len(ordinals)
        return ordinals

    def pop_changed(self) -> list[int]:
        """Returns the items whose lease began, changed hands or ended since the last call."""
        changed = list(self._changed)
        self._changed.clear()
        return changed

    def get_state(self) -> dict[str, Any]:
        """Returns the frontier, the counts and the open items as (ordinal, actor, losses)."""
        leases = [
            (ordinal, lease.actor, lease.losses)
            for ordinal, lease in (*self._waiting.items(), *self._held.items())
        ]
        return {"frontier": self.frontier, "counts": dict(self.counts), "leases": leases}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` returned. Leases keep their holder; their time begins at the next
        `expire`.
        """
        self.frontier = state["frontier"]
        self.counts = Counter(state["counts"])
        self._held.clear()
        self._held_by.clear()
        self._waiting.clear()
        for ordinal, actor, losses in state["leases"]:
            if actor:
                self._hold(ordinal, Lease(actor, losses))
            else:
                self._waiting[ordinal] = Lease("", losses)
        self._changed.clear()

    def check_valid(self) -> list[str]:
        """Returns what is wrong with the state, in words; nothing when it is valid."""
        problems = [
            f"item {ordinal} is both held and waiting" for ordinal in self._held if ordinal in self._waiting
        ]
        by_actor: dict[str, list[int]] = {}
        for ordinal, lease in self._held.items():
            by_actor.setdefault(lease.actor, []).append(ordinal)
        if by_actor != {actor: list(ordinals) for actor, ordinals in self._held_by.items()}:
            problems.append("the items of each actor are not those that are held")
        for ordinal in (*self._held, *self._waiting):
            position, shard = divmod(ordinal, self.num_shards)
            if shard != self.shard or position >= self.frontier:
                problems.append(
                    f"open item {ordinal} is none of the {self.frontier} leased by shard "
                    f"{self.shard} of {self.num_shards}"
                )
        return problems

    def _date(self, now_s: float) -> None:
        """Starts the time of leases that were held before this process began."""
        for lease in self._held.values():
            if lease.since_s is not None:
                return  # All that follow have a time too.
            lease.since_s = now_s

    def _lose(self, ordinals: list[int]) -> tuple[list[int], list[int]]:
        again, ended = [], []
        for ordinal in ordinals:
            losses = self._held[ordinal].losses + 1
            self._wait(ordinal, losses)
            if losses < MAX_LOSSES:
                again.append(ordinal)
            else:
                self.end(ordinal)
                ended.append(ordinal)
        self.counts["lost_too_often"] += len(ended)
        self.counts["failed"] += len(ended)
        return again, ended

    def _hold(self, ordinal: int, lease: Lease) -> None:
        self._held[ordinal] = lease
        self._held_by.setdefault(lease.actor, {})[ordinal] = None

    def _let_go(self, ordinal: int) -> Lease:
        lease = self._held.pop(ordinal)
        its_items = self._held_by[lease.actor]
        del its_items[ordinal]
        if not its_items:
            del self._held_by[lease.actor]
        return lease

    def _wait(self, ordinal: int, losses: int) -> None:
        self._let_go(ordinal)
        self._waiting[ordinal] = Lease("", losses)
        self._changed[ordinal] = None
