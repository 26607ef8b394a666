"""The index of stored groups: what a batch may take and when a group leaves. Pure: no clock, no disk, no Ray.

A group leaves for exactly one counted reason:

    evicted_used      it was in `max_uses` batches: its regular end
    evicted_stale     at `take` or `evict_stale`, learner step - oldest_version > `max_staleness`
    evicted_capacity  an insert put more than `capacity` unconsumed groups here (admission should make that never happen)

so that at any time `inserted = stored + evicted_used + evicted_stale + evicted_capacity`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import msgspec
import numpy as np

from buffer.records import Group
from buffer.sampling import SAMPLERS, GroupMeta
from cluster.config import BufferConfig
from cluster.errors import ConfigError, DataError, StalenessError

MIN_SAMPLES = 2
"""A group with fewer samples carries no signal: its leave-one-out mean does not exist."""

_EVICTIONS = ("evicted_used", "evicted_stale", "evicted_capacity")


def usable_group(group: Group) -> tuple[Group | None, list[str]]:
    """The group as it is stored, and the error texts of the samples left out.

    Samples with an `error` are left out (a failure is never reward 0); a group that keeps fewer than MIN_SAMPLES is not
    stored: None. Raises DataError for a sample without tokens, or with neither a finite reward nor an error.
    """
    errors = [sample.error for sample in group.samples if sample.error is not None]
    kept = tuple(sample for sample in group.samples if sample.error is None)
    for index, sample in enumerate(kept):
        if sample.reward is None or not math.isfinite(sample.reward):
            raise DataError(
                f"group {group.group_id} from actor {group.actor!r}: reward {sample.reward} in scored sample {index}. "
                "Score a group before inserting it, or set the sample's `error`."
            )
        if not sample.version_spans:
            raise DataError(f"group {group.group_id} from actor {group.actor!r}: sample {index} has no tokens and no version.")
    if len(kept) < MIN_SAMPLES:
        return None, errors
    return (msgspec.structs.replace(group, samples=kept) if errors else group), errors


def meta_of(group: Group) -> GroupMeta:
    """The index entry of a group."""
    return GroupMeta(group.group_id, group.oldest_version, group.num_tokens, group.uses)


class Replay:
    """Stored groups by id, in order of insertion. `counts`: inserted, duplicates and the reasons of the module docstring."""

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

    def take(self, k: int, step: int) -> list[int]:
        """Ids of the `k` groups of learner step `step`, no id twice; empty when fewer are left after evicting stale ones.

        The choice depends on the seed, the step and what is stored, nothing else. Groups taken for the last time leave.
        """
        self.evict_stale(step)
        if len(self._groups) < k:
            return []
        # The third word keeps this stream apart from the prompt stream's.
        rng = np.random.Generator(np.random.PCG64([self.seed, step, 1]))
        chosen = self._sampler(list(self._groups.values()), k, rng)
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
            check_staleness(group_id, self._groups[group_id].oldest_version, step, self.config.max_staleness)


def check_staleness(group_id: int, oldest_version: int, step: int, max_staleness: int) -> None:
    """Raises StalenessError when `step - oldest_version > max_staleness` (learner steps)."""
    if step - oldest_version > max_staleness:
        raise StalenessError(
            f"group {group_id} has a token of version {oldest_version} at learner step {step}: staleness {step - oldest_version} is above "
            f"buffer.max_staleness = {max_staleness}. It should have been evicted: this is a bug in the buffer."
        )
