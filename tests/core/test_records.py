"""The records on the wire: the same again after a round trip, an error with a name for what is torn or
foreign, and few bytes.
"""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.arrays import Bits, Float32s, Int32s
from core.evaluation.records import EvalItem
from core.records import (
    Batch,
    Group,
    Sample,
    StoredGroup,
    VersionSpan,
    WorkItem,
    decode_batch,
    decode_group,
    decode_index,
    decode_sample,
    encode,
    encode_batch,
    index_of,
    merge_batches,
    open_batch,
)

NANS = st.floats(width=32)


def shown(mask: Bits, place: int) -> bool:
    """Whether a segment may begin here."""
    return place < len(mask) and not mask.numpy()[place]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any trajectory: observations and actions in any order, of any length, by any versions, offline too."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    mask = Bits.runs(*lengths)
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(mask), max_size=len(mask)))
    ends = sorted({*draw(st.lists(st.integers(1, max(1, mask.count())), max_size=3)), mask.count()} - {0})
    ends = [end for end in ends if end <= mask.count()]
    is_offline, starts = draw(st.booleans()), draw(st.sets(st.integers(1, 40), max_size=3))
    spans = [
        VersionSpan(number, start, end)
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    logprobs = draw(st.lists(NANS, min_size=mask.count(), max_size=mask.count()))
    if is_offline:
        logprobs, spans = [], []
    return Sample(
        tokens=Int32s.of(tokens),
        is_sampled=mask,
        logprobs=Float32s.of(logprobs),
        version_spans=tuple(spans),
        turns=draw(st.integers(1, 3)),
        segments=tuple(sorted(place for place in starts if shown(mask, place))),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(st.text(max_size=10)),
        reward=draw(st.none() | st.floats(allow_nan=False)),
        error=draw(st.none() | st.text(max_size=5)),
        answer_id=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Any group of up to three samples."""
    return Group(
        group_id=draw(st.integers(0, 2**40)),
        prompt_index=draw(st.integers(0, 2**31)),
        source_row=draw(st.integers(0, 2**31)),
        prompt=draw(st.text(max_size=10)),
        samples=tuple(draw(st.lists(samples(), max_size=3))),
        actor="a0",
    )


def a_group(group_id: int = 1, *, num_samples: int = 2) -> Group:
    sample = Sample.one_turn(
        [5, 6],
        [7, 8, 9],
        [-0.5, -1.0, -2.0],
        version_spans=(VersionSpan(3, 0, 3),),
        finish_reason="stop",
        reward=1.0,
    )
    return Group(group_id=group_id, prompt_index=4, source_row=9, prompt="p", samples=(sample,) * num_samples)


@given(samples())
def test_a_sample_comes_back(sample: Sample) -> None:
    assert decode_sample(encode(sample)) == sample
    assert sample.sampled_tokens.tolist() == [
        token
        for token, said in zip(sample.tokens.numpy().tolist(), sample.is_sampled.numpy(), strict=True)
        if said
    ]


@given(st.lists(groups(), max_size=3))
def test_a_batch_comes_back_and_its_index_is_that_of_its_groups(found: list[Group]) -> None:
    payload = encode_batch(7, map(StoredGroup.of, found))
    batch = Batch(7, tuple(found))
    assert decode_batch(payload) == batch
    index = open_batch(payload).index
    assert encode(index) == encode(index_of(batch))
    assert encode(decode_index(encode(index))) == encode(index)
    assert [group.num_tokens for group in index.groups] == [group.num_tokens for group in found]
    assert [group.oldest_version for group in index.groups] == [group.oldest_version for group in found]
    assert merge_batches([payload]) == payload


def test_what_the_buffer_learns_later_comes_with_the_batch() -> None:
    stored = StoredGroup.of(a_group())._replace(uses=3, ref_logprobs=[-1.5, -2.5])
    payload = merge_batches([encode_batch(7, [stored]), encode_batch(7, [StoredGroup.of(a_group(2))])])
    first, second = decode_batch(payload).groups
    assert (first.uses, [sample.ref_logprob for sample in first.samples]) == (3, [-1.5, -2.5])
    assert (second.uses, [sample.ref_logprob for sample in second.samples]) == (0, [None, None])
    assert [
        (group.group_id, group.uses, group.ref_logprobs) for group in open_batch(payload).index.groups
    ] == [
        (1, 3, (-1.5, -2.5)),
        (2, 0, None),
    ]


def test_a_torn_payload_is_an_error_wherever_it_ends() -> None:
    group, batch = encode(a_group()), encode_batch(1, [StoredGroup.of(a_group())])
    for whole, decode in (
        (group, decode_group),
        (batch, decode_batch),
        (encode(a_group().samples[0]), decode_sample),
    ):
        for end in range(len(whole)):
            with pytest.raises(msgspec.MsgspecError):
                decode(whole[:end])


@given(st.binary(max_size=200))
def test_foreign_bytes_are_an_error(payload: bytes) -> None:
    for decode in (decode_group, decode_batch, decode_sample, decode_index):
        with pytest.raises(msgspec.MsgspecError):
            decode(payload)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": b"abcde"}, "no whole number of int32 values"),
        ({"tokens": [1, 2]}, "expected the bytes of Int32s, found list"),
        ({"is_sampled": b""}, "are no bits"),
        ({"is_sampled": b"\x08\x00"}, "are no bits"),
        ({"is_sampled": b"\x03\xff"}, "are no bits"),
        ({"is_sampled": b"\x04\x30"}, "is_sampled has 4 bits for 5 tokens"),
        ({"logprobs": b"abcd"}, "1 logprobs for 3 sampled tokens"),
        ({"version_spans": [{"version": 1, "start": 1, "end": 3}]}, "begins elsewhere than at 0"),
        ({"version_spans": [{"version": 1, "start": 0, "end": 2}]}, "the version spans end at 2; expected 3"),
        ({"segments": [1, 1]}, r"segments begin at \[1, 1\] of 5 tokens; expected ascending"),
        ({"segments": [0]}, "segments begin at .*expected ascending places from 1 on"),
        ({"segments": [-1]}, "segments begin at"),
        ({"segments": [5]}, "segments begin at .* of 5 tokens"),
        ({"segments": [1, 3]}, "the segment that begins at token 3 begins with a sampled one"),
    ],
)
def test_a_sample_that_does_not_fit_together_is_refused(changes: dict[str, object], reason: str) -> None:
    fields = msgspec.msgpack.decode(encode(a_group().samples[0]))
    with pytest.raises(msgspec.ValidationError, match=reason):
        decode_sample(msgspec.msgpack.encode(fields | changes))


def test_a_payload_under_another_groups_head_is_refused() -> None:
    mixed = StoredGroup.of(a_group(1))._replace(payload=encode(a_group(2)))
    with pytest.raises(
        msgspec.ValidationError,
        match="the index names group 1 of 2 samples and 10 tokens, but its payload holds group 2",
    ):
        decode_batch(encode_batch(1, [mixed]))


def test_a_token_costs_few_bytes() -> None:
    """Four for its id, four for its log-prob where it was sampled, and an eighth for the mask; heads and
    names are a small rest.
    """
    prompt, answer = list(range(1000)), list(range(3000))
    spans = (VersionSpan(3, 0, 3000),)
    sample = Sample.one_turn(
        prompt, answer, [-0.5] * 3000, version_spans=spans, finish_reason="stop", reward=1.0
    )
    group = Group(group_id=1, prompt_index=1, source_row=1, prompt="", samples=(sample,) * 8)
    payload = encode_batch(1, [StoredGroup.of(group)])
    assert len(payload) / group.num_tokens < 7.2
    assert len(encode(open_batch(payload).index)) < 8 * 60


@pytest.mark.parametrize("record", [WorkItem(3, 4, 5), EvalItem("math", 2, 3, 4)])
def test_items_come_back(record: WorkItem | EvalItem) -> None:
    assert msgspec.msgpack.decode(encode(record), type=type(record)) == record
