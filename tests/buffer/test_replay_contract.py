"""The pure half of the buffer: prompt stream, admission, samplers and eviction, each against a slow
obvious model.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from buffer.replay import Replay
from buffer.sampling import SAMPLERS, GroupMeta, View
from core.config.buffer import BufferConfig
from core.errors import ConfigError, DataError, StalenessError
from core.staleness import AGELESS

# Samplers


def view_of(groups: list[GroupMeta]) -> View:
    replay = Replay(BufferConfig(capacity=100), 0)
    for group in groups:
        replay.insert(group)
    return replay.view


def test_fresh_takes_the_newest_and_oldest_the_first():
    groups = [GroupMeta(10, 3, 1), GroupMeta(11, 5, 1), GroupMeta(12, 3, 1), GroupMeta(13, 4, 1)]
    rng = np.random.default_rng(0)
    assert SAMPLERS["fresh"](view_of(groups), 3, 8, rng) == [11, 13, 12]
    assert SAMPLERS["oldest"](view_of(groups), 3, 8, rng) == [10, 11, 12]


def test_uniform_takes_every_group_equally_often():
    view = view_of([GroupMeta(group_id, 0, 1) for group_id in range(10)])
    rng = np.random.default_rng(0)
    taken = Counter(group_id for _ in range(4000) for group_id in SAMPLERS["uniform"](view, 3, 0, rng))
    expected, sigma = 4000 * 0.3, (4000 * 0.3 * 0.7) ** 0.5
    assert all(abs(taken[group_id] - expected) < 4.5 * sigma for group_id in range(10))


def test_groups_without_age_are_the_newest_and_never_stale():
    replay = Replay(BufferConfig(sampler="fresh", max_staleness=2, capacity=3, uses_per_group=2), 0)
    for group_id, version in [(0, 1), (1, AGELESS), (2, 7), (3, AGELESS)]:
        replay.insert(GroupMeta(group_id, version, 1))
    assert [group.group_id for group, _ in replay.pop_evicted()] == [0], (
        "for capacity, the oldest with an age"
    )
    assert replay.take(2, step=9) == [3, 1], "newest first, and the later one before the earlier one"
    assert replay.take(3, step=9000) == [], "2 is stale by now"
    assert replay.take(2, step=9001) == [3, 1]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_takes_different_stored_groups(name):
    rng = np.random.default_rng(1)
    for size in range(1, 30):
        groups = [
            GroupMeta(int(group_id), int(rng.integers(4)), 1) for group_id in rng.permutation(100)[:size]
        ]
        for k in range(1, size + 1):
            chosen = SAMPLERS[name](view_of(groups), k, 3, rng)
            assert len(set(chosen)) == k
            assert set(chosen) <= {group.group_id for group in groups}


# Replay


class ReplayModel:
    """A list of [id, version, uses] in order of insertion; all rules by scanning it."""

    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self.rows: list[list[int]] = []
        self.counts: Counter[str] = Counter()

    def insert(self, group_id: int, version: int) -> bool:
        if any(row[0] == group_id for row in self.rows):
            self.counts["duplicates"] += 1
            return False
        self.rows.append([group_id, version, 0])
        self.counts["inserted"] += 1
        unconsumed = [row for row in self.rows if row[2] == 0]
        if len(unconsumed) > self.config.capacity:
            self.rows.remove(min(unconsumed, key=lambda row: row[1]))
            self.counts["evicted_capacity"] += 1
        if len(self.rows) > self.config.uses_per_group * self.config.capacity:
            self.rows.remove(min((row for row in self.rows if row[2]), key=lambda row: row[1]))
            self.counts["evicted_surplus"] += 1
        return True

    def evict_stale(self, step: int) -> None:
        fresh = [row for row in self.rows if step - row[1] <= self.config.max_staleness]
        self.counts["evicted_stale"] += len(self.rows) - len(fresh)
        self.rows = fresh

    def take(self, k: int, step: int, got: list[int]) -> None:
        self.evict_stale(step)
        assert len(got) == (k if len(self.rows) >= k else 0)
        assert len(set(got)) == len(got)
        for row in [row for row in self.rows if row[0] in got]:
            assert step - row[1] <= self.config.max_staleness
            row[2] += 1
            got = [group_id for group_id in got if group_id != row[0]]
            if row[2] == self.config.uses_per_group:
                self.rows.remove(row)
                self.counts["evicted_used"] += 1
        assert got == [], "took a group that is not stored"


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("seed", range(8))
def test_replay_agrees_with_an_obvious_model(sampler, seed):
    rng = random.Random(seed)
    config = BufferConfig(
        sampler=sampler,
        uses_per_group=rng.randint(1, 3),
        max_staleness=rng.randint(0, 5),
        capacity=rng.randint(2, 12),
    )
    replay, model = Replay(config, seed), ReplayModel(config)
    step = 0
    for _ in range(600):
        match rng.choice(["insert", "insert", "insert", "take", "evict", "restart"]):
            case "insert":
                group_id, version = rng.randint(0, 80), max(0, step - rng.randint(0, 4))
                assert replay.insert(GroupMeta(group_id, version, 10)) == model.insert(group_id, version)
            case "take":
                k = rng.randint(1, 5)
                model.take(k, step, replay.take(k, step))
                step += 1
            case "evict":
                replay.evict_stale(step)
                model.evict_stale(step)
            case "restart":
                state = replay.get_state()
                replay = Replay(config, seed)
                replay.set_state(state)
        assert [
            [group.group_id, group.oldest_version, group.uses] for group in replay.get_state()["groups"]
        ] == model.rows
        # tests/buffer/test_sampling.py has a model of that.
        model.counts["strata_short"] = replay.counts["strata_short"]
        assert +replay.counts == +model.counts
        assert replay.num_unconsumed == sum(row[2] == 0 for row in model.rows)
        assert replay.check_valid() == []
    assert step > 50


def test_the_choice_depends_on_seed_step_and_contents_only():
    config = BufferConfig(sampler="uniform", uses_per_group=9)

    def chosen(seed: int, step: int, warm_up: int) -> list[int]:
        replay = Replay(config, seed)
        for group_id in range(20):
            replay.insert(GroupMeta(group_id, 0, 1))
        for earlier in range(warm_up):
            replay.take(2, earlier)
        return replay.take(5, step)

    assert chosen(1, 8, warm_up=0) == chosen(1, 8, warm_up=6)
    assert chosen(1, 8, 0) != chosen(1, 9, 0) != chosen(2, 9, 0)


def test_groups_that_are_used_but_never_used_up_do_not_pile_up():
    replay = Replay(BufferConfig(sampler="fresh", uses_per_group=3, max_staleness=10**6, capacity=2), 0)
    for step in range(50):
        replay.insert(GroupMeta(step, step, 1))
        assert replay.take(1, step) == [step]
        assert len(replay) <= 6
    assert [(group.group_id, reason) for group, reason in replay.pop_evicted()] == [
        (n, "evicted_surplus") for n in range(44)
    ]
    assert replay.check_valid() == []


def test_evictions_are_reported_with_their_reason():
    replay = Replay(BufferConfig(sampler="oldest", uses_per_group=1, max_staleness=2, capacity=2), 0)
    for group_id, version in [(0, 5), (1, 3), (2, 6)]:
        replay.insert(GroupMeta(group_id, version, 1))
    assert replay.take(1, step=8) == [2], "1 went for capacity, 0 is too old"
    assert [(group.group_id, reason) for group, reason in replay.pop_evicted()] == [
        (1, "evicted_capacity"),
        (0, "evicted_stale"),
        (2, "evicted_used"),
    ]
    assert not replay.has_evicted


def test_invariant_3_a_stale_group_that_gets_through_is_an_error(monkeypatch):
    replay = Replay(BufferConfig(max_staleness=2), 0)
    replay.insert(GroupMeta(4, 1, 1))
    monkeypatch.setattr(replay, "evict_stale", lambda step: None)
    with pytest.raises(
        StalenessError, match="group 4 has a token of version 1 at learner step 4: staleness 3"
    ):
        replay.take(1, step=4)
    assert replay[4].uses == 0


def test_a_sampler_that_repeats_itself_is_an_error(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "fresh", lambda view, k, step, rng: [view.by_age(0).group_id] * k)
    replay = Replay(BufferConfig(sampler="fresh"), 0)
    for group_id in range(3):
        replay.insert(GroupMeta(group_id, 0, 1))
    with pytest.raises(ConfigError, match="'fresh' is broken"):
        replay.take(2, step=0)


def test_a_lower_uses_per_group_lets_used_groups_go_on_restart():
    replay = Replay(BufferConfig(uses_per_group=3, sampler="oldest"), 0)
    for group_id in range(2):
        replay.insert(GroupMeta(group_id, 0, 1))
    replay.take(1, 0)
    replay.take(1, 1)
    again = Replay(BufferConfig(uses_per_group=2), 0)
    again.set_state(replay.get_state())
    assert 0 not in again
    assert again.counts["evicted_used"] == 1
    assert again.check_valid() == []


def test_a_state_that_contradicts_itself_is_refused():
    replay = Replay(BufferConfig(), 0)
    with pytest.raises(DataError, match="2 groups inserted, but 1 stored and 0 evicted"):
        replay.set_state({"groups": [GroupMeta(1, 0, 1)], "counts": {"inserted": 2}})
