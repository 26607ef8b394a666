"""Samplers choose which stored groups a batch takes. A further one is a pure function and its line in
SAMPLERS.

A sampler sees the groups through a `View`: by rank in order of insertion or of age, O(log n) each. None of
them walks all groups, so that a batch costs the same from a thousand groups and from a hundred thousand.

A group of offline samples has no age. To `uniform` and `oldest` that makes no difference. To `fresh` it is
newer than every version: were it older, it would never be taken while there is anything else, and since it
never goes stale such groups would fill the buffer. To `stratified` and `priority` its staleness is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from buffer.order import Order
from core.config.buffer import BufferConfig
from core.staleness import AGELESS, oldest_version_within, staleness_of

# The weight of a group for `priority` is the product of three factors; see there.
HALF_LIFE_STEPS = 8.0
"""Learner steps of staleness that halve the weight."""
SPREAD_FLOOR = 0.1
"""Weight of a group whose rewards are all equal, where a group of average spread has 1 + SPREAD_FLOOR."""
POOL_GROUPS = 2048
"""Groups whose weights are computed for one batch."""
POOL_PER_CHOICE = 8
"""A pool holds at least so many groups for each that is chosen; with fewer the weights would matter
little.
"""


class GroupMeta(msgspec.Struct, gc=False, frozen=True):
    """The part of a stored group that is kept in memory.

    `oldest_version` is the policy version of its oldest token, AGELESS when all samples are offline.
    `num_tokens` counts prompt and completion tokens of all samples, `uses` the batches it was in.
    `reward_std` is the population standard deviation of its samples' rewards.
    """

    group_id: int
    oldest_version: int
    num_tokens: int
    uses: int = 0
    reward_std: float = 0.0

    @property
    def version(self) -> int | None:
        """Returns `oldest_version`, or None for a group that has no age."""
        return None if self.oldest_version == AGELESS else self.oldest_version


@dataclass(frozen=True)
class View:
    """What a sampler may choose from, read only; whatever a sampler wants counted goes into `counts`.

    newest = view.by_age(len(view) - 1).group_id
    """

    order: Order
    groups: Mapping[int, GroupMeta]
    config: BufferConfig
    counts: Counter[str]

    def __len__(self) -> int:
        return len(self.order)

    def by_insertion(self, rank: int) -> GroupMeta:
        """Returns the group that came after `rank` others. O(log n)."""
        return self.groups[self.order.by_insertion[rank].group_id]

    def by_age(self, rank: int) -> GroupMeta:
        """Returns the group that has `rank` older ones, AGELESS last; of equal versions the one inserted
        first is older. O(log n).
        """
        return self.groups[self.order.by_age[rank].group_id]

    def num_older(self, version: int) -> int:
        """Returns how many groups are older than `version`: the age rank of the first that is not."""
        return self.order.num_older(version)


Sampler: TypeAlias = Callable[[View, int, int, np.random.Generator], list[int]]
"""`(view, k <= len(view), learner step, rng) -> k different group ids`, the same for the same arguments."""


def uniform(view: View, k: int, step: int, rng: np.random.Generator) -> list[int]:
    """Takes k groups, every set of k equally likely."""
    return [
        view.by_insertion(rank).group_id for rank in rng.choice(len(view), size=k, replace=False).tolist()
    ]


def fresh(view: View, k: int, step: int, rng: np.random.Generator) -> list[int]:
    """Takes the newest groups: by policy version (offline groups before all), then by insertion."""
    return [view.by_age(len(view) - 1 - place).group_id for place in range(k)]


def oldest(view: View, k: int, step: int, rng: np.random.Generator) -> list[int]:
    """Takes the groups that came first."""
    return [view.by_insertion(rank).group_id for rank in range(k)]


def stratified(view: View, k: int, step: int, rng: np.random.Generator) -> list[int]:
    """Takes a share of the batch from each range of staleness in `buffer.sampler`; within a range every set
    is equally likely.

    Shares become whole numbers by largest remainder (of equals the younger range), for each batch by itself:
    a share below 1 / k may get nothing, batch after batch. What a range does not hold comes from the nearest
    range that has more than its own, the younger of two, and is counted in `strata_short`. A staleness in no
    range belongs to a range of share 0.
    """
    strata = _strata(view, step)
    numbers, num_short = _fill(
        _largest_remainder([stratum.share for stratum in strata], k),
        [len(stratum.ranks) for stratum in strata],
    )
    if num_short:
        view.counts["strata_short"] += num_short
    chosen: list[int] = []
    for stratum, number in zip(strata, numbers, strict=True):
        places = rng.choice(len(stratum.ranks), size=number, replace=False) if number else np.empty(0, int)
        chosen += [view.by_age(stratum.ranks[place]).group_id for place in places.tolist()]
    return chosen


def priority(view: View, k: int, step: int, rng: np.random.Generator) -> list[int]:
    """Takes k groups one after the other, each drawn from those left in proportion to a weight:

        2^(-staleness / HALF_LIFE_STEPS) / (1 + uses) * (SPREAD_FLOOR + reward_std / mean reward_std)

    A group whose rewards are all equal has no advantage to learn from, hence the spread; it is relative to
    the mean, so that the scale of the rewards does not matter. The k largest of log(weight) + Gumbel noise
    are such a draw (Kool et al. 2019, https://arxiv.org/abs/1903.06059, section 2).

    The draw is exact up to POOL_GROUPS groups (or POOL_PER_CHOICE * k, if that is more). Beyond, it is made
    from a pool of that many, every set equally likely, which keeps the cost from growing. Chances are then in
    proportion to the weights but for the pool's sampling error, and no group can have a larger chance than
    that of being in the pool.
    """
    size = min(len(view), max(POOL_GROUPS, POOL_PER_CHOICE * k))
    ranks = (
        range(size)
        if size == len(view)
        else rng.choice(len(view), size=size, replace=False, shuffle=False).tolist()
    )
    pool = [view.by_insertion(rank) for rank in ranks]
    keys = log_weights(pool, step) + rng.gumbel(size=len(pool))
    return [pool[index].group_id for index in np.argsort(-keys)[:k].tolist()]


SAMPLERS: dict[str, Sampler] = {
    "uniform": uniform,
    "fresh": fresh,
    "oldest": oldest,
    "stratified": stratified,
    "priority": priority,
}
"""By the names of `buffer.sampler`."""


def log_weights(pool: Sequence[GroupMeta], step: int) -> np.ndarray:
    """Returns the natural logarithms of `priority`'s weights, one for each group of `pool`, at learner step
    `step`.
    """
    staleness = staleness_of(np.array([group.oldest_version for group in pool], np.int64), step)
    uses = np.array([group.uses for group in pool], np.int64)
    spread = np.array([group.reward_std for group in pool])
    if spread.any():
        spread /= spread.mean()
    return -math.log(2) * staleness / HALF_LIFE_STEPS - np.log1p(uses) + np.log(SPREAD_FLOOR + spread)


class _Stratum(NamedTuple):
    ranks: range  # by age
    share: float


def _strata(view: View, step: int) -> list[_Stratum]:
    """Returns all groups by range of staleness, the youngest range first."""
    ends: list[tuple[int | None, float]] = []
    next_first = 0
    for first, last, share in view.config.mix_ranges:
        if first > next_first:
            ends.append((first - 1, 0.0))
        ends.append((last, share))
        next_first = first if last is None else last + 1
    if ends[-1][0] is not None:
        ends.append((None, 0.0))
    strata, stop = [], len(view)
    for last, share in ends:
        start = 0 if last is None else view.num_older(oldest_version_within(last, step))
        strata.append(_Stratum(range(start, stop), share))
        stop = start
    return strata


def _largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Returns whole numbers in proportion to `shares` that sum to `total`, by Hamilton's method.

    Each share is rounded down; the rest goes to those that lost most by that.
    """
    exact = [total * share / math.fsum(shares) for share in shares]
    numbers = [math.floor(number) for number in exact]
    by_loss = sorted(range(len(shares)), key=lambda index: numbers[index] - exact[index])
    for index in by_loss[: total - sum(numbers)]:
        numbers[index] += 1
    return numbers


def _fill(wanted: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Returns how many to take from each stratum when it holds `sizes`, and how many of them stand in for
    another stratum's.
    """
    taken = [min(number, size) for number, size in zip(wanted, sizes, strict=True)]
    missing = [number - got for number, got in zip(wanted, taken, strict=True)]
    for short, number in enumerate(missing):
        for near in sorted(range(len(sizes)), key=lambda index: (abs(index - short), index)):
            moved = min(number, sizes[near] - taken[near])
            taken[near] += moved
            number -= moved
    return taken, sum(missing)
