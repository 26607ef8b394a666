"""The autoscaling rule in virtual time: when it grows, when it shrinks, and that a constant load settles."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import PAUSE_S, WINDOW_S, Autoscaler, Load


def load(
    time_s: float,
    learner_s: float = 0.0,
    actors_s: tuple[float, ...] = (0.0, 0.0),
    *,
    settled: bool = True,
    step: int = 5,
    count: int = 2,
) -> Load:
    waits = {f"actor-{number}": wait_s for number, wait_s in enumerate(actors_s)}
    return Load(time_s, learner_s, waits, count, settled, step)


@pytest.mark.parametrize(
    ("learner_s", "actors_s", "count", "expected"),
    [
        (1.6, (0.0, 0.0), 2, 3),  # 11 % of 15 s.
        (1.4, (0.0, 0.0), 2, None),  # 9 %.
        (15.0, (0.0, 0.0), 4, None),  # At the maximum.
        (0.0, (8.0, 8.0), 2, 1),  # 53 %.
        (0.0, (15.0, 0.0), 2, None),  # 50 % of both together.
        (0.0, (15.0,), 1, None),  # At the minimum.
        (0.2, (15.0, 15.0), 2, None),  # The learner did wait.
        (0.0, (), 1, None),
    ],
)
def test_one_window_decides_by_who_waited(
    learner_s: float, actors_s: tuple[float, ...], count: int, expected: int | None
) -> None:
    rule = Autoscaler(1, 4)
    assert rule.judge(load(0, 100.0, tuple(7.0 for _ in actors_s), count=count)) is None
    decision = rule.judge(
        load(WINDOW_S, 100.0 + learner_s, tuple(7.0 + wait_s for wait_s in actors_s), count=count, step=6)
    )
    assert (decision[0] if decision else None) == expected
    if decision:
        assert "waited" in decision[1]
        assert "last 15 s" in decision[1]


@pytest.mark.parametrize(
    ("learner_s", "rewards_s", "expected"),
    [
        (15.0, (9.0, 9.0), None),  # Actors that wait for rewards: more of them would wait too.
        (15.0, (7.0, 7.0), 3),
        (0.0, (9.0, 9.0), 1),  # Nobody needs them.
    ],
)
def test_actors_that_wait_for_rewards_are_not_taken_for_too_few(
    learner_s: float, rewards_s: tuple[float, ...], expected: int | None
) -> None:
    rule = Autoscaler(1, 4)
    waits = {f"actor-{number}": wait_s for number, wait_s in enumerate(rewards_s)}
    assert rule.judge(load(0)._replace(reward_waits_s=dict.fromkeys(waits, 0.0))) is None
    decision = rule.judge(load(WINDOW_S, learner_s, step=6)._replace(reward_waits_s=waits))
    assert (decision[0] if decision else None) == expected


@pytest.mark.parametrize(
    "middle",
    [
        load(7, 7.0, settled=False),  # An actor loads, waits for its place, or retires.
        load(7, 7.0, step=0),  # The first batch is not there yet.
        load(7, 0.0),  # The buffer's counter began anew.
        load(7, 7.0, (0.0, 0.0, 0.0)),  # An actor was replaced.
    ],
)
def test_a_window_in_which_something_was_under_way_does_not_count(middle: Load) -> None:
    rule = Autoscaler(1, 4)
    assert rule.judge(load(0, 5.0)) is None
    assert rule.judge(middle) is None
    assert rule.judge(load(16, 15.0)) is None


def test_a_learner_in_a_long_step_or_hung_is_no_reason_to_shrink() -> None:
    rule = Autoscaler(1, 4)
    decisions = [rule.judge(load(time_s, 0.0, (float(time_s), float(time_s)))) for time_s in range(60)]
    assert decisions == [None] * 60
    decision = rule.judge(load(60, 0.0, (60.0, 60.0), step=6))
    assert decision is not None
    assert decision[0] == 1
    assert "of the last 60 s" in decision[1]


def test_after_a_change_there_is_a_pause() -> None:
    rule = Autoscaler(1, 8)
    decisions = [(time_s, rule.judge(load(time_s, float(time_s)))) for time_s in range(200)]
    times_s = [time_s for time_s, decision in decisions if decision]
    assert times_s[0] == WINDOW_S
    assert all(later - earlier >= PAUSE_S + WINDOW_S for earlier, later in itertools.pairwise(times_s))
    manual = Autoscaler(1, 8)
    manual.judge(load(0))
    manual.changed(10.0)
    assert manual.judge(load(20, 20.0)) is None


@settings(max_examples=300, deadline=None)
@given(
    rate=st.floats(0.05, 20.0),
    demand=st.floats(0.05, 20.0),
    start=st.integers(1, 12),
    bounds=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    load_s=st.integers(0, 40),
)
def test_a_constant_load_settles_and_never_goes_back(
    rate: float, demand: float, start: int, bounds: tuple[int, int], load_s: int
) -> None:
    """`rate`: groups a second of one actor; `demand`: what the learner can take. A new actor loads for
    `load_s`.
    """
    least, most = min(bounds), max(bounds)
    count, rule, counts = min(most, max(least, start)), Autoscaler(least, most), []
    learner_s, waits_s, ready_s = 0.0, dict.fromkeys(range(count), 0.0), 0
    for time_s in range(1500):
        made = rate * len(waits_s)
        learner_s += max(0.0, 1 - made / demand)
        waits_s = {number: wait_s + max(0.0, 1 - demand / made) for number, wait_s in waits_s.items()}
        names = {f"actor-{number}": wait_s for number, wait_s in waits_s.items()}
        decision = rule.judge(Load(time_s, learner_s, names, count, time_s >= ready_s, 1 + time_s))
        if time_s >= ready_s and len(waits_s) != count:
            waits_s = {number: waits_s.get(number, 0.0) for number in range(count)}
        if decision:
            counts.append(decision[0] - count)
            count, ready_s = decision[0], time_s + load_s
            if counts[-1] < 0:
                waits_s = {number: waits_s[number] for number in range(count)}
    assert least <= count <= most
    assert len(set(counts)) <= 1  # All up, or all down.
    assert counts[-1:] == [] or len(counts) < most
    made = rate * count
    assert made >= 0.9 * demand - 1e-6 or count == most
