"""The enforced lag: no batch is younger while something older can be had, none waits for ever, and what was
too young is counted.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.studies.lagged_replay import LaggedReplay
from buffer.replay import EVICTIONS
from buffer.sampling import SAMPLERS, GroupMeta
from core.config.buffer import BufferConfig
from core.staleness import AGELESS


def test_groups_wait_until_they_are_old_enough_and_the_pipeline_is_filled():
    replay = LaggedReplay(BufferConfig(sampler="fresh", max_staleness=5), 0, lag=2)
    for group_id in range(5):
        replay.insert(GroupMeta(group_id, 0, 1))
    assert replay.take(2, step=0) == [], "(2 + 1) * 2 groups are needed for two steps to have old ones"
    replay.insert(GroupMeta(5, 0, 1))
    assert replay.take(2, step=0) == [5, 4]
    for group_id, version in [(6, 1), (7, AGELESS), (8, 2), (9, 3)]:
        replay.insert(GroupMeta(group_id, version, 1))
    assert replay.take(2, step=2) == [7, 3], (
        "neither 1 nor 2 nor 3 is two steps old, and what has no age is never too young"
    )
    assert replay.take(3, step=3) == [], "fewer than 9 are stored"


@given(st.data())
@settings(deadline=None)  # On a busy machine any draw may take long.
def test_no_batch_is_younger_than_the_lag_and_one_always_comes(data):
    """Groups of any version that may exist come between the takes, as many as admission lets; nothing goes
    stale.
    """
    lag, k = data.draw(st.integers(1, 4), "lag"), data.draw(st.integers(1, 3), "k")
    capacity = data.draw(st.integers((lag + 1) * k, (lag + 3) * k), "capacity")
    sampler = data.draw(st.sampled_from(sorted(SAMPLERS)), "sampler")
    config = BufferConfig(sampler=sampler, max_staleness=1000, capacity=capacity)
    replay, next_id, step = LaggedReplay(config, 0, lag), 0, 0
    versions = {}
    for step in range(12):
        while not (taken := replay.take(k, step, is_full=len(replay) == capacity)):
            assert len(replay) < capacity, "deadlock: the buffer is full and nothing may be taken"
            for _ in range(data.draw(st.integers(1, capacity - len(replay)), "num_new")):
                versions[next_id] = data.draw(st.integers(max(0, step - 1), step), "version")
                replay.insert(GroupMeta(next_id, versions[next_id], 1))
                next_id += 1
        assert all(versions[group_id] <= max(0, step - lag) for group_id in taken)
    assert replay.counts["taken_young"] == 0
    assert len(replay) == next_id - sum(replay.counts[reason] for reason in EVICTIONS)


def test_a_full_buffer_of_young_groups_gives_the_oldest_and_counts_them():
    replay = LaggedReplay(BufferConfig(sampler="oldest", max_staleness=3, capacity=4), 0, lag=3)
    for group_id, version in [(0, 6), (1, 8), (2, 7), (3, 4)]:
        replay.insert(GroupMeta(group_id, version, 1))
    assert replay.take(2, step=7) == [], "only one of version <= 4, and (3 + 1) * 2 are not stored"
    assert replay.take(2, step=7, is_full=True) == [3, 0], (
        "the one that is old enough, and of the others the oldest"
    )
    assert replay.counts["taken_young"] == 1


def test_a_batch_waits_for_groups_that_are_old_enough_and_takes_young_ones_when_none_can_come():
    replay = LaggedReplay(BufferConfig(sampler="oldest", max_staleness=1, capacity=4), 0, lag=1)
    for group_id in range(3):
        replay.insert(GroupMeta(group_id, 0, 1))
    assert replay.take(2, 0) == [], "of four the learner may use two"
    replay.insert(GroupMeta(3, 0, 1))
    assert replay.take(2, 0, is_full=True) == [0, 1]
    replay.insert(GroupMeta(4, 1, 1))
    assert replay.take(2, 1) == []
    replay.insert(GroupMeta(5, 1, 1))
    assert replay.take(2, 1, is_full=True) == [2, 3], "4 and 5 are too young, and wait"
    for group_id in (6, 7):
        replay.insert(GroupMeta(group_id, 3, 1))
    assert replay.take(2, 3) == [], "4 and 5 went stale; what comes for them might be old enough"
    for group_id in (8, 9):
        replay.insert(GroupMeta(group_id, 3, 1))
    assert replay.take(2, 3, is_full=True) == [6, 7]
    assert (replay.counts["taken_young"], replay.counts["evicted_stale"]) == (2, 2)


def finish(seed: int) -> tuple[int, LaggedReplay]:
    """Eight learner steps, groups coming at random as young as can be; how many of those taken were too
    young, and the buffer.
    """
    rng = random.Random(seed)
    lag, k, slack = 1 + seed % 4, rng.randint(1, 2), rng.choice([0, 1, 2, 1000])
    capacity = (lag + 1) * k + rng.randint(0, 3)
    config = BufferConfig(
        sampler=rng.choice(sorted(SAMPLERS)),
        capacity=capacity,
        max_staleness=lag + slack,
    )
    replay, versions, num_young = LaggedReplay(config, 0, lag), [], 0
    step = 0
    for _ in range(1000):
        if step == 8:
            return num_young, replay
        for _ in range(rng.randint(0, capacity - len(replay))):
            replay.insert(GroupMeta(len(versions), step, 1))
            versions.append(step)
        if taken := replay.take(k, step, is_full=len(replay) == capacity):
            num_young += sum(versions[group_id] > max(0, step - lag) for group_id in taken)
            assert all(step - versions[group_id] <= config.max_staleness for group_id in taken)
            step += rng.choice([1, 1, 1, 2])
            step = min(step, 8)
    raise AssertionError(f"seed {seed}: a deadlock, the learner starves at step {step}")


def test_no_batch_is_younger_than_the_lag_but_where_a_full_buffer_holds_nothing_older():
    num_strict = total_young = 0
    for seed in range(400):
        num_young, replay = finish(seed)
        assert num_young == replay.counts["taken_young"]
        if not replay.counts["evicted_stale"]:
            num_strict += 1
            assert num_young == 0
        total_young += num_young
    assert num_strict > 30
    assert total_young > 0, "some of the tight ones had nothing older"


def test_a_lag_above_the_bound_and_groups_used_twice_are_refused():
    with pytest.raises(
        ValueError, match=r"a lag of 3 learner steps with buffer\.max_staleness = 2: raise that to 3"
    ):
        LaggedReplay(BufferConfig(max_staleness=2), 0, lag=3)
    with pytest.raises(ValueError, match=r"buffer\.uses_per_group = 2"):
        LaggedReplay(BufferConfig(uses_per_group=2), 0, lag=3)
