"""`async def` reward functions in the pool: many calls at once; what hangs, blocks or dies costs itself."""

from __future__ import annotations

import threading
import time

import pytest

from core.config import RewardsConfig
from rewards.pool import RewardPool
from rewards.scoring import Scored
from tests.support.clocks.machine import machine_s

pytestmark = pytest.mark.timed

LIMIT_S = 60.0


def pool_of(*names, **settings):
    functions = dict.fromkeys((f"tests.support.rewards.asynchronous:{name}" for name in names), 1.0)
    return RewardPool(RewardsConfig(functions=functions, **settings))


def submit(pool, *completions):
    return pool.submit("q", completions, {})


def score(pool, *completions):
    return submit(pool, *completions).result(LIMIT_S)


def test_32_calls_of_a_second_take_two_at_most_by_default():
    with pool_of("second") as pool:
        start_s = machine_s()
        futures = [submit(pool, *"abcdefgh") for _ in range(4)]
        assert [future.result(LIMIT_S) for future in futures] == [[Scored(1.0)] * 8] * 4
        assert machine_s() - start_s < 2.0
        assert (pool.num_scored, pool.num_groups) == (32, 4)


def test_concurrency_bounds_the_completions_of_a_worker_and_work_that_waits_starts_others():
    with pool_of("process_id", concurrency=4, workers=1) as pool:
        start_s = time.monotonic()
        futures = [submit(pool, "a", "b", "c") for _ in range(4)]
        assert len({future.result(LIMIT_S)[0].reward for future in futures}) == 1
        assert time.monotonic() - start_s > 4 * 0.3, "one group at a time: two would be six completions"
    with pool_of("process_id", concurrency=1) as pool:
        futures = [submit(pool, "a", "b") for _ in range(20)]
        assert 2 <= len({future.result(LIMIT_S)[0].reward for future in futures}) <= 4


@pytest.mark.parametrize("function", ["hangs", "swallows"])
def test_a_task_that_hangs_costs_its_completion_and_no_process(function):
    with pool_of(function, timeout_s=1.0) as pool:
        score(pool, "warm")
        hurt, other, order = submit(pool, "a", "bad", "c"), submit(pool, "a"), []
        told = threading.Event()
        other.add_done_callback(lambda _: order.append("other"))
        hurt.add_done_callback(lambda _: order.append("hurt"))
        hurt.add_done_callback(lambda _: told.set())
        assert other.result(LIMIT_S)[0].reward == 1.0
        found = hurt.result(LIMIT_S)
        assert told.wait(LIMIT_S)  # Whoever waits for a result may have it before a callback is called.
        assert order == ["other", "hurt"]
        assert [scored.reward is None for scored in found] == [False, True, False]
        assert found[1].error == f"timed out after 1 s (tests.support.rewards.asynchronous:{function})"
        assert (pool.num_timeouts, pool.num_crashes) == (1, 0)


@pytest.mark.parametrize(
    ("function", "error"),
    [("blocks", "blocked its event loop for 2 s"), ("dies", "the worker died: it exited with code 3")],
)
def test_a_lost_process_costs_the_completion_that_is_to_blame_and_none_beside_it(function, error):
    with pool_of(function, timeout_s=2.0) as pool:
        score(pool, "warm")
        others = [submit(pool, "a", "b") for _ in range(3)]
        hurt = submit(pool, "a", "bad", "c")
        found = hurt.result(LIMIT_S)
        assert [scored.reward for scored in found] == [1.0, None, 1.0]
        assert error in found[1].error
        assert [other.result(LIMIT_S) for other in others] == [[Scored(1.0)] * 2] * 3
        assert (pool.num_scored, pool.num_errors) == (9, 1)


def test_what_raises_for_one_completion_costs_that_one():
    with pool_of("raises") as pool:
        found = score(pool, "a", "bad", "c")
        assert "raised ValueError: bad answer" in found[1].error
        assert [found[0], found[2]] == [Scored(2.0), Scored(2.0)], "the others are scored together"


def test_plain_functions_beside_them_have_processes_of_their_own():
    with pool_of("hangs", "plain", timeout_s=1.0) as pool:
        assert score(pool, "a", "b") == [Scored(2.5)] * 2
        assert score(pool, "a", "bad")[0] == Scored(1.5)


def test_a_function_may_have_a_limit_of_its_own():
    with pool_of("patient", timeout_s=0.5) as pool:
        assert score(pool, "a") == [Scored(1.0)]
        assert pool.num_timeouts == 0


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("half_a_pair", r"raised ValueError: no score in \ud83d (asynchronous.py:"),
        ("plain_half_a_pair", r"raised ValueError: no score in \ud83d (asynchronous.py:"),
        ("panics", "Panic: rust (asynchronous.py:"),
        ("plain_panics", "Panic: rust (asynchronous.py:"),
        ("raises_ours", "RewardError: no such rubric (asynchronous.py:"),
    ],
)
def test_whatever_is_raised_is_told_as_itself(function, error):
    with pool_of(function) as pool:
        found = submit(pool, "a", "bad").result(60)
        assert found[0] == Scored(1.0)
        assert error in found[1].error
        assert pool.num_crashes == pool.num_timeouts == 0


@pytest.mark.parametrize("function", ["half_a_pair", "plain_half_a_pair"])
def test_an_error_among_the_values_may_hold_half_a_surrogate_pair(function):
    with pool_of(function) as pool:
        found = submit(pool, "a", "half").result(60)
        assert found[0] == Scored(1.0)
        assert found[1].error.endswith(r"ValueError: half \ud83d")


def test_a_call_without_a_reply_ends_though_its_event_loop_turns():
    with pool_of("keeps_its_reply", timeout_s=0.2) as pool:
        (found,) = submit(pool, "a").result(60)
        assert found.error.startswith("timed out after 0.2 s")
