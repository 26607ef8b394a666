"""Calls to peers: each has a limit and a name, failures are told by peer and kind, nothing vanishes."""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mypy import api as mypy

from buffer.client import BUFFER, connect_buffer
from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from core.calls import Calls, Client, Local, Pending, Polled, asks, settle
from core.errors import PeerTimeout, TrainingError
from core.own_warnings import OwnWarnings
from learner.catalogue import parse_config
from tests.support import ROOT
from tests.support.clients import events_to
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.simulated import Late

pytestmark = pytest.mark.timed


class Peer:
    """What the calls go to: each fails as often as it is told to."""

    def __init__(self) -> None:
        self.faults: list[BaseException] = []
        self.asked: list[str] = []

    async def take(self, what: str) -> int:
        self.asked.append(what)
        if self.faults:
            raise self.faults.pop()
        return len(what)

    async def refuse(self, why: str) -> None:
        raise TrainingError(why)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def plain(self, number: int) -> int:
        return number + 1


class PeerClient(Client):
    take = asks(Peer.take)
    refuse = asks(Peer.refuse)
    sleep = asks(Peer.sleep)
    plain = asks(Peer.plain)


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
def client(peer: Peer) -> PeerClient:
    return PeerClient(Local(peer), "the peer")


def test_a_call_is_made_when_it_is_asked_and_again_when_it_is_asked_again(
    peer: Peer, client: PeerClient
) -> None:
    calls, call = Calls(5.0), client.take("abc")
    assert peer.asked == []
    assert calls.ask(call) == calls.start(call).wait() == 3
    assert peer.asked == ["abc", "abc"]
    assert calls.ask(client.plain(1)) == 2


def test_calls_are_made_in_the_order_in_which_they_were_started(peer: Peer, client: PeerClient) -> None:
    calls = Calls(5.0)
    for number in range(200):
        if number % 2:
            calls.post(client.take(str(number)), "a number")
        else:
            pending = calls.start(client.take(str(number)))
    assert pending.wait() == 3
    until(lambda: len(peer.asked) == 200)
    assert peer.asked == [str(number) for number in range(200)]


def test_posts_in_order_are_made_one_after_another_also_after_one_that_fails():
    class Slow:
        def __init__(self) -> None:
            self.done: list[int] = []

        async def take(self, number: int) -> None:
            await asyncio.sleep(0.2 / (number + 1))
            if number == 1:
                raise TrainingError("not this one")
            self.done.append(number)

    class SlowClient(Client):
        take = asks(Slow.take)

    calls, slow, newest = Calls(10.0), Slow(), None
    client = SlowClient(Local(slow), "the slow one")
    for number in range(4):
        newest = calls.post(client.take(number), "a number", after=newest)
    assert newest is not None
    newest.result(60)
    assert slow.done == [0, 2, 3]
    assert calls.num_failed_posts == 1


def test_every_wait_ends_with_the_names_of_both_sides_and_how_long_it_was(client: PeerClient) -> None:
    calls = Calls(0.2, name="actor-3")
    late = r"^the peer did not answer actor-3 within 0 s \(run.timeout_s\)$"
    with pytest.raises(PeerTimeout, match=late):
        calls.ask(client.sleep(30))

    async def awaited() -> None:
        await calls.start(client.sleep(30))

    with pytest.raises(PeerTimeout, match=late):
        asyncio.run(awaited())
    pending = Calls(0.2, name="actor-3").start(client.sleep(30))
    deadline_s, pending.deadline_s = pending.deadline_s, time.monotonic() + 60
    assert not pending.is_done()
    pending.deadline_s = deadline_s
    time.sleep(0.3)
    with pytest.raises(PeerTimeout, match=late):
        pending.is_done()
    polled = Polled(calls, lambda: client.sleep(30))
    polled.poll()
    time.sleep(0.3)
    with pytest.raises(PeerTimeout, match=late):
        polled.poll()


def test_an_answer_that_comes_at_the_last_moment_is_an_answer() -> None:
    assert Pending(Late(), "the board", 0.0).wait() == 7


def test_several_calls_are_waited_for_at_once(client: PeerClient) -> None:
    calls, start_s = Calls(600.0), machine_s()
    pendings = [calls.start(client.sleep(seconds)) for seconds in (0.2, 500.0, 500.0)]
    settle(pendings, 500.0, until="first")
    assert [pending.is_done() for pending in pendings] == [True, False, False]
    settle([*pendings, calls.start(client.refuse("no"))], 500.0, until="first failure")
    settle(pendings, 0.1)
    assert machine_s() - start_s < 2.0
    for pending in pendings:
        pending.give_up()


class TestNothingVanishes:
    def test_what_nobody_waits_for_is_counted_and_told_once_by_peer_and_kind(
        self, peer: Peer, client: PeerClient, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("core.troubles.QUIET_S", 0.0)
        told: list[str] = []
        calls, other = Calls(5.0, events_to(told)), PeerClient(Local(peer), "the other peer")
        for _ in range(3):
            calls.post(client.refuse("its disk is full"), "groups")
            calls.post(client.take("x"), "a watermark")  # What it takes says nothing of what it refuses ...
            calls.post(other.take("x"), "groups")  # ... nor does another peer.
        calls.post(client.refuse("its disk is full"), "reference log-probs")
        calls.post(other.refuse("it is gone"), "groups")
        until(lambda: calls.num_failed_posts == 5 and len(told) == 3)
        assert told == [
            "the peer did not take groups: its disk is full",
            "the peer did not take reference log-probs: its disk is full",
            "the other peer did not take groups: it is gone",
        ]
        calls.post(client.take("x"), "groups")
        until(lambda: len(told) == 4)
        assert told[3].startswith("the peer did not take groups: no more, after 3 failures in ")

    def test_a_post_that_is_never_answered_is_a_failure_too(self, client: PeerClient) -> None:
        told: list[str] = []
        calls = Calls(0.2, events_to(told), name="actor-0")
        calls.post(client.sleep(30), "its counters")
        until(lambda: told)
        late = "the peer did not answer actor-0 within 0 s (run.timeout_s)"
        assert told == [f"the peer did not take its counters: {late}"]
        assert calls.num_failed_posts == 1

    def test_a_late_answer_is_late_however_often_it_is_looked_for(self, client: PeerClient) -> None:
        pending = Calls(5.0).start(client.sleep(30), 0.05)
        time.sleep(0.1)
        for look in (pending.is_done, pending.is_done, pending.result):
            with pytest.raises(PeerTimeout, match=r"^the peer did not answer within 0 s \(run.timeout_s\)$"):
                look()

    def test_what_is_polled_is_asked_anew_after_a_timeout(self, client: PeerClient) -> None:
        made = [client.sleep(30), client.take("four")]
        polled = Polled(Calls(0.1), lambda: made.pop(0))
        assert not polled.poll()
        time.sleep(0.15)
        with pytest.raises(PeerTimeout):
            polled.poll()
        assert not polled.poll()
        assert polled._pending is not None
        settle([polled._pending], 60.0)
        made.append(client.take("x"))
        assert polled.poll()
        assert polled.value == 4

    def test_a_call_that_was_started_and_dropped_is_told_as_a_post_is(self, client: PeerClient) -> None:
        told: list[str] = []
        calls = Calls(5.0, events_to(told))
        calls.start(client.refuse("no"))
        pending = calls.start(client.refuse("not this either"))
        settle([pending], 5.0)
        del pending
        gc.collect()
        until(lambda: calls.num_failed_posts == 2 and told)
        assert told == ["the peer did not take `refuse`: no"]

    def test_a_call_whose_answer_was_seen_or_is_not_wanted_is_not_told(self, client: PeerClient) -> None:
        told: list[str] = []
        calls = Calls(5.0, events_to(told))
        calls.start(client.take("x"))
        calls.start(client.sleep(30)).give_up()
        with pytest.raises(TrainingError, match="no"):
            calls.ask(client.refuse("no"))
        failed = calls.start(client.refuse("no"))
        settle([failed], 5.0)
        assert isinstance(failed.error(), TrainingError)
        del failed
        gc.collect()
        assert calls.ask(client.take("xy")) == 2  # By now the others would have been told.
        assert (told, calls.num_failed_posts) == ([], 0)

    def test_reference_logprobs_that_the_buffer_refuses_are_told(self, tmp_path: Path) -> None:
        told: list[str] = []
        calls = Calls(5.0, events_to(told))
        shard = SimpleNamespace(set_ref_logprobs=Peer().refuse)
        buffer = connect_buffer([Local(shard), Local(shard)])
        for _ in range(2):
            calls.post(buffer.set_ref_logprobs({3: [-1.0]}), "the reference's log-probs")
        until(lambda: calls.num_failed_posts == 2 and told)
        assert told == [f"{BUFFER} did not take the reference's log-probs: {{3: [-1.0]}}"]

    def test_an_event_that_the_monitor_does_not_take_is_in_the_log_and_makes_no_other(
        self, client: PeerClient, caplog: Any
    ) -> None:
        calls = Calls(5.0, lambda text: client.refuse("it is gone"))
        warnings = OwnWarnings()
        try:
            calls.tell("the third actor was replaced")
            until(lambda: calls.num_failed_posts == 1 and caplog.records)
            assert [record.getMessage() for record in caplog.records] == [
                "the monitor did not take an event (it is gone): the third actor was replaced"
            ]
            assert warnings.take() == {}
            logging.getLogger("core.text").warning("another")
            assert warnings.take() == {"another": 1}
        finally:
            warnings.end()


def test_clients_travel_to_other_processes() -> None:
    client = pickle.loads(pickle.dumps(PeerClient("a handle", "the peer")))
    assert (client.handle, client.who) == ("a handle", "the peer")
    buffer = pickle.loads(pickle.dumps(connect_buffer(["one", "two"])))
    assert [shard.who for shard in buffer.shards] == [f"shard 0 of {BUFFER}", f"shard 1 of {BUFFER}"]


def test_a_full_disk_crosses_the_facade_as_it_is(tmp_path: Path) -> None:
    calls = Calls(5.0)

    class Full:
        async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
            raise DiskFullError("no space left")

    with pytest.raises(DiskFullError, match="no space left"):
        calls.ask(connect_buffer([Local(Full())]).insert("a", []))


WRONG = """
from buffer.client import BufferClient, ShardClient
from core.calls import Calls
from core.monitor_client import MonitorClient
from core.weights.board import BoardClient


def use(
    calls: Calls, buffer: BufferClient, shard: ShardClient, board: BoardClient, monitor: MonitorClient
) -> None:
    reveal_type(buffer.insert)
    reveal_type(shard.insert)
    reveal_type(calls.ask(buffer.insert("actor-0", [b""])))
    reveal_type(calls.start(shard.sample(3, 8, 1.0)))
    reveal_type(calls.ask(board.evaluations()))
    reveal_type(calls.ask(monitor.generation()))
    buffer.insert("actor-0", ["a text"])
    shard.insert("actor-0")
    board.poll("actor-0", "seven", 0, 0.0)
    monitor.event(b"bytes")
    shard.inzert("actor-0", [])
    len(calls.ask(buffer.next_step()))
"""
SAID = [
    'note: Revealed type is "def (actor: str, payloads: list[bytes]) -> core.calls.Call[list[int]]"',
    'note: Revealed type is "def (actor: str, payloads: list[bytes]) -> core.calls.Call[list[int]]"',
    'note: Revealed type is "list[int]"',
    'note: Revealed type is "core.calls.Pending[bytes | None]"',
    'note: Revealed type is "tuple[list[tuple[str, int]], list[core.evaluation.records.Evaluation]]"',
    'note: Revealed type is "dict[str, tuple[tuple[float, float], float]]"',
    'error: List item 0 has incompatible type "str"; expected "bytes"  [list-item]',
    "error: Too few arguments  [call-arg]",
    'error: Argument 2 has incompatible type "str"; expected "int"  [arg-type]',
    'error: Argument 1 has incompatible type "bytes"; expected "str"  [arg-type]',
    'error: "ShardClient" has no attribute "inzert"; maybe "insert"?  [attr-defined]',
    'error: Argument 1 to "len" has incompatible type "int"; expected "Sized"  [arg-type]',
]


@pytest.mark.slow
def test_mypy_follows_a_call_from_who_asks_to_the_method_that_answers(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "wrong.py").write_text(WRONG)
    out, err, _ = mypy.run(
        ["--config-file", "pyproject.toml", "--no-error-summary", str(tmp_path / "wrong.py")]
    )
    assert [line.split(": ", 1)[1] for line in out.splitlines()] == SAID, out + err


def test_insert_and_its_client_have_one_signature_however_many_shards(tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": {"path": "none"},
            "data": {"path": "none"},
            "rewards": {"functions": {"exact_match": 1.0}},
        }
    )

    async def scenario() -> list[int]:
        shard = ReplayBuffer(config, str(tmp_path), 8)
        try:
            return await connect_buffer([Local(shard)]).insert("a", [])
        finally:
            await shard.close()

    assert asyncio.run(scenario()) == []
