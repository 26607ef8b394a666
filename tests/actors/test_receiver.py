"""The actor's end of pushed weights: orders in any sequence and from any thread, on an engine that only
notes them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from actors.receiver import Receiver
from core.errors import PeerTimeout
from tests.support.cpu_transfer import wait_until
from tests.support.weights import Loop, Piecewise


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.receiver.order("abort", 10**9, "the test is over")
    made.close()


class TestReceiver:
    def test_a_transfer_puts_its_version_in_place(self, loop: Loop):
        assert [
            loop.order(verb, 1, *rest)
            for verb, *rest in (("init", {"group": 0}), ("start",), ("update", {}), ("update", {}))
        ] == [""] * 4
        assert loop.engine.version == 4
        assert loop.order("finish", 1, 6, {"norm": "x"}) == ""
        assert (loop.engine.version, loop.updated, loop.told) == (6, 1, [])
        assert loop.engine.asked == ["connect", "use 0", "start", "update", "update", "finish"]

    def test_the_loop_goes_on_while_the_group_meets_and_an_abort_frees_it(self, loop: Loop):
        loop.engine.all_are_there.clear()
        meeting = loop.start_order("init", 1, {"group": 1})
        wait_until(lambda: "connect" in loop.engine.asked, "the meeting")
        assert loop.order("hello", 1) == ""
        loop.order("abort", 1, "actor-9 died")
        assert meeting.result(60) == "this transfer was broken off"
        other = loop.start_order("init", 2, {"group": 2})
        wait_until(lambda: loop.engine.asked.count("connect") == 2, "the second meeting")
        loop.engine.all_are_there.set()  # Both groups meet after all.
        assert other.result(60) == ""
        assert loop.order("start", 2) == ""
        wait_until(lambda: "drop 1" in loop.engine.asked, "the first group is left")
        assert "use 1" not in loop.engine.asked
        assert "use 2" in loop.engine.asked

    def test_a_late_order_of_an_older_transfer_disturbs_neither_a_meeting_nor_a_transfer(self, loop: Loop):
        loop.engine.all_are_there.clear()
        meeting = loop.start_order("init", 8, {"group": 8})
        wait_until(lambda: "connect" in loop.engine.asked, "the meeting")
        loop.order("abort", 7, "late")
        assert loop.order("hello", 7) == "this transfer was broken off"
        loop.engine.all_are_there.set()
        assert meeting.result(60) == ""
        loop.order("start", 8)
        loop.order("abort", 7, "late")
        assert loop.order("start", 7) == "this transfer was broken off"
        assert loop.order("finish", 8, 6, {"norm": "x"}) == ""
        assert (loop.engine.version, loop.told) == (6, [])

    @pytest.mark.parametrize("verb", ["use 1", "drop 1"])
    def test_a_connection_that_cannot_be_used_or_left_does_not_end_the_loop(self, loop: Loop, verb: str):
        loop.engine.fails_at = verb
        if verb == "use 1":
            with pytest.raises(RuntimeError, match="use 1 broke"):
                loop.order("init", 1, {"group": 1})
        else:
            loop.engine.all_are_there.clear()
            meeting = loop.start_order("init", 1, {"group": 1})
            wait_until(lambda: "connect" in loop.engine.asked, "the meeting")
            loop.order("abort", 1, "over")
            loop.engine.all_are_there.set()
            assert meeting.result(60) == "this transfer was broken off"
            wait_until(
                lambda: "could not be left: RuntimeError: drop 1 broke" in " ".join(loop.told), "an event"
            )
        assert loop.order("hello", 2) == ""

    def test_what_keeps_a_group_from_meeting_reaches_the_learner(self, loop: Loop):
        loop.engine.fails_at = "connect"
        with pytest.raises(RuntimeError, match="connect broke"):
            loop.order("init", 1, {"group": 1})
        loop.engine.fails_at = ""
        assert loop.order("init", 2, {"group": 2}) == ""

    def test_an_actor_that_may_not_declines_and_is_not_touched(self, loop: Loop):
        loop.declines = "it evaluates"
        assert loop.order("start") == "it evaluates"
        assert loop.order("update", 1, {}) == "it has not started"
        assert loop.engine.asked == []

    def test_broken_off_before_anything_arrived_the_old_weights_count(self, loop: Loop):
        loop.order("start")
        loop.order("abort", 1, "actor-9 did not answer")
        assert loop.order("hello", 2) == ""
        assert (loop.engine.version, loop.engine.asked) == (4, ["start", "abort", "undo"])
        assert "keeps version 4: actor-9 did not answer" in loop.told[0]
        assert loop.order("start", 1) == loop.order("finish", 1, 6, {}) == "this transfer was broken off"
        assert loop.receiver.num_failed == 1

    def test_broken_off_after_something_arrived_none_do(self, loop: Loop):
        loop.order("start")
        loop.order("update", 1, {})
        loop.order("abort", 1, "actor-9 died")
        assert loop.order("hello", 2) == ""
        assert loop.engine.version == -1
        assert "waits for a snapshot: actor-9 died" in loop.told[0]

    @pytest.mark.parametrize("verb", ["update", "finish"])
    def test_what_the_engine_raises_reaches_the_learner_and_the_loop_goes_on(self, loop: Loop, verb: str):
        loop.engine.fails_at = verb
        loop.order("start")
        if verb == "finish":
            loop.order("update", 1, {})
        with pytest.raises(RuntimeError, match=f"{verb} broke"):
            loop.order(verb, 1, *{"update": ({},), "finish": (6, {})}[verb])
        assert loop.order("hello", 2) == ""
        assert (loop.engine.version, loop.updated) == (-1, 0)

    def test_another_transfer_ends_one_that_was_left_lying(self, loop: Loop):
        loop.order("start", 1)
        loop.order("start", 2)
        loop.order("update", 2, {})
        loop.order("finish", 2, 8, {"norm": "x"})
        assert (loop.engine.version, loop.receiver.num_failed) == (8, 1)
        assert "has begun another transfer" in loop.told[0]

    def test_weights_that_no_probe_confirms_are_told_about(self, loop: Loop):
        loop.order("start")
        loop.order("finish", 1, 6, {})
        assert "version 6 arrived unconfirmed" in loop.told[0]

    def test_a_learner_that_falls_silent_does_not_keep_the_actor(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("actors.receiver.LOOK_S", 0.05)
        loop = Loop(timeout_s=2.0)
        loop.order("start")
        deadline_s = time.monotonic() + 60
        while not loop.told and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert "the learner has sent nothing for " in loop.told[0]
        assert loop.beats >= 3  # Nobody takes it for dead meanwhile.
        loop.close()

    def test_a_loop_that_does_not_come_to_an_order_is_named_and_never_carries_it_out(self):
        engine, nothing = Piecewise(), lambda *_: None
        receiver = Receiver(engine, 0.1, may_start=lambda: "", on_updated=nothing, beat=nothing, tell=nothing)
        with pytest.raises(PeerTimeout, match="did not come to `start` within 0 s"):
            receiver.order("start", 1)
        receiver.poll()
        assert engine.asked == []
