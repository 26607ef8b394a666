"""What is said and what is shown, in turn, make one trajectory; nothing sampled is tokenised again."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.episode import Episode, Generation
from core.arrays import Bits, Float32s, Int32s
from core.records import VersionSpan
from environments import Turn
from environments.one_turn import OneTurn


class Guessing:
    """An environment of some turns, each with a reward, which says "higher" in between."""

    def __init__(self, *rewards: float | None) -> None:
        self.said: list[str] = []
        self._rewards: Iterator[float | None] = iter(rewards)
        self._num_turns = len(rewards)

    def reset(self, **row: Any) -> str:
        return str(row["prompt"])

    def step(self, action: str) -> Turn:
        self.said.append(action)
        return Turn("higher", len(self.said) == self._num_turns, next(self._rewards))


def said(*tokens: int, version: int = 0, finish_reason: str = "stop", text: str = "x") -> Generation:
    spans = (VersionSpan(version, 0, len(tokens)),) if tokens else ()
    logprobs = Float32s.of([-0.5 * token for token in tokens])
    return Generation(Int32s.of(tokens), logprobs, spans, finish_reason, text)


def test_one_turn_is_a_prompt_and_an_answer() -> None:
    episode = Episode(OneTurn(), (5, 6))
    assert episode.tokens == [5, 6]
    assert episode.act(said(7, 8, version=3, finish_reason="length", text="78")).done
    sample = episode.sample()
    assert (sample.tokens, sample.is_sampled) == (Int32s.of([5, 6, 7, 8]), Bits.runs(2, 2))
    assert sample.logprobs == Float32s.of([-3.5, -4.0])
    assert (sample.version_spans, sample.turns, sample.text) == ((VersionSpan(3, 0, 2),), 1, "78")
    assert (sample.finish_reason, sample.reward) == ("length", None)


def test_turns_follow_each_other_and_their_rewards_add_up() -> None:
    environment = Guessing(0.25, None, 0.5)
    episode = Episode(environment, [1])
    assert not episode.act(said(2, 3, version=4, text="a")).done
    episode.observe([4, 5])
    assert episode.tokens == [1, 2, 3, 4, 5], "what the engine goes on from"
    assert not episode.act(said(6, version=4, text="b")).done
    assert episode.act(said(7, version=5, text="c")).done, "an environment may have nothing to show"
    sample = episode.sample()
    assert sample.tokens.numpy().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sample.is_sampled == Bits.of([0, 1, 1, 0, 0, 1, 1])
    assert sample.sampled_tokens.tolist() == [2, 3, 6, 7]
    assert sample.logprobs == Float32s.of([-1.0, -1.5, -3.0, -3.5])
    assert sample.version_spans == (VersionSpan(4, 0, 2), VersionSpan(4, 2, 3), VersionSpan(5, 3, 4))
    assert (sample.turns, sample.text, sample.reward) == (3, "c", 0.75)
    assert environment.said == ["a", "b", "c"]


def test_what_an_environment_raises_reaches_the_actor() -> None:
    class Broken(OneTurn):
        def step(self, action: str) -> Turn:
            raise RuntimeError("no such tool")

    with pytest.raises(RuntimeError, match="no such tool"):
        Episode(Broken(), [1]).act(said(2))


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=4), st.lists(st.integers(0, 99), max_size=4)))
)
def test_any_turns_make_a_sample_that_holds_together(turns: list[tuple[list[int], list[int]]]) -> None:
    episode, expected, mask = Episode(Guessing(*[None] * (len(turns) + 1)), [1]), [1], [0]
    episode.act(said())
    for action, observation in turns:
        episode.act(said(*action))
        episode.observe(observation)
        expected += [*action, *observation]
        mask += [1] * len(action) + [0] * len(observation)
    sample = episode.sample()
    assert sample.tokens.numpy().tolist() == episode.tokens == expected
    assert sample.is_sampled == Bits.of(mask)
