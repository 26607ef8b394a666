"""Reads of an encoded Group what the buffer needs to know, and makes no samples for it, in half the time.

    plain_head_in(payload) --> its head, checked; None where `core.records.decode_group` has to look
    group_id_in(payload)   --> its id, unchecked

A group is plain where every sample is scored, by weights of known versions, in one segment, and its lengths
fit one another: as nearly all are.
"""

from __future__ import annotations

import math

import msgspec

from core.records import GroupHead, SampleHead, VersionSpan


class _PlainSample(msgspec.Struct, gc=False):
    """A plain Sample whose arrays are still where they came."""

    tokens: memoryview
    is_sampled: bytes
    logprobs: memoryview
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    reward: float
    turns: int = 1
    segments: tuple[int, ...] = ()
    num_tool_calls: int = 0
    text: str = ""
    transcript: tuple[tuple[str, str], ...] = ()
    error: None = None
    ref_logprob: None = None
    answer_id: int | None = None


class _PlainGroup(msgspec.Struct, gc=False):
    """A plain Group: all fields are here, also those that nobody reads, since what is stored unread must be
    one that can be decoded.
    """

    group_id: int
    prompt_index: int
    source_row: int
    prompt: str
    samples: tuple[_PlainSample, ...]
    actor: str = ""
    uses: int = 0


class _GroupId(msgspec.Struct, gc=False):
    group_id: int


_decoder = msgspec.msgpack.Decoder(_PlainGroup)
_id_decoder = msgspec.msgpack.Decoder(_GroupId)


def group_id_in(payload: bytes) -> int:
    """Returns the id of the Group in `payload`. Raises msgspec.MsgspecError when it is none."""
    return _id_decoder.decode(payload).group_id


def plain_head_in(payload: bytes) -> GroupHead | None:
    """Returns what `core.records.head_of` says of the Group in `payload`, when it is plain.

    It is None for any other group, and for what is none: who decodes it learns which.
    """
    try:
        group = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    heads = []
    for sample in group.samples:
        num_tokens = len(sample.tokens) // 4
        num_sampled = _num_ones(sample.is_sampled, num_tokens)
        has_lengths = len(sample.logprobs) == 4 * num_sampled > 0 == len(sample.tokens) % 4
        is_whole = has_lengths and _reach(sample.version_spans, num_sampled)
        if not is_whole or sample.segments or not math.isfinite(sample.reward):
            return None
        head = SampleHead(
            num_tokens,
            num_sampled,
            sample.version_spans,
            sample.finish_reason,
            sample.reward,
            sample.turns,
            sample.num_tool_calls,
        )
        heads.append(head)
    return GroupHead(group.group_id, group.prompt_index, tuple(heads), group.uses)


def _num_ones(bits: bytes, count: int) -> int:
    """Returns how many of `count` bits, as `core.arrays.Bits` has them, are 1; 0 for bytes that are not so
    many.
    """
    num_unused = bits[0] if len(bits) > 1 else 8
    if num_unused > 7 or bits[-1] & ((1 << num_unused) - 1) or 8 * (len(bits) - 1) - num_unused != count:
        return 0
    # The first byte is counted too, and taken off again: no copy is made without it.
    return int.from_bytes(bits, "big").bit_count() - num_unused.bit_count()


def _reach(spans: tuple[VersionSpan, ...], count: int) -> bool:
    """Returns whether the spans follow one another from 0 to `count`."""
    end = 0
    for span in spans:
        if span.start != end or span.end < end:
            return False
        end = span.end
    return end == count
