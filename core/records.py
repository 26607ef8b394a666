"""Records are what travels between the rooms: frozen, imported by all, importing no room.

    WorkItem --> Group of Samples --> Batch      to the learner: a BatchIndex, and each Group as it was stored

A sample is one list of tokens of which some were sampled. There is no split into prompt and completion:
whatever the policy was shown, at first or later on, stands in the list where it was seen, and `is_sampled` is
0 there.

Every record is msgpack on the wire (`encode`, `decode_group` ...): no pickle crosses a process boundary.
Arrays are raw bytes, in memory as on the wire: 4 for a token, an eighth for its bit in the mask and 4 for the
log-prob of a sampled one.

A sample may have several segments: what was said in a context of its own, such as a call of a model that does
not continue the conversation before it. Each segment is a sequence of its own to the model, whose attention
and positions begin anew; all of them together are one sample, with one reward, to everything else.

The prompt is sent with every sample of a group all the same. It costs 4.1 bytes a token where a sampled token
costs 8.1, so that the mean is below 8.2 whatever the lengths are. Sharing it would make short answers to long
prompts smaller still, but a sample would be read only together with its group, and its first observation
otherwise than its later ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from core.arrays import ArrayBytes, Bits, Float32s, Int32s

# --- Records ---


class WorkItem(msgspec.Struct, gc=False, frozen=True):
    """One prompt to generate for: `WorkItem(ordinal=7, prompt_index=12, seed=1234)`.

    `ordinal` is the position in the prompt stream. `prompt_index` is the prompt's place among the usable
    ones; it and `seed` are pure functions of the run's seed, the number of prompts and the ordinal (see
    `buffer.admission.work_item`), so that an item issued again is the same item.
    """

    ordinal: int
    prompt_index: int
    seed: int


class VersionSpan(msgspec.Struct, gc=False, frozen=True):
    """Says that the sampled tokens [start, end) of a sample, counted among the sampled ones alone, are by
    weights of `version`.
    """

    version: int
    start: int
    end: int


def _oldest_version(samples: Iterable[Sample | SampleHead]) -> int | None:
    return min([span.version for sample in samples for span in sample.version_spans], default=None)


class Sample(msgspec.Struct, gc=False, frozen=True, kw_only=True, omit_defaults=True):
    """One trajectory: what the policy was shown and what it said, in the order in which it saw it.

    tokens         all tokens, the prompt's first; EOS included iff it was sampled
    is_sampled     one bit per token; never set for the first, which nothing predicts
    logprobs       behaviour log-probability of each sampled token, nats, at the sampling temperature; empty
                   for an offline sample
    version_spans  which policy version sampled which of the sampled tokens, without gaps; empty for an
                   offline sample
    turns          how often the policy spoke; one for a prompt and its answer
    segments       where in `tokens` a further segment begins, ascending; its first token is not sampled either.
                   Empty for a sample that is one conversation
    num_tool_calls how often it called a tool, also one there is not
    finish_reason  "stop" (EOS or stop string, or its environment ended it) or "length" (cut at a limit of tokens
                   or turns: a valid outcome)
    text           what it said last, for the rewards. The tokens say the same: once scored, only the first sample
                   of a group, which a human is shown, keeps it
    transcript     the conversation after the prompt, as (role, text); kept as `text` is
    reward         finite float, the sum over the turns, or None while unscored or when `error` is set
    error          why there is no reward; a failure is never reward 0
    ref_logprob    sum over sampled tokens of log pi_ref, filled by the learner's kernels; None until then
    answer_id      equal where samples of a group vote for one answer (`objective.target: majority@k`); None
                   while unscored

    Raises ValueError where the lengths do not fit one another. Example, a prompt of two tokens and an answer
    of one: `Sample(tokens=Int32s.of([5, 6, 7]), is_sampled=Bits.runs(2, 1), logprobs=Float32s.of([-0.1]),
    version_spans=(VersionSpan(0, 0, 1),), finish_reason="stop")`.
    """

    tokens: Int32s
    is_sampled: Bits
    logprobs: Float32s
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    turns: int = 1
    segments: tuple[int, ...] = ()
    num_tool_calls: int = 0
    text: str = ""
    transcript: tuple[tuple[str, str], ...] = ()
    reward: float | None = None
    error: str | None = None
    ref_logprob: float | None = None
    answer_id: int | None = None

    def __post_init__(self) -> None:
        num_bits, num_tokens = len(self.is_sampled), len(self.tokens)
        num_sampled, num_logprobs = self.is_sampled.count(), len(self.logprobs)
        if num_bits != num_tokens:
            raise ValueError(f"is_sampled has {num_bits} bits for {num_tokens} tokens; expected one each")
        if num_logprobs not in (0, num_sampled):
            raise ValueError(
                f"{num_logprobs} logprobs for {num_sampled} sampled tokens; expected one each, or none"
            )
        end = 0
        for span in self.version_spans:
            if span.start != end or span.end < end:
                raise ValueError(
                    f"version span [{span.start}, {span.end}) begins elsewhere than at {end}, where the one "
                    "before ends"
                )
            end = span.end
        if self.version_spans and end != num_sampled:
            raise ValueError(
                f"the version spans end at {end}; expected {num_sampled}, the number of sampled tokens"
            )
        if self.segments:
            _check_segments(self)

    @classmethod
    def one_turn(
        cls, prompt: Sequence[int], answer: Sequence[int], logprobs: Sequence[float] = (), **rest: Any
    ) -> Self:
        """Returns the sample of a prompt and its answer, by their token ids; `rest` are its other fields."""
        return cls(
            tokens=Int32s.of([*prompt, *answer]),
            is_sampled=Bits.runs(len(prompt), len(answer)),
            logprobs=Float32s.of(logprobs),
            **rest,
        )

    @property
    def num_tokens(self) -> int:
        """Returns the number of all tokens, as the learner sees them."""
        return len(self.tokens)

    @property
    def num_sampled(self) -> int:
        """Returns the number of tokens that the policy, or whoever it was, said."""
        return len(self.logprobs) or self.is_sampled.count()

    @property
    def sampled_tokens(self) -> npt.NDArray[np.int32]:
        """Returns the tokens that were sampled, int32 [num_sampled]."""
        found: npt.NDArray[np.int32] = self.tokens.numpy()[self.is_sampled.numpy()]
        return found

    @property
    def is_offline(self) -> bool:
        """Returns whether an unknown policy sampled it (`data.offline`): it has no behaviour log-probs and no
        age.
        """
        return not self.version_spans

    @property
    def oldest_version(self) -> int | None:
        """Returns the version of the oldest sampled token, or None for an offline sample."""
        return _oldest_version((self,))


def _check_segments(sample: Sample) -> None:
    """Raises ValueError for segments that do not cut the tokens into pieces, each with a first token that was
    shown.
    """
    bounds = (0, *sample.segments, len(sample.tokens))
    if any(first >= last for first, last in pairwise(bounds)):
        raise ValueError(
            f"segments begin at {list(sample.segments)} of {len(sample.tokens)} tokens; expected ascending "
            "places from 1 on, each before the last token's end"
        )
    is_sampled = sample.is_sampled.numpy()
    if sampled := [first for first in sample.segments if is_sampled[first]]:
        raise ValueError(
            f"the segment that begins at token {sampled[0]} begins with a sampled one, which nothing predicts"
        )


class Group(msgspec.Struct, gc=False, frozen=True, kw_only=True):
    """The samples of one WorkItem. `group_id` is the item's ordinal: at most one group per id is ever stored.

    `prompt_index` is the prompt's place among the usable ones, `source_row` its line or row in the file, from
    0.
    """

    group_id: int
    prompt_index: int
    source_row: int
    prompt: str
    samples: tuple[Sample, ...]
    actor: str = ""
    uses: int = 0

    @property
    def oldest_version(self) -> int | None:
        """Returns the version of the group's oldest token, which `max_staleness` bounds; None when all its
        samples are offline.
        """
        return _oldest_version(self.samples)

    @property
    def num_tokens(self) -> int:
        """Returns the number of all tokens of all samples, as the learner sees them."""
        return sum([sample.num_tokens for sample in self.samples])


class Batch(msgspec.Struct, gc=False, frozen=True):
    """The groups of one optimizer step. `step` counts the optimizer steps done before this one."""

    step: int
    groups: tuple[Group, ...]


# What is known of a batch without its tokens
# ---------------------------------------------------------------------


class SampleHead(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """A sample without its tokens and texts: whatever a number can say of it. A GroupHead holds one for each
    sample.
    """

    num_tokens: int
    num_sampled: int
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    reward: float | None
    turns: int = 1
    num_tool_calls: int = 0

    @property
    def is_offline(self) -> bool:
        """Returns whether an unknown policy sampled it."""
        return not self.version_spans

    @property
    def oldest_version(self) -> int | None:
        """Returns the version of the oldest sampled token, or None for an offline sample."""
        return _oldest_version((self,))


class GroupHead(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """A group without its tokens, by which a rank chooses its groups and metrics are computed;
    `head_of(group)` makes it.

    `uses` counts the batches that the group was in, this one included; `ref_logprobs` has the reference's
    log-prob sum of each sample, nats, where they are known.
    """

    group_id: int
    prompt_index: int
    samples: tuple[SampleHead, ...]
    uses: int = 0
    ref_logprobs: tuple[float | None, ...] | None = None

    @property
    def oldest_version(self) -> int | None:
        """Returns the version of the group's oldest token; None when all its samples are offline."""
        return _oldest_version(self.samples)

    @property
    def num_tokens(self) -> int:
        """Returns the number of all tokens of all samples, as the learner sees them."""
        return sum([sample.num_tokens for sample in self.samples])


class BatchIndex(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """A Batch without its tokens, which every rank is told of all groups; about 50 bytes a sample.
    `index_of(batch)` makes it.
    """

    step: int
    groups: tuple[GroupHead, ...]


def head_of(group: Group) -> GroupHead:
    """Returns the group without its tokens."""
    samples = tuple(
        SampleHead(
            len(sample.tokens),
            sample.num_sampled,
            sample.version_spans,
            sample.finish_reason,
            sample.reward,
            sample.turns,
            sample.num_tool_calls,
        )
        for sample in group.samples
    )
    refs = tuple(sample.ref_logprob for sample in group.samples)
    known = refs if any(value is not None for value in refs) else None
    return GroupHead(group.group_id, group.prompt_index, samples, group.uses, known)


def index_of(batch: Batch) -> BatchIndex:
    """Returns the batch without its tokens."""
    return BatchIndex(batch.step, tuple(map(head_of, batch.groups)))


# On the wire
# -----------------------------------------------------------------------------------------------------

Record: TypeAlias = WorkItem | Sample | Group | GroupHead | BatchIndex


class StoredGroup(NamedTuple):
    """A group as a shard keeps it: its head and itself, encoded, and what the buffer learnt of it since."""

    head: bytes
    payload: bytes
    uses: int = 0
    ref_logprobs: Sequence[float | None] | None = None

    @classmethod
    def of(cls, group: Group) -> Self:
        """Returns the group encoded."""
        return cls(encode(head_of(group)), encode(group), group.uses)


@dataclass(frozen=True)
class EncodedBatch:
    """A batch whose groups are still encoded. `payloads` are views into the batch's own bytes, in the order
    of the index.
    """

    index: BatchIndex
    payloads: tuple[memoryview, ...]


class _WireGroup(msgspec.Struct, gc=False, frozen=True, array_like=True):
    uses: int
    ref_logprobs: tuple[float | None, ...] | None
    head: msgspec.Raw
    payload: msgspec.Raw


class _WireBatch(msgspec.Struct, gc=False, frozen=True, array_like=True):
    step: int
    groups: tuple[_WireGroup, ...]


def _to_bytes(value: Any) -> bytes:
    if isinstance(value, ArrayBytes):
        return value.data
    raise NotImplementedError(f"records hold no {type(value).__name__}")


def _from_bytes(kind: type, value: Any) -> Any:
    if type(value) is bytes:
        return kind(value)
    raise ValueError(f"expected the bytes of {kind.__name__}, found {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_bytes)
_sample_decoder = msgspec.msgpack.Decoder(Sample, dec_hook=_from_bytes)
_group_decoder = msgspec.msgpack.Decoder(Group, dec_hook=_from_bytes)
_head_decoder = msgspec.msgpack.Decoder(GroupHead)
_index_decoder = msgspec.msgpack.Decoder(BatchIndex)
_batch_decoder = msgspec.msgpack.Decoder(_WireBatch)


def encode(record: Record) -> bytes:
    """Returns the msgpack bytes of a record."""
    return _encoder.encode(record)


def decode_sample(payload: bytes) -> Sample:
    """Returns the Sample in `payload`. Raises msgspec.MsgspecError when it is none, or torn."""
    return _sample_decoder.decode(payload)


def decode_group(payload: bytes | memoryview) -> Group:
    """Returns the Group in `payload`. Raises msgspec.MsgspecError when it is none, or torn."""
    return _group_decoder.decode(payload)


def decode_index(payload: bytes) -> BatchIndex:
    """Returns the BatchIndex in `payload`. Raises msgspec.MsgspecError when it is none, or torn."""
    return _index_decoder.decode(payload)


def encode_batch(step: int, groups: Iterable[StoredGroup]) -> bytes:
    """Returns an encoded Batch from stored groups, none of which is decoded."""
    wires = (
        _WireGroup(
            group.uses,
            None if group.ref_logprobs is None else tuple(group.ref_logprobs),
            msgspec.Raw(group.head),
            msgspec.Raw(group.payload),
        )
        for group in groups
    )
    return _encoder.encode(_WireBatch(step, tuple(wires)))


def merge_batches(parts: Sequence[bytes]) -> bytes:
    """Returns one encoded Batch with the groups of all `parts`, encoded Batches of the same step; none of the
    groups is decoded.
    """
    wires = [_batch_decoder.decode(part) for part in parts]
    return _encoder.encode(_WireBatch(wires[0].step, tuple(entry for wire in wires for entry in wire.groups)))


def open_batch(payload: bytes) -> EncodedBatch:
    """Returns the index of an encoded Batch, and its groups as they are. Raises msgspec.MsgspecError when it
    is none, or torn.
    """
    wire = _batch_decoder.decode(payload)
    heads = (
        msgspec.structs.replace(
            _head_decoder.decode(entry.head), uses=entry.uses, ref_logprobs=entry.ref_logprobs
        )
        for entry in wire.groups
    )
    return EncodedBatch(
        BatchIndex(wire.step, tuple(heads)), tuple(memoryview(entry.payload) for entry in wire.groups)
    )


def decode_batch(payload: bytes) -> Batch:
    """Returns the whole Batch in `payload`. Raises msgspec.MsgspecError when it is none, or torn."""
    found = open_batch(payload)
    return Batch(found.index.step, tuple(map(complete_group, found.index.groups, found.payloads)))


def complete_group(head: GroupHead, payload: bytes | memoryview) -> Group:
    """Returns the group in `payload` with what its head knows besides: its uses, and the reference's
    log-probs.

    Raises msgspec.MsgspecError when it is no group, ValidationError when it is another group than the head's.
    """
    group = decode_group(payload)
    found = (group.group_id, group.num_tokens, len(group.samples), group.oldest_version)
    if found != (head.group_id, head.num_tokens, len(head.samples), head.oldest_version):
        raise msgspec.ValidationError(
            f"the index names group {head.group_id} of {len(head.samples)} samples and {head.num_tokens} "
            f"tokens, but its payload holds group {group.group_id} of {len(group.samples)} and "
            f"{group.num_tokens}"
        )
    samples = group.samples
    if head.ref_logprobs is not None:
        pairs = zip(samples, head.ref_logprobs, strict=True)
        samples = tuple(
            sample if value is None else msgspec.structs.replace(sample, ref_logprob=value)
            for sample, value in pairs
        )
    return msgspec.structs.replace(group, uses=head.uses, samples=samples)
