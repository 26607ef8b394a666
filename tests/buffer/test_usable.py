"""What is stored of a group, and groups of one."""

from __future__ import annotations

import msgspec
import pytest

from buffer.replay import meta_of
from buffer.usable import MAX_KINDS, ErrorTexts, HeldSamples, last_texts, usable_group
from core.arrays import Bits, Float32s
from core.errors import DataError
from core.staleness import AGELESS
from tests.support.buffers import make_group, make_sample


def test_samples_with_an_error_are_left_out_and_their_texts_told():
    failed = make_sample(version=0, reward=None, error="boom")
    kept, errors = usable_group(make_group(make_sample(4), failed, make_sample(3)))
    assert kept.samples == (make_sample(4), make_sample(3))
    assert kept.oldest_version == 3, "the version of a sample that is gone does not count"
    assert errors == ["boom"]


def test_offline_samples_are_usable_and_those_without_tokens_or_with_half_a_past_are_not():
    offline = msgspec.structs.replace(make_sample(), logprobs=Float32s(), version_spans=())
    group = make_group(offline, offline)
    assert usable_group(group) == (group, [])
    assert (group.oldest_version, meta_of(group).version, meta_of(group).oldest_version) == (
        None,
        None,
        AGELESS,
    )
    with pytest.raises(DataError, match="sample 1 has log-probs but no version"):
        usable_group(make_group(offline, msgspec.structs.replace(make_sample(), version_spans=())))
    with pytest.raises(DataError, match="sample 0 has no sampled tokens"):
        usable_group(
            make_group(msgspec.structs.replace(offline, is_sampled=Bits.of([0] * len(offline.tokens))))
        )


def test_a_held_sample_joins_the_next_group_of_one_of_its_row_unless_it_is_stale():
    held = HeldSamples(max_staleness=3)
    alone, other = make_group(make_sample(version=2)), make_group(make_sample(4))
    large = make_group(make_sample(4), make_sample(4))
    assert held.hold(alone)
    assert held.join(msgspec.structs.replace(other, prompt_index=1), step=4).samples == other.samples, (
        "another prompt"
    )
    assert held.join(make_group(), step=4).samples == (), "a group of which nothing is left takes nothing in"
    assert held.join(large, step=4) == large, "a group that is large enough would only grow older"
    restored = HeldSamples(max_staleness=3)
    restored.set_state(held.get_state())
    assert restored.join(other, step=5).samples == (*other.samples, *alone.samples)
    assert restored.join(other, step=5) == other, "it joins once"
    assert restored.counts == {"held_samples": 1, "joined_samples": 1}
    assert held.join(other, step=6) == other
    assert held.counts == {"held_samples": 1, "held_stale": 1}
    assert held.pop_changed() == [(0, None)]
    assert held.pop_changed() == []


def test_neither_nothing_nor_an_offline_sample_is_held():
    held = HeldSamples(max_staleness=3)
    assert not held.hold(make_group())
    assert not held.hold(
        make_group(msgspec.structs.replace(make_sample(), logprobs=Float32s(), version_spans=()))
    )
    assert held.counts == {}


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_a_sample_without_reward_or_error_is_refused(reward):
    with pytest.raises(DataError, match="scored sample 1"):
        usable_group(make_group(make_sample(), make_sample(reward=reward)))


def test_error_texts_are_counted_by_kind_and_the_newest_kinds_are_kept():
    texts = ErrorTexts()
    texts.note([("no 3 in 'a'", 1), ("boom", 1), ('no 14 in "b c"', 2)])
    assert texts.newest() == {"boom": 1, 'no 14 in "b c"': 3}
    texts.note(("x" * length, 1) for length in range(1, MAX_KINDS))
    assert len(texts.newest()) == MAX_KINDS
    assert "boom" not in texts.newest()
    assert [*last_texts(texts.newest())][-1] == "x" * (MAX_KINDS - 1)
