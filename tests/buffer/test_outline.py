"""What is read of an encoded group without its samples is what they say, and nothing is taken on trust."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from buffer.outline import group_id_in, plain_head_in
from buffer.usable import usable_in
from core.arrays import Bits
from core.errors import DataError
from core.records import Group, Sample, VersionSpan, decode_group, encode, head_of
from tests.support.buffers import make_group, make_offline_payload, make_payload, make_sample


def random_group(rng: random.Random) -> Group:
    samples = []
    for _ in range(rng.randint(2, 5)):
        num_sampled = rng.randint(1, 40)
        cut = rng.randint(0, num_sampled)
        sample = Sample.one_turn(
            range(rng.randint(1, 40)),
            range(num_sampled),
            [-0.5] * num_sampled,
            version_spans=(VersionSpan(3, 0, cut), VersionSpan(7, cut, num_sampled)),
            finish_reason=rng.choice(["stop", "length"]),
            turns=rng.randint(1, 3),
            num_tool_calls=rng.randint(0, 2),
            text="x" * rng.randint(0, 9),
            reward=rng.uniform(-1.0, 1.0),
        )
        samples.append(sample)
    group = make_group(*samples)
    return msgspec.structs.replace(group, group_id=rng.randrange(2**40), prompt_index=rng.randrange(99))


def test_the_head_of_a_plain_group_is_that_of_its_samples():
    rng = random.Random(0)
    for _ in range(200):
        group = random_group(rng)
        payload = encode(group)
        assert plain_head_in(payload) == head_of(group)
        assert usable_in(payload) == (head_of(group), payload, [], None)
        assert group_id_in(payload) == group.group_id


@pytest.mark.parametrize("rewards", [(1.0, None), (None, None)])
def test_of_a_group_with_errors_what_is_left_is_used(rewards):
    payload = make_payload(3, rewards=rewards)
    assert plain_head_in(payload) is None
    usable = usable_in(payload)
    assert usable.group == decode_group(usable.payload)
    assert usable.head == head_of(usable.group)
    assert len(usable.head.samples) + len(usable.errors) == 2


def test_offline_samples_and_segments_are_looked_at():
    sample = make_sample()
    cut = msgspec.structs.replace(
        sample,
        tokens=sample.tokens.joined([sample.tokens, sample.tokens]),
        is_sampled=Bits.of([False, True, True, False, False, False]),
        segments=(3,),
    )
    for payload in (make_offline_payload(0), encode(make_group(cut, cut))):
        assert plain_head_in(payload) is None
        assert usable_in(payload).head == head_of(decode_group(payload))


def _changed(payload: bytes, **fields: Any) -> bytes:
    tree = msgspec.msgpack.decode(payload)
    tree["samples"][1].update(fields)
    return msgspec.msgpack.encode(tree)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": b"\0" * 16},
        {"tokens": b"\0" * 23},
        {"logprobs": b"\0" * 12},
        {"is_sampled": b""},
        {"is_sampled": b"\0"},
        {"is_sampled": b"\x02\x3d"},
        {"is_sampled": b"\x09\x3c"},
        {"version_spans": [{"version": 0, "start": 0, "end": 3}]},
        {"version_spans": [{"version": 0, "start": 1, "end": 4}]},
        {"reward": None},
        {"reward": float("nan")},
        {"reward": "1"},
        {"finish_reason": 3},
        {"text": 7},
        {"transcript": [["user", 7]]},
        {"answer_id": "a"},
    ],
)
def test_what_does_not_fit_is_refused_as_if_it_had_been_decoded(fields):
    payload = make_payload(0)
    assert plain_head_in(_changed(payload)) == plain_head_in(payload) is not None
    broken = _changed(payload, **fields)
    assert plain_head_in(broken) is None
    with pytest.raises((msgspec.ValidationError, DataError)):
        usable_in(broken)


def test_what_nobody_reads_is_checked_too_since_it_is_decoded_later():
    payload = make_payload(0)
    for change in ({"prompt": 7}, {"source_row": "3"}, {"actor": None}):
        broken = msgspec.msgpack.encode({**msgspec.msgpack.decode(payload), **change})
        assert plain_head_in(broken) is None
        with pytest.raises(msgspec.ValidationError):
            usable_in(broken)
    tree = msgspec.msgpack.decode(payload)
    del tree["prompt"]
    assert plain_head_in(msgspec.msgpack.encode(tree)) is None
    spoken = msgspec.structs.replace(make_sample(), text="caf")
    text = encode(make_group(spoken, spoken))
    assert plain_head_in(text) is not None
    assert plain_head_in(text.replace(b"caf", b"ca\xff")) is None


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", encode(make_group(make_sample()))[:-3]])
def test_bytes_that_are_no_group_are_refused(payload):
    assert plain_head_in(payload) is None
    with pytest.raises(msgspec.MsgspecError):
        usable_in(payload)
