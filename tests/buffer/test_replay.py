"""The index of stored groups: random operations with every sampler against a slow obvious model."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from buffer.replay import Replay
from buffer.sampling import SAMPLERS, GroupMeta
from core.config.buffer import BufferConfig
from core.errors import DataError
from core.staleness import AGELESS

MIXES = [
    ({"0-1": 0.5, "2-3": 0.25, "4+": 0.25}, [(0, 1, 0.5), (2, 3, 0.25), (4, math.inf, 0.25)]),
    ({"1": 0.25, "3-4": 0.75}, [(0, 0, 0.0), (1, 1, 0.25), (2, 2, 0.0), (3, 4, 0.75), (5, math.inf, 0.0)]),
]
"""Shares of `stratified`, and all ranges of staleness there are then, with shares exact as floats."""


class ReplayModel:
    """The stored groups, a list in order of insertion; all rules by scanning it."""

    def __init__(self, config: BufferConfig, ranges: list[tuple[int, float, float]]) -> None:
        self.config, self.ranges = config, ranges
        self.rows: list[GroupMeta] = []
        self.counts: Counter[str] = Counter()

    def evict(self, row: GroupMeta, reason: str) -> None:
        self.rows.remove(row)
        self.counts[reason] += 1

    def insert(self, row: GroupMeta) -> bool:
        if any(row.group_id == stored.group_id for stored in self.rows):
            self.counts["duplicates"] += 1
            return False
        self.rows.append(row)
        self.counts["inserted"] += 1
        unconsumed = [stored for stored in self.rows if stored.uses == 0]
        if len(unconsumed) > self.config.capacity:
            self.evict(min(unconsumed, key=lambda stored: stored.oldest_version), "evicted_capacity")
        if len(self.rows) > self.config.uses_per_group * self.config.capacity:
            used = [stored for stored in self.rows if stored.uses]
            self.evict(min(used, key=lambda stored: stored.oldest_version), "evicted_surplus")
        return True

    def evict_stale(self, step: int) -> None:
        for row in [row for row in self.rows if step - row.oldest_version > self.config.max_staleness]:
            self.evict(row, "evicted_stale")

    def takeable(self, step: int) -> int:
        return sum(step - row.oldest_version <= self.config.max_staleness for row in self.rows)

    def check_take(self, k: int, step: int, got: list[int]) -> None:
        """Asserts that `got` is a batch this buffer may give, and uses it."""
        self.evict_stale(step)
        if len(self.rows) >= k:
            assert len(got) == len(set(got)) == k
            self.check_sampled(k, step, got)
        else:
            assert got == []
        taken = [row for row in self.rows if row.group_id in got]
        assert len(taken) == len(got), "took a group that is not stored"
        for row in taken:
            assert row.uses < self.config.uses_per_group
            used = self.rows[self.rows.index(row)] = msgspec.structs.replace(row, uses=row.uses + 1)
            if used.uses == self.config.uses_per_group:
                self.evict(used, "evicted_used")

    def check_sampled(self, k: int, step: int, got: list[int]) -> None:
        match self.config.sampler_name:
            case "fresh":
                newest = sorted(self.rows, key=lambda row: row.oldest_version)[::-1]
                assert got == [row.group_id for row in newest[:k]]
            case "oldest":
                assert got == [row.group_id for row in self.rows[:k]]
            case "stratified":
                by_range = [
                    [row.group_id for row in self.rows if self.range_of(row, step) == index]
                    for index in range(len(self.ranges))
                ]
                expected = self.expected_mix(k, [len(ids) for ids in by_range])
                assert [len(set(ids) & set(got)) for ids in by_range] == expected

    def range_of(self, row: GroupMeta, step: int) -> int:
        staleness = max(0, step - row.oldest_version)
        return next(index for index, (first, last, _) in enumerate(self.ranges) if first <= staleness <= last)

    def expected_mix(self, k: int, sizes: list[int]) -> list[int]:
        """Slot by slot: each slot belongs to a range, and goes to the nearest one that has a group left."""
        shares = [Fraction(share) for *_, share in self.ranges]
        quotas = [math.floor(k * share) for share in shares]
        for _ in range(k - sum(quotas)):
            behind = [k * share - quota for share, quota in zip(shares, quotas, strict=True)]
            quotas[behind.index(max(behind))] += 1
        numbers = [min(quota, size) for quota, size in zip(quotas, sizes, strict=True)]
        for index, quota in enumerate(quotas):
            for _ in range(max(0, quota - sizes[index])):
                spare = [other for other in range(len(sizes)) if numbers[other] < sizes[other]]
                numbers[min(spare, key=lambda other: (abs(other - index), other))] += 1
                self.counts["strata_short"] += 1
        return numbers


class ReplayMachine(RuleBasedStateMachine):
    sampler: str

    @initialize(
        mix=st.sampled_from(MIXES),
        max_staleness=st.integers(3, 9),
        uses_per_group=st.integers(1, 4),
        capacity=st.sampled_from([2, 12, 40]),
    )
    def start(self, mix, max_staleness, uses_per_group, capacity):
        fields = {
            "max_staleness": max_staleness,
            "uses_per_group": uses_per_group,
            "capacity": capacity,
        }
        sampler = {"stratified": mix[0]} if self.sampler == "stratified" else self.sampler
        self.config = BufferConfig.model_validate({"sampler": sampler, **fields})
        self.replay, self.model = Replay(self.config, 5), ReplayModel(self.config, mix[1])
        self.step, self.left = 6, 0

    @rule(
        first_id=st.integers(0, 300),
        stalenesses=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4, 6, 9, None]), min_size=4, max_size=16),
        std=st.sampled_from([0.0, 0.5, 2.0]),
    )
    def insert(self, first_id, stalenesses, std):
        for group_id, staleness in enumerate(stalenesses, first_id):
            version = AGELESS if staleness is None else max(0, self.step - staleness)
            group = GroupMeta(group_id, version, 1 + group_id % 7, reward_std=std)
            assert self.replay.insert(group) == self.model.insert(group)

    @rule(k=st.integers(1, 8), num_steps=st.integers(0, 2))
    def take(self, k, num_steps):
        self.step += num_steps
        self.model.check_take(k, self.step, self.replay.take(k, self.step))

    @rule(num_steps=st.integers(0, 3))
    def evict_stale(self, num_steps):
        self.step += num_steps
        self.replay.evict_stale(self.step)
        self.model.evict_stale(self.step)

    @rule()
    def the_learner_goes_back_to_a_checkpoint(self):
        self.step = max(0, self.step - 2)
        self.take(1, 0)

    @rule()
    def restart(self):
        self.left += len(self.replay.pop_evicted())
        state = self.replay.get_state()
        self.replay = Replay(self.config, 5)
        self.replay.set_state(state)
        assert self.replay.get_state() == state

    @precondition(lambda self: self.model.rows)
    @rule(k=st.integers(1, 3))
    def a_restarted_buffer_would_choose_the_same(self, k):
        twin = Replay(self.config, 5)
        twin.set_state(self.replay.get_state())
        self.take(k, 0)
        twin.take(k, self.step)
        assert twin.get_state() == self.replay.get_state()

    @invariant()
    def agrees_with_the_model(self):
        assert self.replay.get_state()["groups"] == self.model.rows
        assert +self.replay.counts == +self.model.counts
        assert len(self.replay) == len(self.model.rows)
        assert self.replay.num_unconsumed == sum(row.uses == 0 for row in self.model.rows)
        assert self.replay.num_tokens == sum(row.num_tokens for row in self.model.rows)
        assert [self.replay.num_takeable(self.step + ahead) for ahead in (0, 3)] == [
            self.model.takeable(self.step + ahead) for ahead in (0, 3)
        ]
        assert self.replay.check_valid() == []

    def teardown(self):
        if hasattr(self, "model"):
            num_left = sum(
                count for reason, count in self.model.counts.items() if reason.startswith("evicted")
            )
            assert self.left + len(self.replay.pop_evicted()) == num_left, (
                "every group that leaves is reported once"
            )


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_replay_agrees_with_an_obvious_model(name):
    class Machine(ReplayMachine):
        sampler = name

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=50, stateful_step_count=40, deadline=None)
    )


def test_a_state_that_is_refused_changes_nothing():
    replay = Replay(BufferConfig(), 0)
    replay.insert(GroupMeta(3, 0, 7))
    before = replay.get_state()
    for groups, problem in [
        ([GroupMeta(1, 0, 1)] * 2, "twice"),
        ([GroupMeta(1, 0, 1)], "contradicts itself"),
    ]:
        with pytest.raises(DataError, match=problem):
            replay.set_state({"groups": groups, "counts": {"inserted": 2}})
    assert replay.get_state() == before
    assert replay.check_valid() == []
