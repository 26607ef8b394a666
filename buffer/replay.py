"""The index of stored groups: what a batch may take and when a group leaves. Pure: no clock, no disk, no Ray.

A group leaves for exactly one counted reason:

    evicted_used      it was in `max_uses` batches: its regular end
    evicted_stale     at `take` or `evict_stale`, learner step - oldest_version > `max_staleness`
    evicted_capacity  an insert put more than `capacity` unconsumed groups here (admission should make that never happen)

so that at any time `inserted = stored + evicted_used + evicted_stale + evicted_capacity`. A group of offline samples has
no age: it is never stale, and never too young.

With `min_staleness` = m > 0 a batch of k groups at step s takes only versions <= max(0, s - m), and only once (m + 1) * k
groups are stored. The second condition is what makes the first one satisfiable. Versions above s - m appear only after the
take of step s - m, which left m * k groups that are all old enough at step s; the m - 1 takes in between used at most
(m - 1) * k of them, so k are left, unless some went stale meanwhile (`max_staleness` close to m). For that case: when the buffer
is full, so that nothing older can come, the batch is the oldest k groups, and those too young are counted (`taken_young`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import numpy as np

from buffer.records import Group
from buffer.sampling import AGELESS, SAMPLERS, GroupMeta
from cluster.config import BufferConfig
from cluster.errors import ConfigError, DataError, StalenessError

_EVICTIONS = ("evicted_used", "evicted_stale", "evicted_capacity")


def meta_of(group: Group) -> GroupMeta:
    """The index entry of a group."""
    version = AGELESS if group.oldest_version is None else group.oldest_version
    return GroupMeta(group.group_id, version, group.num_tokens, group.uses)


class Replay:
    """Stored groups by id, in order of insertion. `counts`: inserted, duplicates, taken_young, and the reasons of the module docstring."""

    def __init__(self, config: BufferConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self._sampler = SAMPLERS[config.sampler]
        self._groups: dict[int, GroupMeta] = {}
        self._num_unconsumed = 0
        self._evicted: list[tuple[GroupMeta, str]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._groups

    def __getitem__(self, group_id: int) -> GroupMeta:
        return self._groups[group_id]

    @property
    def num_unconsumed(self) -> int:
        """Groups that were in no batch yet."""
        return self._num_unconsumed

    @property
    def num_tokens(self) -> int:
        """Tokens of all stored groups, as the learner sees them."""
        return sum(group.num_tokens for group in self._groups.values())

    @property
    def has_evicted(self) -> bool:
        """Whether groups left that `pop_evicted` has not reported."""
        return bool(self._evicted)

    def insert(self, group: GroupMeta) -> bool:
        """Stores a group; False, counted, when its id is stored already."""
        if group.group_id in self._groups:
            self.counts["duplicates"] += 1
            return False
        self._groups[group.group_id] = group
        self._num_unconsumed += group.uses == 0
        self.counts["inserted"] += 1
        while self._num_unconsumed > self.config.capacity:
            unconsumed = (stored for stored in self._groups.values() if stored.uses == 0)
            self._evict(min(unconsumed, key=lambda stored: stored.oldest_version), "evicted_capacity")
        return True

    def evict_stale(self, step: int) -> None:
        """Evicts what no batch of learner step `step` or later may hold."""
        for group in [group for group in self._groups.values() if step - group.oldest_version > self.config.max_staleness]:
            self._evict(group, "evicted_stale")

    def take(self, k: int, step: int, *, is_full: bool = False) -> list[int]:
        """Ids of the `k` groups of learner step `step`, no id twice; empty when fewer may be taken after evicting stale ones.

        `is_full`: no group will come before one leaves. The choice depends on the seed, the step, what is stored and, with a
        `min_staleness`, on `is_full`; on nothing else. Groups taken for the last time leave.
        """
        self.evict_stale(step)
        candidates = self._candidates(k, step, is_full)
        if len(candidates) < k:
            return []
        # The third word keeps this stream apart from the prompt stream's.
        rng = np.random.Generator(np.random.PCG64([self.seed, step, 1]))
        chosen = self._sampler(candidates, k, rng)
        self._check_choice(chosen, k, step)
        for group_id in chosen:
            self._use(group_id)
        return chosen

    def pop_evicted(self) -> list[tuple[GroupMeta, str]]:
        """Groups that left since the last call, with the reason."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def get_state(self) -> dict[str, Any]:
        """The groups in order of insertion, and the counts."""
        return {"groups": list(self._groups.values()), "counts": dict(self.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over `get_state`'s value; raises DataError when it contradicts itself.

        When `max_uses` was lowered meanwhile, groups used that often already leave.
        """
        groups = {group.group_id: group for group in state["groups"]}
        if len(groups) != len(state["groups"]):
            raise DataError("replay state holds a group id twice; it was not written by get_state.")
        self._groups = groups
        self._num_unconsumed = sum(group.uses == 0 for group in groups.values())
        self.counts = Counter(state["counts"])
        self._evicted = []
        if problems := self.check_valid():
            raise DataError(f"replay state contradicts itself: {problems[0]}")
        for group in [group for group in groups.values() if group.uses >= self.config.max_uses]:
            self._evict(group, "evicted_used")

    def check_valid(self) -> list[str]:
        """What is wrong with the state, in words; empty when nothing is."""
        problems = []
        if self._num_unconsumed != sum(group.uses == 0 for group in self._groups.values()):
            problems.append(f"{self._num_unconsumed} unconsumed groups counted, another number stored")
        left = sum(self.counts[reason] for reason in _EVICTIONS)
        if self.counts["inserted"] != len(self._groups) + left:
            problems.append(f"{self.counts['inserted']} groups inserted, but {len(self._groups)} stored and {left} evicted")
        return problems

    def _candidates(self, k: int, step: int, is_full: bool) -> list[GroupMeta]:
        """What a batch of `k` groups may take, in order of insertion; the module's docstring says why. Counts `taken_young`."""
        stored, lag = list(self._groups.values()), self.config.min_staleness
        if not lag:
            return stored
        newest_allowed = max(0, step - lag)
        old_enough = [group for group in stored if group.version is None or group.version <= newest_allowed]
        if is_full and len(old_enough) < k <= len(stored):
            num_young = k - len(old_enough)
            self.counts["taken_young"] += num_young
            young = [group for group in stored if newest_allowed < group.oldest_version < AGELESS]
            return old_enough + sorted(young, key=lambda group: group.oldest_version)[:num_young]
        return old_enough if is_full or len(stored) >= (lag + 1) * k else []

    def _use(self, group_id: int) -> None:
        group = self._groups[group_id]
        self._num_unconsumed -= group.uses == 0
        used = msgspec.structs.replace(group, uses=group.uses + 1)
        self._groups[group_id] = used
        if used.uses >= self.config.max_uses:
            self._evict(used, "evicted_used")

    def _evict(self, group: GroupMeta, reason: str) -> None:
        del self._groups[group.group_id]
        self._num_unconsumed -= group.uses == 0
        self.counts[reason] += 1
        self._evicted.append((group, reason))

    def _check_choice(self, chosen: list[int], k: int, step: int) -> None:
        if len(set(chosen)) != k or not set(chosen) <= self._groups.keys():
            raise ConfigError(
                f"buffer.sampler = {self.config.sampler!r} is broken: asked for {k} different stored groups, it chose {chosen}."
            )
        for group_id in chosen:
            check_staleness(group_id, self._groups[group_id].version, step, self.config.max_staleness)


def check_staleness(group_id: int, oldest_version: int | None, step: int, max_staleness: int) -> None:
    """Raises StalenessError when `step - oldest_version > max_staleness` (learner steps); None has no age."""
    if oldest_version is not None and step - oldest_version > max_staleness:
        raise StalenessError(
            f"group {group_id} has a token of version {oldest_version} at learner step {step}: staleness {step - oldest_version} is above "
            f"buffer.max_staleness = {max_staleness}. It should have been evicted: this is a bug in the buffer."
        )
