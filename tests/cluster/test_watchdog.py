"""The watchdog names the stage that stalls, from two observations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.watchdog import MIN_QUIET_S, RECENT_S, Observation, Watchdog, stalled_stage

pytestmark = pytest.mark.timed


def seen(
    time_s: float,
    *,
    step: int = 3,
    actors: dict[str, dict[str, Any]] | None = None,
    absent: tuple[str, ...] = (),
    waited: float = 0.0,
    evaluations: int = 0,
    full_disk: str = "",
    **stats: float,
) -> Observation:
    return Observation(
        time_s=time_s,
        step=step,
        actors={} if actors is None else actors,
        absent=absent,
        stats={"buffer/wait_batch_s": waited, **{f"buffer/{name}": value for name, value in stats.items()}},
        num_evaluations=evaluations,
        group_size=4,
        admitted_groups=24,
        full_disk=full_disk,
    )


def actor(**counters: float) -> dict[str, float]:
    return {
        "version": 6.0,
        "generated_samples": 80.0,
        "groups": 20.0,
        "busy_s": 50.0,
        "wait_admission_s": 5.0,
        **counters,
    }


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (seen(10, actors={"a": actor()}, waited=0.0, groups=40), "the learner is in its step"),
        (
            seen(10, waited=10, absent=("actor-0 loading for 40 s",)),
            "no actor is running; actor-0 loading for 40 s",
        ),
        (
            seen(10, actors={"a": actor(wait_weights_s=9.0)}, waited=10),
            "the actors wait for weights (versions 6)",
        ),
        (
            seen(10, actors={"a": actor(wait_disk_s=9.0)}, waited=10),
            "the buffer takes nothing: its disk is full",
        ),
        (
            seen(10, actors={"a": actor(wait_environment_s=9.0)}, waited=10),
            "the actors wait for their environments",
        ),
        (
            seen(10, actors={"a": actor(busy_s=60.0)}, waited=10, full_disk="the disk of /run refuses"),
            "the disk of /run refuses",
        ),
        (seen(10, actors={"a": actor(busy_s=59.0)}, waited=10, evaluations=1), "evaluation: 1 of them open"),
        (seen(10, actors={"a": actor(generated_samples=88.0)}, waited=10), "rewards are pending: 2 groups"),
        (
            seen(10, actors={"a": actor(wait_admission_s=15.0)}, waited=10, leased=4, unconsumed=20),
            "admission is closed: 24 of 24 groups",
        ),
        (
            seen(10, actors={"a": actor(busy_s=60.0)}, waited=10, leased=16),
            "the actors generate, but no group is finished (16 leased)",
        ),
        (
            seen(10, actors={"a": actor(busy_s=60.0, groups=25.0, generated_samples=100.0)}, waited=10),
            "groups come, but slowly: 0.50 a second",
        ),
    ],
)
def test_the_stalled_stage_is_named(after: Observation, expected: str) -> None:
    assert expected in stalled_stage(seen(0, actors={"a": actor()}), after)


def feed(dog: Watchdog, times_s: Iterator[int] | range, step: int) -> list[tuple[int, str]]:
    told = [(time_s, dog.judge(seen(time_s, step=step, waited=float(time_s)))) for time_s in times_s]
    return [(time_s, text) for time_s, text in told if text]


def test_a_stall_is_told_once_after_sixty_seconds_and_again_after_a_step() -> None:
    dog = Watchdog(timeout_s=600)
    found = feed(dog, range(200), step=1)
    assert [time_s for time_s, _ in found] == [MIN_QUIET_S]
    assert "no optimizer step for 60 s after step 1: no actor is running" in found[0][1]
    # The step took 200 s; half of the timeout.
    assert [time_s for time_s, _ in feed(dog, range(200, 2500), step=2)] == [200 + 300]


def test_a_stall_is_ten_median_steps_at_most_half_of_the_timeout() -> None:
    dog = Watchdog(timeout_s=1000)
    for step in range(10):
        dog.judge(seen(step * 12, step=step))
    assert dog.quiet_s == 120
    assert Watchdog(timeout_s=60).quiet_s == 30
    assert RECENT_S < MIN_QUIET_S
