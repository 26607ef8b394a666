"""The index of stored groups: what a batch may take and when a group leaves. Pure: no clock, no disk, no Ray.

A group leaves for exactly one counted reason:

    evicted_used      it was in `uses_per_group` batches: its regular end
    evicted_stale     at `take` or `evict_stale`, it is too old for that learner step (core/staleness.py)
    evicted_capacity  an insert put more than `capacity` unconsumed groups here; admission should prevent it
    evicted_surplus   an insert put more than `uses_per_group * capacity` groups: the oldest used one leaves
    evicted_equal     its samples all have the same reward: it left as it came (`skip`, buffer/equal_rewards.py)

so that at any time `inserted` = stored and all evicted. A group of offline samples has no age: it is never
stale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from sortedcontainers import SortedList

from buffer.order import Entry, Order
from buffer.sampling import SAMPLERS, GroupMeta, View
from core.config.buffer import BufferConfig
from core.errors import ConfigError, DataError
from core.records import Group, GroupHead
from core.staleness import StalenessBound, counted_version

EVICTIONS = ("evicted_used", "evicted_stale", "evicted_capacity", "evicted_surplus", "evicted_equal")


def meta_of(group: Group | GroupHead) -> GroupMeta:
    """Returns the index entry of a group on its arrival: it was in no batch yet, whatever it says of its
    uses.
    """
    rewards = [sample.reward for sample in group.samples if sample.reward is not None]
    mean = sum([reward / len(rewards) for reward in rewards])
    # hypot: no overflow on the way to a standard deviation that is a finite number.
    reward_std = math.hypot(*[reward - mean for reward in rewards]) / math.sqrt(max(1, len(rewards)))
    return GroupMeta(group.group_id, counted_version(group), group.num_tokens, uses=0, reward_std=reward_std)


class Replay:
    """Stored groups by id, in order of insertion and of age. `counts`: inserted, duplicates,
    strata_short, and the reasons of the module docstring.
    """

    def __init__(self, config: BufferConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._sampler = SAMPLERS[config.sampler_name]
        self._bound = StalenessBound(config.max_staleness)
        self._load((), {})

    def _load(self, groups: Sequence[GroupMeta], counts: Mapping[str, int]) -> None:
        self.counts: Counter[str] = Counter(counts)
        self._groups = {group.group_id: group for group in groups}
        self._entries = {
            group.group_id: Entry(group.oldest_version, place, group.group_id)
            for place, group in enumerate(groups)
        }
        self._next_sequence = len(self._entries)
        self._order = Order(self._entries.values())
        self._unconsumed = SortedList(self._entries[group.group_id] for group in groups if group.uses == 0)
        self._used = SortedList(self._entries[group.group_id] for group in groups if group.uses > 0)
        self._num_tokens = sum(group.num_tokens for group in groups)
        self._evicted: list[tuple[GroupMeta, str]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, group_id: object) -> bool:
        return group_id in self._groups

    def __getitem__(self, group_id: int) -> GroupMeta:
        return self._groups[group_id]

    @property
    def num_unconsumed(self) -> int:
        """Returns how many groups were in no batch yet."""
        return len(self._unconsumed)

    @property
    def num_stored(self) -> int:
        """Returns how many groups a batch could take when they came: all inserted but those skipped."""
        return self.counts["inserted"] - self.counts["evicted_equal"]

    @property
    def num_tokens(self) -> int:
        """Returns the tokens of all stored groups, as the learner sees them."""
        return self._num_tokens

    @property
    def has_evicted(self) -> bool:
        """Returns whether groups left that `pop_evicted` has not reported."""
        return bool(self._evicted)

    @property
    def view(self) -> View:
        """Returns what a sampler may choose from: all stored groups."""
        return View(self._order, self._groups, self.config, self.counts)

    def num_takeable(self, step: int) -> int:
        """Returns how many groups a batch of learner step `step` may choose from: those that are not stale.
        Changes nothing.
        """
        return len(self._order) - self._order.num_older(self._bound.oldest_allowed(step))

    def insert(self, group: GroupMeta) -> bool:
        """Stores a group and returns True, or counts a duplicate and returns False when its id is stored
        already.
        """
        if group.group_id in self._groups:
            self.counts["duplicates"] += 1
            return False
        entry = Entry(group.oldest_version, self._next_sequence, group.group_id)
        self._next_sequence += 1
        self._groups[group.group_id] = group
        self._entries[group.group_id] = entry
        self._order.add(entry)
        self._side_of(group).add(entry)
        self._num_tokens += group.num_tokens
        self.counts["inserted"] += 1
        while len(self._unconsumed) > self.config.capacity:
            self._evict(self._unconsumed[0], "evicted_capacity")
        while len(self._groups) > self.config.uses_per_group * self.config.capacity:
            self._evict(self._used[0], "evicted_surplus")
        return True

    def skip(self, group: GroupMeta) -> None:
        """Counts a group that leaves as it comes: it takes no place, and no batch sees it."""
        self.counts["inserted"] += 1
        self.counts["evicted_equal"] += 1
        self._evicted.append((group, "evicted_equal"))

    def evict_stale(self, step: int) -> None:
        """Evicts every group that no batch of learner step `step` or later may hold."""
        for entry in self._order.between(None, self._bound.oldest_allowed(step)):
            self._evict(entry, "evicted_stale")

    def take(self, k: int, step: int) -> list[int]:
        """Ids of the `k` groups of learner step `step`, no id twice; empty when fewer may be taken after
        evicting stale ones.

        The choice depends on the seed, the step and what is stored; on nothing else. Groups taken for the
        last time leave.
        """
        self.evict_stale(step)
        if len(self) < k:
            return []
        # The third word keeps this stream apart from the prompt stream's.
        rng = np.random.Generator(np.random.PCG64([self.seed, step, 1]))
        chosen = self._sampler(self.view, k, step, rng)
        self._check_choice(chosen, k, step)
        for group_id in chosen:
            self._use(group_id)
        return chosen

    def pop_evicted(self) -> list[tuple[GroupMeta, str]]:
        """Returns the groups that left since the last call, each with the reason."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def get_state(self) -> dict[str, Any]:
        """Returns the groups in order of insertion, and the counts."""
        return {"groups": list(self._groups.values()), "counts": dict(self.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over `get_state`'s value; raises DataError, changing nothing, when it contradicts itself.

        When `uses_per_group` was lowered meanwhile, groups used that often already leave.
        """
        groups, counts = state["groups"], state["counts"]
        if len({group.group_id for group in groups}) != len(groups):
            raise DataError("replay state holds a group id twice; it was not written by get_state.")
        if problems := _count_problems(len(groups), counts):
            raise DataError(f"replay state contradicts itself: {problems[0]}")
        self._load(groups, counts)
        for group in groups:
            if group.uses >= self.config.uses_per_group:
                self._evict(self._entries[group.group_id], "evicted_used")

    def check_valid(self) -> list[str]:
        """Returns what is wrong with the state, in words; nothing when it is valid. Looks at every group."""
        problems = _count_problems(len(self), self.counts)
        unconsumed = [entry for group_id, entry in self._entries.items() if self._groups[group_id].uses == 0]
        if sorted(unconsumed) != list(self._unconsumed):
            problems.append(
                f"{len(self._unconsumed)} groups listed as unconsumed, {len(unconsumed)} or others are"
            )
        if len(self._used) + len(self._unconsumed) != len(self):
            problems.append(f"{len(self._used)} groups listed as used, {len(self) - len(unconsumed)} are")
        if self._num_tokens != (num_tokens := sum(group.num_tokens for group in self._groups.values())):
            problems.append(f"{self._num_tokens} tokens counted, {num_tokens} stored")
        ordered = list(self._order.by_age)
        if ordered != sorted(self._entries.values()) or self._entries.keys() != self._groups.keys():
            problems.append(
                f"{len(ordered)} groups in order of age, {len(self._entries)} in order of "
                f"insertion, {len(self)} stored"
            )
        return problems

    def _use(self, group_id: int) -> None:
        group, entry = self._groups[group_id], self._entries[group_id]
        self._side_of(group).remove(entry)
        group = self._groups[group_id] = msgspec.structs.replace(group, uses=group.uses + 1)
        self._side_of(group).add(entry)
        if group.uses >= self.config.uses_per_group:
            self._evict(entry, "evicted_used")

    def _side_of(self, group: GroupMeta) -> SortedList:
        return self._used if group.uses else self._unconsumed

    def _evict(self, entry: Entry, reason: str) -> None:
        group = self._groups.pop(entry.group_id)
        del self._entries[entry.group_id]
        self._order.remove(entry)
        self._side_of(group).remove(entry)
        self._num_tokens -= group.num_tokens
        self.counts[reason] += 1
        self._evicted.append((group, reason))

    def _check_choice(self, chosen: list[int], k: int, step: int) -> None:
        if len(set(chosen)) != k or not set(chosen) <= self._groups.keys():
            raise ConfigError(
                f"buffer.sampler = {self.config.sampler!r} is broken: asked for {k} different stored groups, "
                f"it chose {chosen}."
            )
        for group_id in chosen:
            self._bound.check(group_id, self._groups[group_id].version, step)


def _count_problems(num_stored: int, counts: Mapping[str, int]) -> list[str]:
    left = sum(counts.get(reason, 0) for reason in EVICTIONS)
    if counts.get("inserted", 0) == num_stored + left:
        return []
    return [f"{counts.get('inserted', 0)} groups inserted, but {num_stored} stored and {left} evicted"]
