"""Environments' processes where several episodes share one, or where there is none to be had."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from environments import EnvironmentFailure, nursery
from environments.pool import EnvironmentPool, Place
from tests.support.environments.places import (
    SOON_S,
    SPECS,
    TIMEOUT_S,
    TurningPool,
    failure,
    is_gone,
    opened,
    said,
)

pytestmark = pytest.mark.timed


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    """Returns a pool of its own for each test: which episodes share a process depends on what was before."""
    with TurningPool(SPECS, turn_timeout_s=TIMEOUT_S, memory_bytes=2**28) as pool:
        yield pool


def opened_elsewhere(pool: EnvironmentPool, pid: str) -> Place:
    """Returns a place in another process: this one is given no more, once it is known to be blocked."""
    deadline_s = time.monotonic() + SOON_S
    while said(place := opened(pool, "shared"), "pid") == pid:
        assert time.monotonic() < deadline_s
        place.close()
        time.sleep(0.1)
    return place


def test_episodes_share_a_process_and_a_hang_costs_its_own(pool: EnvironmentPool) -> None:
    places = [opened(pool, "shared") for _ in range(3)]
    assert len({said(place, "pid") for place in places}) == 1
    asked = places[0].act("await")
    turn = places[1].act("soon").result(SOON_S)
    assert (turn.observation, turn.reward, turn.done) == ("there", 0.5, True)
    with pytest.raises(EnvironmentFailure, match="did not end within"):
        asked.result(SOON_S)
    assert said(places[2], "say hello") == "hello"
    for place in places:
        place.close()


def test_one_that_does_not_let_itself_be_cancelled_ends_with_its_process(pool: EnvironmentPool) -> None:
    stubborn, other = opened(pool, "shared"), opened(pool, "shared")
    pid = said(other, "pid")
    assert failure(stubborn, "insist").kind == "timeout"
    new = opened_elsewhere(pool, pid)
    assert said(other, "say hello") == "hello"
    stubborn.close()
    other.close()
    assert is_gone(pid)
    new.close()


def test_a_loop_that_is_blocked_is_ended_with_its_episodes(pool: EnvironmentPool) -> None:
    blocking, other = opened(pool, "shared"), opened(pool, "shared")
    pid = said(other, "pid")
    assert failure(blocking, "hang").kind == "timeout"
    assert failure(other, "say hello").kind == "timeout"
    assert is_gone(pid)
    for place in (blocking, other):
        place.close()
    assert said(opened(pool, "shared"), "say hello") == "hello"


def test_a_blocked_loop_is_ended_also_when_its_episode_is_closed_and_costs_no_later_one(
    pool: EnvironmentPool,
) -> None:
    blocking = opened(pool, "shared")
    pid = said(blocking, "pid")
    assert failure(blocking, "hang").kind == "timeout"
    assert failure(blocking, "say more").kind == "timeout"
    for _ in range(2):
        blocking.close()
    for _ in range(3):
        later = opened(pool, "shared")
        assert said(later, "pid") != pid
        later.close()
    assert is_gone(pid)


def test_a_blocked_close_is_ended_however_often_it_is_asked_for(
    pool: EnvironmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "END_TIMEOUT_S", 0.5)
    place = opened(pool, close="hang")
    pid = said(place, "pid")
    for _ in range(3):
        place.close()
    assert is_gone(pid)


def test_a_slow_close_is_cancelled_and_costs_its_process_no_neighbour(
    pool: EnvironmentPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nursery, "END_TIMEOUT_S", 0.3)
    monkeypatch.setattr(nursery, "CANCEL_TIMEOUT_S", 1.0)
    slow, neighbour = opened(pool, "shared", close_s=600), opened(pool, "shared")
    pid = said(neighbour, "pid")
    slow.close()
    new = opened_elsewhere(pool, pid)
    assert said(neighbour, "pid") == pid
    assert "environment shared: close did not end within 0.3 s; it is cancelled" in caplog.messages
    neighbour.close()
    assert is_gone(pid)
    new.close()


def test_the_clock_stands_while_a_place_is_paused(pool: EnvironmentPool) -> None:
    place = opened(pool, "shared")
    place.pause()
    asked = place.act("await")
    time.sleep(TIMEOUT_S + 0.5)
    assert not asked.done()
    place.resume()
    with pytest.raises(EnvironmentFailure, match="did not end within"):
        asked.result(SOON_S)
    place.close()


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """Leaves this process no file descriptor to open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_file_descriptors_an_episode_fails_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nursery, "AGAIN_AFTER_S", 0.0)
    with TurningPool(SPECS[:1], TIMEOUT_S, 2**28) as another:
        first = opened(another)
        template = psutil.Process(int(said(first, "pid"))).ppid()
        with no_more_files():
            asked = [another.open("bad", {}, 0).reset() for _ in range(3)]
            failures = [one.exception(SOON_S) for one in asked]
            assert said(first, "say on") == "on"
            slept = first.act("sleep 1.9")
            os.kill(template, signal.SIGKILL)
            lost = slept.exception(SOON_S)
            assert isinstance(lost, EnvironmentFailure)
            assert "the process that started its own died" in lost.text
            failures.append(another.open("bad", {}, 0).reset().exception(SOON_S))
        for one in failures:
            assert isinstance(one, EnvironmentFailure)
            assert (one.kind, "Too many open files" in one.text) == ("crash", True), one.text
        assert said(opened(another), "say hello") == "hello"


def test_a_job_that_fails_costs_the_pool_nothing_else(
    pool: EnvironmentPool, caplog: pytest.LogCaptureFixture
) -> None:
    place = opened(pool)
    pool.do(lambda: {}["nothing"])
    assert said(place, "say on") == "on"
    assert "the environments' pool could not do what it was asked" in caplog.messages
    place.close()
