"""Environments in real processes: what they do costs their own sample, in time, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import psutil
import pytest

from core.users import pictures
from environments import EnvironmentFailure, ToolCall, Turn, nursery
from environments.pool import EnvironmentPool
from environments.spec import EnvironmentSpec
from tests.support import ROOT
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.environments.places import (
    BAD,
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


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with TurningPool(SPECS, turn_timeout_s=TIMEOUT_S, memory_bytes=2**28) as pool:
        yield pool


# --- What goes well ---


def test_a_pool_does_nothing_but_in_its_turns_and_waits_for_the_futures_of_others_too() -> None:
    with EnvironmentPool(SPECS[:1], TIMEOUT_S, 2**28) as bare:
        before = set(psutil.Process().children())
        shown = bare.open("bad", {"reset": "say begin"}, 0).reset()
        assert set(psutil.Process().children()) == before
        bare.turn()
        assert len(set(psutil.Process().children()) - before) == 1
        with pytest.raises(TimeoutError):
            shown.result(0.2)
        until(lambda: bare.wait([shown], SOON_S) or shown.done())
        other: Future[None] = Future()
        threading.Timer(0.1, other.set_result, (None,)).start()
        until(lambda: bare.wait([other], SOON_S) or other.done(), SOON_S / 2)
    assert shown.result().observation == "begin"


def test_one_turn_takes_and_sends_what_no_socket_holds_at_once() -> None:
    with EnvironmentPool(SPECS[:1], SOON_S, 2**29) as bare:
        place = bare.open("bad", {"reset": "say begin", "more": "x" * 3_000_000}, 0)
        shown = place.reset()
        until(lambda: bare.wait([shown], SOON_S) or shown.done())
        long = place.act("show {'content': 'a' * 3_000_000}")
        num_turns = 0
        while not long.done():
            time.sleep(0.5)  # A step of the engine.
            bare.turn()
            num_turns += 1
    assert len(long.result().observation[0]["content"]) == 3_000_000  # type: ignore[index]
    assert num_turns <= 4


def test_an_episode_of_turns_in_text(pool: EnvironmentPool) -> None:
    place = pool.open("bad", {"reset": "say begin"}, 0)
    assert place.reset().result(SOON_S) == Turn("begin", done=False)
    assert place.act("say on").result(SOON_S) == Turn("on", done=False)
    turn = place.act("say bye").result(SOON_S)
    assert (turn.observation, turn.done, turn.reward) == ("bye", True, None)
    assert pictures.show(turn.attributes).said == ["say on", "say bye"]
    place.close()


@pytest.mark.parametrize(
    ("returned", "turn"),
    [
        ("('a', 1, False)", Turn("a", False, 1.0)),
        ("('a', np.float32(0.5), np.bool_(False), {'info': 1})", Turn("a", False, 0.5)),
        ("(None, True, False, False, {})", Turn("", False, 1.0)),
        ("([{'role': 'user', 'content': 'a'}], None, 0)", Turn(({"role": "user", "content": "a"},), False)),
        ("('\\ud800', None, False)", Turn("?", False)),
        ("__import__('environments').Turn('a', False)", Turn("a", False)),
    ],
)
def test_a_step_returns_what_others_have_it_return(pool: EnvironmentPool, returned: str, turn: Turn) -> None:
    place = opened(pool)
    assert place.act(f"return {returned}").result(SOON_S) == turn
    place.close()


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        ("'text'", "step returned 'text'; expected a Turn, or observation, reward, done"),
        ("('a', 'much', False)", "expected a finite number as reward"),
        ("('a', float('nan'), False)", "step returned nan; expected a finite number"),
        ("(3, None, False)", "step returned 3; expected text or a list of messages"),
        ("('x' * 5_000_000, None, False)", "5,000,000 characters"),
    ],
)
def test_a_step_that_returns_something_else_is_told(pool: EnvironmentPool, returned: str, why: str) -> None:
    failed = failure(opened(pool), f"return {returned}")
    assert failed.kind == "raised"
    assert why in failed.text


def test_tools_answer_or_the_policy_is_told_why_not(pool: EnvironmentPool) -> None:
    place = pool.open("counter", {"prompt": "x", "goal": 5}, 0)
    assert place.reset().result(SOON_S) == Turn("Count to 5.", done=False)
    calls = (
        ToolCall("increment", {"step": 5}, id="call_1"),
        ToolCall("increment", {"step": 50}),
        ToolCall("jump", {}),
        ToolCall("increment", {"step": 1, "far": 1}),
        ToolCall("increment", None, "expected a comma at character 9"),
    )
    turn = place.act("", calls).result(SOON_S)
    assert turn.tool_errors == ("raised", "unknown", "arguments", "unparsable")
    contents = [message["content"] for message in turn.observation if isinstance(message, dict)]
    assert isinstance(turn.observation, tuple)
    assert turn.observation[0] == {
        "role": "tool",
        "name": "increment",
        "content": "5",
        "tool_call_id": "call_1",
    }
    assert contents[1] == "{'error': 'too far'}", "as TRL tells it"
    assert "there are: increment, roll" in contents[2]
    assert "far" in contents[3]
    assert "comma at character 9" in contents[4]
    turn = place.act("done").result(SOON_S)
    assert (turn.done, turn.reward) == (True, 1.0)
    assert pictures.show(turn.attributes).steps == [5]
    place.close()


def test_an_episode_that_a_limit_cut_has_the_reward_as_it_stands(pool: EnvironmentPool) -> None:
    place = opened(pool, "counter", goal=5)
    turn = place.finish().result(SOON_S)
    assert (turn.done, turn.reward) == (True, 0.0)
    place.close()


def test_rewards_of_steps_add_up_to_0_where_a_limit_cut_before_the_first(pool: EnvironmentPool) -> None:
    place = opened(pool)
    assert place.act("say on").result(SOON_S).reward is None
    turn = place.finish().result(SOON_S)
    assert (turn.done, turn.reward) == (True, 0.0)
    place.close()


def test_the_same_seed_plays_the_same_whatever_was_played_before(pool: EnvironmentPool) -> None:
    drawn = []
    for seed in (7, 8, 7):
        place = opened(pool, seed=seed)
        drawn.append(said(place, "draw"))
        place.close()
    assert drawn[0] == drawn[2] != drawn[1]
    with TurningPool(SPECS[:1], TIMEOUT_S, 2**28) as another:
        assert said(opened(another, seed=7), "draw") == drawn[0], "sets are iterated in the same order too"


def test_a_process_is_used_again_with_a_new_object_and_as_it_was(pool: EnvironmentPool) -> None:
    place = opened(pool)
    pid, where = said(place, "pid"), said(place, "where")
    said(place, "move")
    place.close()
    pids, deadline_s = set[str](), time.monotonic() + SOON_S
    while pid not in pids:
        assert time.monotonic() < deadline_s
        place = opened(pool)
        pids.add(said(place, "pid"))
        assert said(place, "where") == where
        place.close()
        time.sleep(0.02)


def test_a_process_is_free_after_the_last_answer_and_its_episode_is_asked_nothing_more(
    pool: EnvironmentPool,
) -> None:
    over = opened(pool)
    pid = said(over, "pid")
    assert over.finish().result(SOON_S).done
    deadline_s = time.monotonic() + SOON_S
    others = [opened(pool)]
    while said(others[-1], "pid") != pid:  # Nobody has closed the one before.
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
        others.append(opened(pool))
    assert failure(over, "pid").kind == "closed"
    over.close()
    assert said(others[-1], "pid") == pid
    for other in others:
        other.close()


def test_a_module_with_threads_has_places_that_are_no_forks() -> None:
    spec = EnvironmentSpec("threaded", "tests.support.environments.threaded:Threaded", "turns")
    with TurningPool([spec], 10.0, 2**28) as pool:
        place = opened(pool, "threaded")
        turn = place.act("a").result(SOON_S)
    assert (turn.observation, turn.done, turn.reward) == ("A", True, 1.0)


# --- What goes wrong ---


@pytest.mark.parametrize(
    ("deed", "kind", "why"),
    [
        ("raise oh no", "raised", "step raised ValueError: oh no (bad.py:"),
        ("exit 3", "raised", "SystemExit: 3"),
        ("end 3", "crash", "its process died: it exited with code 3"),
        ("kill", "crash", "SIGKILL"),
        (
            "hang",
            "timeout",
            "its answer did not end within 2 s; where it needs longer, raise actors.turn_timeout_s",
        ),
        ("spin", "timeout", "did not end within 2 s"),
        ("close_files", "crash", "its process died"),
    ],
)
def test_what_an_environment_does_costs_its_episode(
    pool: EnvironmentPool, deed: str, kind: str, why: str
) -> None:
    other, place = opened(pool), opened(pool)
    pid, began_s = said(place, "pid"), machine_s()
    asked = place.act(deed)
    assert said(other, "say hello") == "hello", "nobody waits meanwhile"
    with pytest.raises(EnvironmentFailure) as caught:
        asked.result(SOON_S)
    assert machine_s() - began_s < TIMEOUT_S + 5
    assert (caught.value.kind, caught.value.text.count("\n")) == (kind, 0)
    assert why in caught.value.text
    assert failure(place, "say more").kind == kind, "it says the same to whoever asks on"
    place.close()
    assert is_gone(pid)
    assert said(other, "say still") == "still"
    other.close()


@pytest.mark.parametrize("name", ["bad", "shared"])
@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("raise_half", "raised ValueError: half ? (bad.py:"),
        ("raise_unreadable", "raised _Unreadable: (its message cannot be read) (bad.py:"),
        ("cancel", "raised CancelledError (bad.py:"),
        ("show {'a': object}", "step returned <class 'object'>; expected nothing in a message but text, num"),
        ("show {'a': {1: 2}}", "step returned {1: 2}; expected nothing in a message but text, numbers"),
        ("show {'a': 2**70}", "what it returned cannot be sent: OverflowError"),
        ("show {'a': 'a' * 2**26}", "what it returned cannot be sent: it is 67,108,"),
    ],
)
def test_what_cannot_be_told_is_its_own_failure_at_once(
    pool: EnvironmentPool, name: str, deed: str, why: str
) -> None:
    place, other = opened(pool, name), opened(pool, name)
    failed = failure(place, deed)
    assert (failed.kind, why in failed.text) == ("raised", True), failed.text
    assert said(other, "say hello") == "hello"
    place.close()
    other.close()


@pytest.mark.parametrize("name", ["bad", "shared"])
def test_what_messages_have_besides_is_made_text_and_numbers(pool: EnvironmentPool, name: str) -> None:
    place = opened(pool, name)
    turn = place.act("show {'name': '\\ud83d', 'n': np.float64(1), 'l': (np.int8(2), np.bool_(True), None)}")
    shown = {"role": "user", "content": "a", "name": "?", "n": 1.0, "l": [2, True, None]}
    assert turn.result(SOON_S).observation == (shown,)
    place.close()


@pytest.mark.parametrize("deed", ["flood", "flood_elsewhere"])
def test_memory_that_its_processes_use_is_bounded(deed: str) -> None:
    with TurningPool(SPECS[:1], turn_timeout_s=600.0, memory_bytes=2**27) as another:
        place = opened(another)
        pid, failed = said(place, "pid"), failure(place, deed)
        assert failed.kind == "memory"
        assert "GiB of memory with its children, more than rewards.memory_gib = 0.125" in failed.text
        assert is_gone(pid)


@pytest.mark.parametrize(
    ("when", "what"), [({"reset": "raise no"}, "reset raised"), ({"reset": "hang"}, "reset did not")]
)
def test_reset_may_fail_as_well(pool: EnvironmentPool, when: dict[str, str], what: str) -> None:
    with pytest.raises(EnvironmentFailure, match=what):
        pool.open("bad", when, 0).reset().result(SOON_S)


def test_a_constructor_that_raises_is_told(pool: EnvironmentPool) -> None:
    spec = EnvironmentSpec("bad", f"{BAD}:Bad?ready=raise", "turns")
    with TurningPool([spec], TIMEOUT_S, 2**28) as another:
        with pytest.raises(EnvironmentFailure, match="its constructor raised ValueError"):
            another.open("bad", {}, 0).reset().result(SOON_S)
        assert another.counts.failures == {"raised": 1}


def test_what_it_prints_goes_elsewhere(pool: EnvironmentPool) -> None:
    place = opened(pool)
    assert said(place, "print") == "printed"
    assert said(place, "say on") == "on"
    place.close()


def test_a_process_that_dies_between_two_turns_is_told_at_the_next(pool: EnvironmentPool) -> None:
    place = opened(pool)
    os.kill(int(said(place, "pid")), signal.SIGKILL)
    assert failure(place, "say on").kind == "crash"
    place.close()


@pytest.mark.parametrize("deed", ["child", "grandchild", "fork"])
def test_processes_left_behind_are_killed_counted_and_told(
    pool: EnvironmentPool, deed: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before, place = pool.counts.leftovers, opened(pool)
    left, pid = said(place, deed), said(place, "pid")
    place.close()
    assert is_gone(left)
    assert is_gone(pid), "no other episode is played beside what was left"
    deadline_s = time.monotonic() + SOON_S
    while pool.counts.leftovers == before and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert pool.counts.leftovers == before + 1
    assert "environment bad leaves processes behind when an episode ends; they are killed" in caplog.messages


@pytest.mark.parametrize("deed", ["hang", "spin", "end 1"])
def test_a_process_that_is_killed_takes_its_own_with_it(pool: EnvironmentPool, deed: str) -> None:
    place = opened(pool)
    left = [said(place, "child"), said(place, "grandchild")]
    failure(place, deed)
    place.close()
    assert all(map(is_gone, left))


def test_a_thread_left_behind_ends_with_its_process(pool: EnvironmentPool) -> None:
    place = opened(pool)
    pid = said(place, "pid")
    said(place, "thread")
    place.close()
    assert is_gone(pid)


@pytest.mark.parametrize("close", ["raise no", "hang"])
def test_a_close_that_fails_costs_nothing_but_its_process(
    pool: EnvironmentPool, close: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "END_TIMEOUT_S", 0.5)
    place = opened(pool, close=close)
    pid, failures = said(place, "pid"), dict(pool.counts.failures)
    place.close()
    if close == "hang":
        assert is_gone(pid)
    assert said(opened(pool), "say hello") == "hello"
    assert pool.counts.failures == failures


# --- The ends of the others ---


def test_what_is_asked_of_a_pool_that_closes_fails_and_nothing_is_left(pool: EnvironmentPool) -> None:
    another = TurningPool(SPECS, 600.0, 2**28)
    places = [opened(another), opened(another, "shared")]
    left = [
        said(places[0], "child"),
        said(places[0], "grandchild"),
        *(said(place, "pid") for place in places),
    ]
    asked = [places[0].act("spin"), places[1].act("await")]
    began_s = machine_s()
    another.close()
    assert machine_s() - began_s < 3
    for future in [*asked, places[0].act("say more"), another.open("bad", {}, 0).reset()]:
        with pytest.raises(EnvironmentFailure) as caught:
            future.result(60)
        assert caught.value.kind == "closed"
    assert all(map(is_gone, left))
    another.close()


def test_a_template_that_dies_is_started_again() -> None:
    with TurningPool(SPECS[:1], TIMEOUT_S, 2**28) as another:
        place = opened(another)
        left = [said(place, "child"), said(place, "grandchild"), said(place, "pid")]
        asked = place.act("sleep 1.9")
        template = psutil.Process(int(left[2])).ppid()
        os.kill(template, signal.SIGKILL)
        with pytest.raises(EnvironmentFailure) as caught:
            asked.result(SOON_S)
        assert caught.value.kind == "crash"
        assert all(map(is_gone, left))
        assert said(opened(another), "say hello") == "hello"


def test_nothing_is_left_of_an_actor_that_is_killed_in_the_middle_of_an_episode() -> None:
    code = f"""
        import time
        from environments.spec import EnvironmentSpec
        from tests.support.environments.places import TurningPool
        bad = EnvironmentSpec("bad", "{BAD}:Bad", "turns")
        shared = EnvironmentSpec("shared", "{BAD}:BadAsync", "turns", is_async=True)
        pool = TurningPool([bad, shared], 600.0, 2**28)
        places = [pool.open(name, {{}}, 0) for name in ("bad", "shared")]
        for place in places:
            place.reset().result()
        deeds = [(0, "child"), (0, "grandchild"), (0, "fork"), (0, "pid"), (1, "child"), (1, "pid")]
        pids = [places[index].act(deed).result().observation for index, deed in deeds]
        places[0].act("spin")
        print(*pids, flush=True)
        time.sleep(600)
    """
    actor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert actor.stdout is not None
        pids = actor.stdout.readline().split()
        assert len(pids) == 6
        templates = {psutil.Process(int(pid)).ppid() for pid in (pids[3], pids[5])}
    finally:
        actor.kill()
        actor.wait(60)
    assert all(map(is_gone, [*pids, *templates]))


def test_a_module_that_cannot_be_loaded_fails_its_episodes_and_says_why() -> None:
    path = "tests.support.environments.gone:Gone"
    with TurningPool([EnvironmentSpec("gone", path, "turns")], TIMEOUT_S, 2**28) as another:
        with pytest.raises(EnvironmentFailure) as caught:
            another.open("gone", {}, 0).reset().result(SOON_S)
        assert f"environments.gone = {path}: no module named" in caught.value.text
        assert caught.value.kind == "raised"
