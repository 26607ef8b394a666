"""What is said and what is shown, in turn, make one trajectory; nothing sampled is tokenised again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.episode import Ask, Episode, Trajectory
from core.arrays import Bits, Float32s, Int32s
from core.records import VersionSpan
from tests.support.said import generated


def test_one_turn_is_a_prompt_and_an_answer() -> None:
    episode = Episode((5, 6))
    assert episode.poll() == (Ask((5, 6)),)
    assert not episode.poll()
    assert not episode.futures
    assert not episode.is_over
    episode.act(0, generated(7, 8, version=3, finish_reason="length", text="78"))
    assert episode.is_over
    sample = episode.sample()
    assert sample is not None
    assert (sample.tokens, sample.is_sampled) == (Int32s.of([5, 6, 7, 8]), Bits.runs(2, 2))
    assert sample.logprobs == Float32s.of([-3.5, -4.0])
    assert (sample.version_spans, sample.turns, sample.text) == ((VersionSpan(3, 0, 2),), 1, "78")
    assert (sample.finish_reason, sample.reward, sample.transcript) == ("length", None, ())
    assert episode.limit == "max_new_tokens"


def test_an_answer_cut_by_a_deadline_is_kept_and_nothing_is_kept_of_nothing() -> None:
    late, nothing = Episode((5, 6)), Episode((5, 6))
    late.end_late({0: generated(7, finish_reason="length")})
    nothing.end_late({})
    assert late.is_over
    assert nothing.is_over
    kept = late.sample()
    assert kept is not None
    assert kept.tokens == Int32s.of([5, 6, 7])
    assert nothing.sample() is None


def test_turns_follow_each_other() -> None:
    trajectory = Trajectory([1])
    trajectory.say(generated(2, 3, version=4))
    trajectory.observe([4, 5])
    assert trajectory.tokens == [1, 2, 3, 4, 5], "what the engine goes on from"
    trajectory.say(generated(6, version=4))
    trajectory.say(generated(7, version=5, finish_reason="length"))
    sample = trajectory.sample(finish_reason=trajectory.finish_reason)
    assert sample.tokens.numpy().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert sample.is_sampled == Bits.of([0, 1, 1, 0, 0, 1, 1])
    assert sample.sampled_tokens.tolist() == [2, 3, 6, 7]
    assert sample.logprobs == Float32s.of([-1.0, -1.5, -3.0, -3.5])
    assert sample.version_spans == (VersionSpan(4, 0, 2), VersionSpan(4, 2, 3), VersionSpan(5, 3, 4))
    assert sample.finish_reason == "length"


def test_a_segment_is_a_context_of_its_own() -> None:
    trajectory = Trajectory([1, 2])
    trajectory.say(generated(3))
    trajectory.begin_segment([1, 4])
    trajectory.say(generated(5, 6))
    sample = trajectory.sample(finish_reason="stop", turns=2)
    assert sample.tokens.numpy().tolist() == [1, 2, 3, 1, 4, 5, 6]
    assert sample.segments == (3,)
    assert sample.sampled_tokens.tolist() == [3, 5, 6]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 99), max_size=4), st.lists(st.integers(0, 99), max_size=4)))
)
def test_any_turns_make_a_sample_that_holds_together(turns: list[tuple[list[int], list[int]]]) -> None:
    trajectory, expected, mask = Trajectory([1]), [1], [0]
    trajectory.say(generated())
    for action, observation in turns:
        trajectory.say(generated(*action))
        trajectory.observe(observation)
        expected += [*action, *observation]
        mask += [1] * len(action) + [0] * len(observation)
    sample = trajectory.sample(finish_reason="stop")
    assert sample.tokens.numpy().tolist() == trajectory.tokens == expected
    assert sample.is_sampled == Bits.of(mask)
    assert (trajectory.num_tokens, trajectory.num_sampled) == (len(mask), sum(mask))
