"""What the samplers choose, as statistics, and that a batch costs the same however much is stored."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer import sampling
from buffer.replay import Replay, meta_of
from buffer.sampling import SAMPLERS, GroupMeta, View, priority, stratified, uniform
from core.config.buffer import BufferConfig
from core.records import Group, Sample, VersionSpan
from core.staleness import AGELESS


def make_replay(groups: list[GroupMeta], **fields: object) -> Replay:
    replay = Replay(
        BufferConfig.model_validate(
            {"capacity": 10**6, "max_staleness": 1000, "uses_per_group": 10, **fields}
        ),
        0,
    )
    for group in groups:
        assert replay.insert(group)
    return replay


# What the samplers choose


def assert_frequencies(seen: Counter, expected: dict, num_draws: int) -> None:
    """Each outcome within 4.5 standard deviations of its probability; nothing else occurred."""
    assert sum(expected.values()) == pytest.approx(1)
    assert seen.keys() <= expected.keys()
    for outcome, chance in expected.items():
        sigma = math.sqrt(num_draws * chance * (1 - chance))
        assert abs(seen[outcome] - num_draws * chance) < 4.5 * sigma + 1e-9, (
            outcome,
            seen[outcome],
            num_draws * chance,
        )


def test_uniform_gives_every_pair_of_what_is_left_the_same_chance():
    replay = make_replay([GroupMeta(group_id, group_id % 3, 1) for group_id in range(18)], max_staleness=5)
    replay.evict_stale(7)
    left = [group.group_id for group in replay.get_state()["groups"]]
    assert left == [2, 5, 8, 11, 14, 17]
    rng = np.random.default_rng(1)
    seen = Counter(tuple(sorted(uniform(replay.view, 2, 7, rng))) for _ in range(6000))
    assert_frequencies(seen, dict.fromkeys(itertools.combinations(left, 2), 1 / 15), 6000)


def test_stratified_keeps_its_quotas_and_is_uniform_within_a_range():
    """At step 20: 16 groups of staleness 0-1 (two without age, one of a version to come), 12 of 2-7, 12
    of 8+.
    """
    versions = [AGELESS, 20, 21, *[19] * 12, AGELESS, *[18, 17, 13] * 4, *[12, 3, 0] * 4]
    replay = make_replay([GroupMeta(group_id, version, 1) for group_id, version in enumerate(versions)])
    ranges = [range(16), range(16, 28), range(28, 40)]
    rng = np.random.default_rng(2)
    seen: Counter = Counter()
    for _ in range(2000):
        chosen = stratified(replay.view, 10, 20, rng)
        assert [len(set(ids) & set(chosen)) for ids in ranges] == [5, 3, 2]
        seen.update(chosen)
    for ids, quota in zip(ranges, (5, 3, 2), strict=True):
        chance = quota / len(ids)
        sigma = math.sqrt(2000 * chance * (1 - chance))
        assert all(abs(seen[group_id] - 2000 * chance) < 4.5 * sigma for group_id in ids)
    assert "strata_short" not in replay.counts


@pytest.mark.parametrize(
    ("sizes", "k", "expected", "num_short"),
    [
        ((20, 20, 20), 10, [5, 3, 2], 0),
        ((20, 20, 20), 7, [4, 2, 1], 0),  # 3.5, 2.1, 1.4
        ((20, 20, 20), 1, [1, 0, 0], 0),
        ((2, 20, 20), 10, [2, 6, 2], 3),
        ((20, 0, 20), 10, [8, 0, 2], 3),  # of two neighbours the younger
        ((6, 0, 20), 10, [6, 0, 4], 3),
        ((20, 20, 0), 10, [5, 5, 0], 2),
        ((3, 3, 20), 10, [3, 3, 4], 2),
        ((20, 0, 0), 10, [10, 0, 0], 5),
        ((1, 0, 9), 10, [1, 0, 9], 7),
    ],
)
def test_what_a_range_lacks_comes_from_the_nearest_and_is_counted(sizes, k, expected, num_short):
    stalenesses = [staleness for staleness, size in zip((1, 2, 8), sizes, strict=True) for _ in range(size)]
    replay = make_replay(
        [GroupMeta(group_id, 50 - staleness, 1) for group_id, staleness in enumerate(stalenesses)],
        sampler="stratified",
    )
    seen = Counter(stalenesses[group_id] for group_id in replay.take(k, 50))
    assert [seen[staleness] for staleness in (1, 2, 8)] == expected
    assert replay.counts["strata_short"] == num_short


def test_priority_draws_one_after_the_other_in_proportion_to_its_weights():
    groups = [
        GroupMeta(0, 16, 1, uses=0, reward_std=0.3),
        GroupMeta(1, 8, 1, uses=0, reward_std=0.3),
        GroupMeta(2, AGELESS, 1, uses=1, reward_std=0.6),
        GroupMeta(3, 0, 1, uses=3, reward_std=0.0),
    ]
    # At step 16, where the mean spread is 0.3: halved every 8 steps, divided by 1 + uses, times 0.1 + spread
    # / mean.
    weights = {0: 1.1, 1: 0.5 * 1.1, 2: 0.5 * 2.1, 3: 0.25 * 0.25 * 0.1}
    assert np.exp(sampling.log_weights(groups, 16)) == pytest.approx(list(weights.values()), rel=1e-12)
    total = sum(weights.values())
    expected = {
        (first, second): weights[first] / total * weights[second] / (total - weights[first])
        for first, second in itertools.permutations(weights, 2)
    }
    view, rng = make_replay(groups).view, np.random.default_rng(3)
    seen = Counter(tuple(priority(view, 2, 16, rng)) for _ in range(20_000))
    assert_frequencies(seen, expected, 20_000)


def test_the_scale_of_rewards_does_not_matter_to_priority_and_no_spread_or_age_breaks_it():
    def chosen(scale: float) -> list[int]:
        groups = [GroupMeta(i, i % 7, 1, reward_std=scale * (i % 5)) for i in range(100)]
        return priority(make_replay(groups).view, 40, 7, np.random.default_rng(4))

    assert chosen(1.0) == chosen(1024.0)
    ancient = [GroupMeta(i, 0, 1) for i in range(10)]
    assert sorted(priority(make_replay(ancient).view, 10, 10**8, np.random.default_rng(4))) == list(range(10))


def test_priority_draws_from_a_pool_where_there_are_more_groups(monkeypatch):
    monkeypatch.setattr(sampling, "POOL_GROUPS", 100)
    view = make_replay([GroupMeta(i, 0, 1, uses=0 if i % 2 else 2) for i in range(600)]).view
    looked_at: Counter[str] = Counter()
    monkeypatch.setattr(View, "by_insertion", counted(View.by_insertion, looked_at))
    chosen: Counter[int] = Counter()
    rng = np.random.default_rng(5)
    for _ in range(3000):
        chosen.update(group_id % 2 for group_id in priority(view, 1, 0, rng))
    assert looked_at["calls"] == 3000 * 100
    assert_frequencies(chosen, {1: 0.75, 0: 0.25}, 3000)
    looked_at.clear()
    assert len(set(priority(view, 50, 0, rng))) == 50
    assert looked_at["calls"] == 400, "eight for each that is chosen"


@given(st.lists(st.one_of(st.none(), st.floats(-1e150, 1e150)), min_size=1, max_size=9))
@settings(deadline=None)
def test_the_spread_of_a_group_is_the_population_standard_deviation_of_its_rewards(rewards):
    samples = tuple(
        Sample.one_turn(
            (1,),
            (1,),
            (-1.0,),
            version_spans=(VersionSpan(0, 0, 1),),
            finish_reason="stop",
            text="",
            reward=reward,
        )
        for reward in rewards
    )
    group = Group(group_id=0, prompt_index=0, source_row=0, prompt="", samples=samples)
    known = [reward for reward in rewards if reward is not None]
    largest = max(map(abs, known), default=0.0)
    assert meta_of(group).reward_std == pytest.approx(
        statistics.pstdev(known) if known else 0.0, rel=1e-9, abs=1e-14 * largest + 5e-324
    )


# What it costs


def counted(function: Callable, calls: Counter) -> Callable:
    def wrapper(*args):
        calls["calls"] += 1
        return function(*args)

    return wrapper


def lines_run(function: Callable[[], object]) -> int:
    """Lines of Python that a call runs, those of what it calls included: its work, without a clock."""
    num_lines = 0

    def trace(frame, event, arg):
        nonlocal num_lines
        num_lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return num_lines


def many_groups(size: int) -> list[GroupMeta]:
    """Versions 0 to 15 in this order, as they come in a run."""
    return [
        GroupMeta(group_id, group_id * 16 // size, 1000 + group_id, 0, group_id % 9 / 8)
        for group_id in range(size)
    ]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_work_of_a_batch_does_not_grow_with_what_is_stored(sampler, monkeypatch):
    looked_at: Counter[str] = Counter()
    lines, calls = [], []
    for name in ("by_insertion", "by_age", "num_older"):
        monkeypatch.setattr(View, name, counted(getattr(View, name), looked_at))
    for size in (20_000, 100_000):
        replay = make_replay([], sampler=sampler)
        replay.set_state({"groups": many_groups(size), "counts": {"inserted": size}})
        replay.take(32, 16)  # Everything that is moved once, at its time, is moved.
        looked_at.clear()
        lines.append(lines_run(partial(replay.take, 32, 16)) + lines_run(partial(replay.num_takeable, 16)))
        calls.append(looked_at["calls"])
        assert replay.counts["evicted_used"] == 0
        assert len(replay) == size
    assert calls[0] == calls[1] <= sampling.POOL_GROUPS
    assert lines[1] <= 1.3 * lines[0], "five times the groups; a balanced tree is one level deeper, if at all"


@pytest.mark.slow
def test_an_index_of_100_000_groups_stays_below_200_mb():
    tracemalloc.start()
    try:
        replay = make_replay(many_groups(100_000))
        replay.take(32, 16)
        index_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(replay) == 100_000
    assert index_bytes < 200e6
