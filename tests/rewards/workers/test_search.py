"""Which completions of a group cost it its score: the calls that are made, and what comes of them."""

from __future__ import annotations

import pytest

from rewards.workers.search import MAX_LOST, SEARCH_LIMITS, Attempt, Failed, Verdict, search

LIMIT_S = 10.0


class Play:
    """Answers the calls of a search as a function would that fails in `kind` for the completions `bad`.

    A call takes `took_s` on the clock, one that hangs its limit.
    """

    def __init__(self, bad=(), kind="timeout", lost=True, took_s=0.0, slow_together=False):
        self.bad, self.kind, self.lost, self.took_s = set(bad), kind, lost, took_s
        self.slow_together = slow_together
        self.calls: list[Attempt] = []
        self.now_s = 0.0

    def outcome(self, ask):
        self.calls.append(ask)
        if self.bad & set(ask.places) or (self.slow_together and len(ask.places) > 1):
            self.now_s += LIMIT_S if self.kind == "timeout" else self.took_s
            return Failed(self.kind, "why", self.lost)
        self.now_s += self.took_s
        # The value says what else the function saw.
        return [Verdict(float(10 * place + len(ask.places))) for place in ask.places]

    def run(self, num):
        found = search(num, LIMIT_S, lambda: self.now_s)
        asks = next(found)
        while True:
            try:
                asks = found.send([self.outcome(ask) for ask in asks])
            except StopIteration as stopped:
                return stopped.value

    @property
    def places(self):
        return [call.places for call in self.calls]


def test_a_group_without_a_failure_is_one_call():
    play = Play()
    assert play.run(3) == [Verdict(3.0), Verdict(13.0), Verdict(23.0)]
    assert play.calls == [Attempt((0, 1, 2))]


@pytest.mark.parametrize(
    ("kind", "lost"), [("timeout", True), ("crash", True), ("raised", False), ("timeout", False)]
)
def test_what_fails_costs_itself_and_the_others_are_scored_together_without_it(kind, lost):
    play = Play(bad=[1], kind=kind, lost=lost)
    assert play.run(4) == [Verdict(3.0), Failed(kind, "why", lost), Verdict(23.0), Verdict(33.0)]
    assert play.places == [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (0, 2, 3)]
    assert [call.alone for call in play.calls[1:]] == [lost] * 5


def test_one_that_is_left_keeps_the_value_that_it_got_alone():
    play = Play(bad=[0])
    assert play.run(2)[1] == Verdict(11.0)
    assert play.places == [(0, 1), (0,), (1,)]


def test_a_group_that_hangs_as_a_whole_is_given_up_after_some_workers():
    play = Play(bad=range(8))
    found = play.run(8)
    assert all(isinstance(result, Failed) for result in found)
    assert len(play.calls) == 1 + MAX_LOST
    assert "given up" in found[-1].reason


def test_what_is_slow_alone_is_given_up_by_the_clock_and_the_others_keep_their_reward():
    play = Play(bad=[0], took_s=0.9 * LIMIT_S)
    found = play.run(20)
    scored = [result for result in found if isinstance(result, Verdict)]
    assert 0 < len(scored) < 10
    assert play.now_s <= (SEARCH_LIMITS + 3) * LIMIT_S


def test_a_group_that_is_too_slow_only_together_says_so():
    play = Play(slow_together=True)
    found = play.run(3)
    assert {result.reason for result in found} == {
        "why, though not for any of them alone; where 3 completions need longer, raise rewards.timeout_s"
    }
    assert play.places == [(0, 1, 2), (0,), (1,), (2,), (0, 1, 2)]


def test_a_call_whose_worker_was_lost_with_others_is_made_again_without_company():
    found = search(2, LIMIT_S)
    assert next(found) == [Attempt((0, 1))]
    assert found.send([Failed("crash", "died", lost=True, shared=True)]) == [Attempt((0, 1), alone=True)]
    with pytest.raises(StopIteration) as stopped:
        found.send([[Verdict(1.0), Verdict(2.0)]])
    assert stopped.value.value == [Verdict(1.0), Verdict(2.0)]


def test_where_no_call_can_succeed_nothing_is_searched():
    found = search(5, LIMIT_S)
    next(found)
    with pytest.raises(StopIteration) as stopped:
        found.send([Failed("crash", "no module", lost=True, hopeless=True)])
    assert len(stopped.value.value) == 5
