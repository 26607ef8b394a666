"""An episode of several turns, question by question: what it asks of whom, what cuts it, what is kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from actors.playing.played import EpisodeLimits, PlayedEpisode
from core.arrays import Bits
from core.errors import DataError
from core.records import Sample
from core.users import pictures
from environments import EnvironmentFailure, Turn
from tests.support.playing import Asked, Behaviour, DigitSpeech, ScriptedPlace, turns
from tests.support.said import generated

PROMPT = ({"role": "user", "content": "2"},)
WIDE = EpisodeLimits(max_turns=4, max_new_tokens=8, max_sequence_tokens=64)


def begun(
    behave: Behaviour, limits: EpisodeLimits = WIDE, speech: Any = None
) -> tuple[PlayedEpisode, ScriptedPlace]:
    place = ScriptedPlace(behave, {}, seed=5)
    return PlayedEpisode("game", place, speech or DigitSpeech(), PROMPT, limits), place


def kept(episode: PlayedEpisode) -> Sample:
    assert episode.is_over
    sample = episode.sample()
    assert sample is not None
    return sample


def test_policy_and_environment_speak_in_turn_and_rewards_add_up() -> None:
    rewards = iter([0.25, None, 0.5])

    def behave(asked: Asked) -> tuple[float, Turn]:
        if asked.what == "reset":
            return 0, Turn("1", False)
        return 0, Turn("45", asked.turn == 3, next(rewards), tool_errors=("raised",) * (asked.turn == 1))

    episode, place = begun(behave)
    (ask,) = episode.poll()
    assert (list(ask.tokens), ask.turn, ask.max_tokens) == ([5, 4], 0, 8)
    assert not episode.poll()
    episode.act(0, generated(10, 10, 1, version=3, text="77"))
    (ask,) = episode.poll()
    assert (list(ask.tokens), ask.turn) == ([5, 4, 10, 10, 1, 7, 8], 1), "tokens in, tokens out"
    episode.act(1, generated(6, 1, version=4, text="3"))
    (ask,) = episode.poll()
    episode.act(2, generated(1, version=4, text=""))
    assert not episode.poll()
    sample = kept(episode)
    assert sample.tokens.numpy().tolist() == [5, 4, 10, 10, 1, 7, 8, 6, 1, 7, 8, 1]
    assert sample.is_sampled == Bits.runs(2, 3, 2, 2, 2, 1)
    assert [(span.version, span.start, span.end) for span in sample.version_spans] == [
        (3, 0, 3),
        (4, 3, 5),
        (4, 5, 6),
    ]
    assert (sample.turns, sample.num_tool_calls, sample.text, sample.finish_reason) == (3, 2, "", "stop")
    assert (sample.reward, sample.error) == (0.75, None)
    assert sample.transcript == (
        ("user", "1"),
        ("assistant", "77"),
        ("user", "45"),
        ("assistant", "3"),
        ("user", "45"),
        ("assistant", ""),
    )
    assert (episode.num_tool_errors, episode.num_answers, episode.limit) == (1, 4, "")
    assert [asked.what for asked in place.asked] == ["reset", "act", "act", "act"]
    assert [asked.text for asked in place.asked] == ["", "77", "3", ""]


def test_messages_of_an_environment_are_shown_as_they_are() -> None:
    shown = ({"role": "tool", "name": "add", "content": "9"}, {"role": "user", "content": "8"})

    def behave(asked: Asked) -> tuple[float, Turn]:
        return 0, Turn(shown, False)

    episode, _ = begun(behave)
    (ask,) = episode.poll()
    assert list(ask.tokens) == [5, 12, 11]
    episode.act(0, generated(6, 1))
    (ask,) = episode.poll()
    assert list(ask.tokens) == [5, 12, 11, 6, 1, 12, 11]
    assert episode._transcript == [
        ("tool", "9"),
        ("user", "8"),
        ("assistant", "x"),
        ("tool", "9"),
        ("user", "8"),
    ]


def test_the_last_turn_allowed_is_acted_on_and_then_the_episode_is_cut() -> None:
    episode, place = begun(turns(9), EpisodeLimits(2, 8, 64))
    for turn in range(2):
        episode.poll()
        episode.act(turn, generated(6, 1))
    assert not episode.poll(), "the environment is asked what it is worth"
    episode.poll()
    sample = kept(episode)
    assert [asked.what for asked in place.asked] == ["reset", "act", "act", "finish"]
    assert (episode.limit, sample.finish_reason, sample.turns, sample.reward) == ("max_turns", "length", 2, 0)
    assert sample.is_sampled == Bits.runs(2, 2, 1, 2), "what would have been shown next is no part of it"


def test_an_episode_that_ends_with_its_last_turn_is_not_cut() -> None:
    episode, _ = begun(turns(2), EpisodeLimits(2, 8, 64))
    for turn in range(2):
        episode.poll()
        episode.act(turn, generated(6, 1))
    episode.poll()
    assert (kept(episode).finish_reason, episode.limit) == ("stop", "")


def test_a_turn_may_have_as_many_tokens_as_are_left() -> None:
    episode, _ = begun(turns(9), EpisodeLimits(9, 8, 9))
    (ask,) = episode.poll()
    assert ask.max_tokens == 7
    episode.act(0, generated(6, 6, 1))
    (ask,) = episode.poll()
    assert ask.max_tokens == 3
    episode.act(1, generated(6, 6, 6, finish_reason="length"))
    episode.poll()
    sample = kept(episode)
    assert (episode.limit, sample.finish_reason, sample.num_tokens) == ("max_sequence_tokens", "length", 9)


def test_an_observation_without_room_for_an_answer_cuts_what_came_before_it() -> None:
    episode, _ = begun(turns(9, shown="444"), EpisodeLimits(9, 8, 7))
    episode.poll()
    episode.act(0, generated(6, 1))
    episode.poll()
    episode.poll()
    sample = kept(episode)
    assert (episode.limit, sample.num_tokens, sample.reward) == ("max_sequence_tokens", 4, 0)


def test_a_turn_that_was_cut_ends_the_episode_and_is_kept() -> None:
    episode, place = begun(turns(9), EpisodeLimits(9, 3, 64))
    episode.poll()
    episode.act(0, generated(6, 6, 6, finish_reason="length"))
    episode.poll()
    sample = kept(episode)
    assert (episode.limit, sample.finish_reason, sample.num_sampled) == ("max_new_tokens", "length", 3)
    assert [asked.what for asked in place.asked] == ["reset", "finish"]


class Strange(DigitSpeech):
    def continuation(self, messages: Any) -> tuple[int, ...]:
        raise DataError("a message has no role")


def fails(kind: Any, when: str) -> Behaviour:
    def behave(asked: Asked) -> tuple[float, Turn | EnvironmentFailure]:
        if asked.what == when:
            return 0, EnvironmentFailure(kind, "it broke")
        return 0, Turn("4", False)

    return behave


@pytest.mark.parametrize(
    ("behave", "limits", "speech", "turn", "failure", "error"),
    [
        (fails("raised", "reset"), WIDE, None, 0, "raised", "environment game: it broke"),
        (fails("timeout", "act"), WIDE, None, 1, "timeout", "environment game: it broke"),
        (fails("crash", "finish"), EpisodeLimits(1, 8, 64), None, 1, "crash", "environment game: it broke"),
        (turns(1, reward=math.nan), WIDE, None, 1, "raised", "environment game: its reward is nan"),
        (turns(9), WIDE, Strange(), 0, "raised", "cannot be written: a message has no role"),
        (turns(9, first="1" * 70), WIDE, None, 0, "raised", "71 tokens .* actors.max_sequence_tokens is 64"),
    ],
)
def test_a_failure_is_an_error_that_names_the_environment_and_never_a_reward(
    behave: Behaviour, limits: EpisodeLimits, speech: Any, turn: int, failure: str, error: str
) -> None:
    episode, _ = begun(behave, limits, speech)
    for number in range(turn):
        episode.poll()
        episode.act(number, generated(6, 1))
    episode.poll()
    episode.poll()
    sample = kept(episode)
    assert episode.failure == failure
    assert sample.reward is None
    assert sample.error is not None
    assert re.search(error, sample.error)
    assert (sample.turns, sample.num_sampled) == (turn, 2 * turn)


def test_rewards_before_a_failure_are_no_reward() -> None:
    def behave(asked: Asked) -> tuple[float, Turn | EnvironmentFailure]:
        if asked.turn == 2:
            return 0, EnvironmentFailure("crash", "gone")
        return 0, Turn("4", False, 1.0)

    episode, _ = begun(behave)
    for number in range(2):
        episode.poll()
        episode.act(number, generated(6, 1))
    episode.poll()
    assert (kept(episode).reward, kept(episode).error) == (None, "environment game: gone")


Prepare = Callable[[PlayedEpisode], None]


def in_the_engine(episode: PlayedEpisode) -> None:
    episode.poll()


def in_the_environment(episode: PlayedEpisode) -> None:
    episode.poll()
    episode.act(0, generated(6, 1))


def in_the_engine_again(episode: PlayedEpisode) -> None:
    in_the_environment(episode)
    episode.poll()


@pytest.mark.parametrize(
    ("prepare", "said", "num_sampled", "is_finished"),
    [
        (lambda episode: None, {}, None, False),
        (in_the_engine, {}, None, False),
        (in_the_engine, {0: generated(6, 6)}, 2, True),
        (in_the_environment, {}, 2, False),
        (in_the_engine_again, {}, 2, True),
        (in_the_engine_again, {1: generated(6, 6, 6)}, 5, True),
    ],
)
def test_a_deadline_keeps_what_was_said(
    prepare: Prepare, said: dict[int, Any], num_sampled: int | None, is_finished: bool
) -> None:
    episode, place = begun(turns(9))
    prepare(episode)
    episode.end_late(said)
    assert (place.asked[-1].what == "finish") == is_finished, "asked what it is worth, unless it is busy"
    episode.poll()
    assert episode.is_over
    sample = episode.sample()
    if num_sampled is None:
        assert sample is None
    else:
        assert sample is not None
        assert (sample.num_sampled, sample.finish_reason, sample.error) == (num_sampled, "length", None)
        assert sample.reward == (0.0 if is_finished else None)


SILENT = "environment game: had not answered at actors.straggler_timeouts_s"


@pytest.mark.parametrize(
    ("prepare", "silence"),
    [
        (lambda episode: None, SILENT),
        (in_the_engine, ""),
        (in_the_environment, SILENT),
        (in_the_engine_again, ""),
    ],
)
def test_an_environment_that_is_silent_at_a_deadline_is_named(prepare: Prepare, silence: str) -> None:
    episode, _ = begun(turns(9))
    prepare(episode)
    episode.end_late({})
    assert (episode.silence, episode.failure) == (silence, "timeout" if silence else "")


def test_what_an_environment_answers_at_its_deadline_comes_too_late() -> None:
    """The answer is there, but was not taken yet: the engine must not be asked for what is over."""
    for prepare in (lambda episode: None, in_the_environment):
        episode, _ = begun(turns(9))
        prepare(episode)
        assert episode.is_ready
        episode.end_late({})
        assert not episode.poll()
        assert episode.is_over
        assert not episode.futures


def test_a_deadline_does_not_wait_for_ever_for_what_an_episode_is_worth() -> None:
    def behave(asked: Asked) -> tuple[float, Turn]:
        return (3600.0 if asked.what == "finish" else 0), Turn("4", False)

    episode, _ = begun(behave)
    in_the_engine_again(episode)
    episode.end_late({})
    assert not episode.is_over
    episode.end_late({})
    assert kept(episode).num_sampled == 2
    assert episode.silence == SILENT


def test_rewards_that_add_up_beyond_floats_are_an_error_of_the_sample() -> None:
    def behave(asked: Asked) -> tuple[float, Turn]:
        return 0, Turn("4", False, None if asked.what == "reset" else 1e308)

    episode, _ = begun(behave)
    for turn in range(2):
        episode.poll()
        episode.act(turn, generated(6, 1, text="3"))
    episode.poll()
    assert kept(episode).reward is None
    assert "add up to no finite number, the last: 1e+308, 1e+308" in str(kept(episode).error)


def test_functions_see_an_environment_without_attributes_where_a_limit_cut_before_it_showed_any() -> None:
    def behave(asked: Asked) -> tuple[float, Turn]:
        return 0 if asked.what == "reset" else 100, Turn("4", False)

    episode, _ = begun(behave)
    episode.poll()
    episode.act(0, generated(6, 1, text="3"))
    episode.end_late({})
    assert kept(episode).error is None
    assert episode.attributes == pictures.take(object())
