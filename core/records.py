"""What travels between the rooms: frozen records, imported by all, importing nothing of ours.

    WorkItem --> Group of Samples --> Batch

On the wire every record is msgpack (`encode` / `decode_group` ...): no pickle crosses a process boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import msgspec


class WorkItem(msgspec.Struct, frozen=True):
    """One prompt to generate for.

    `ordinal` is the position in the prompt stream; `row` and `seed` are pure functions of the run's seed, the
    dataset's size and the ordinal (see `buffer.admission.work_item`), so an item issued again is the same
    item.
    """

    ordinal: int
    row: int
    seed: int


class EvalItem(msgspec.Struct, frozen=True):
    """One held-out prompt to evaluate at exactly one policy version. Never enters the buffer."""

    evaluation_id: int
    policy_version: int
    row: int
    seed: int


class VersionSpan(msgspec.Struct, frozen=True):
    """Tokens [start, end) of a completion were sampled by weights of `version`."""

    version: int
    start: int
    end: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One generation.

    token_ids      completion tokens as sampled; EOS included iff it was sampled
    logprobs       behaviour log-probability of each token, nats, at the sampling temperature; empty for an offline sample
    version_spans  which policy version sampled which tokens; covers [0, len(token_ids)) without gaps; empty for an offline sample
    finish_reason  "stop" (EOS or stop string) or "length" (cut at the token limit: a valid outcome)
    reward         finite float, or None while unscored or when `error` is set
    error          why there is no reward; a failure is never reward 0
    ref_logprob    sum over tokens of log pi_ref, filled by the learner's kernels; None until then
    answer         what votes as one answer (`objective.target: majority@k`), as the reward reads it; None: the stripped text
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    text: str
    reward: float | None = None
    error: str | None = None
    ref_logprob: float | None = None
    answer: str | None = None

    @property
    def is_offline(self) -> bool:
        """Sampled by an unknown policy (`data.offline`): it has no behaviour log-probs and no age."""
        return not self.version_spans

    @property
    def oldest_version(self) -> int | None:
        """The version of the oldest token; None for an offline sample."""
        return min((span.version for span in self.version_spans), default=None)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of one WorkItem. `group_id` is the item's ordinal: at most one group per id is ever
    stored.
    """

    group_id: int
    row: int
    prompt: str
    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    actor: str = ""
    uses: int = 0

    @property
    def oldest_version(self) -> int | None:
        """The version of the oldest token of the group: what `max_staleness` bounds; None when all its
        samples are offline.
        """
        return min((span.version for sample in self.samples for span in sample.version_spans), default=None)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens of all samples, as the learner sees them."""
        return sum(len(self.prompt_ids) + len(sample.token_ids) for sample in self.samples)


class Batch(msgspec.Struct, frozen=True):
    """The groups of one optimizer step. `step` counts the optimizer steps done before this one."""

    step: int
    groups: tuple[Group, ...]


class EvalSample(msgspec.Struct, frozen=True, kw_only=True):
    """A held-out prompt with its completions and rewards, all by one policy version."""

    item: EvalItem
    prompt: str
    texts: tuple[str, ...]
    rewards: tuple[float | None, ...]
    errors: tuple[str | None, ...]
    version_spans: tuple[tuple[VersionSpan, ...], ...]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one evaluation: the mean reward over the samples that have one."""

    evaluation_id: int
    policy_version: int
    solve_rate: float
    num_problems: int
    num_samples: int
    num_errors: int


Record: TypeAlias = WorkItem | EvalItem | Sample | Group | EvalSample | Evaluation


class _WireGroup(msgspec.Struct, frozen=True, array_like=True):
    """A stored group on its way to the learner: its payload as it was inserted, and what the buffer has
    learnt of it since.
    """

    uses: int
    ref_logprobs: tuple[float, ...] | None
    group: msgspec.Raw


class _WireBatch(msgspec.Struct, frozen=True, array_like=True):
    step: int
    groups: tuple[_WireGroup, ...]


_encoder = msgspec.msgpack.Encoder()
_group_decoder = msgspec.msgpack.Decoder(Group)
_batch_decoder = msgspec.msgpack.Decoder(_WireBatch)


def encode(record: Record) -> bytes:
    """Msgpack bytes of a record."""
    return _encoder.encode(record)


def decode_group(payload: bytes) -> Group:
    """The Group in `payload`; raises msgspec.ValidationError when it is not one."""
    return _group_decoder.decode(payload)


def encode_batch(step: int, groups: Iterable[tuple[int, Sequence[float] | None, bytes]]) -> bytes:
    """A Batch from stored payloads, which are not decoded: (uses, reference log-prob of each sample or
    None, payload).
    """
    return _encoder.encode(
        _WireBatch(
            step,
            tuple(
                _WireGroup(uses, None if ref is None else tuple(ref), msgspec.Raw(payload))
                for uses, ref, payload in groups
            ),
        )
    )


def decode_batch(payload: bytes) -> Batch:
    """The Batch in `payload`; raises msgspec.ValidationError when it is not one."""
    wire = _batch_decoder.decode(payload)
    return Batch(
        wire.step, tuple(_completed(_group_decoder.decode(entry.group), entry) for entry in wire.groups)
    )


def merge_batches(parts: Sequence[bytes]) -> bytes:
    """One encoded Batch with the groups of all `parts`, encoded Batches of the same step."""
    wires = [_batch_decoder.decode(part) for part in parts]
    return _encoder.encode(_WireBatch(wires[0].step, tuple(entry for wire in wires for entry in wire.groups)))


def _completed(group: Group, wire: _WireGroup) -> Group:
    samples = group.samples
    if wire.ref_logprobs is not None:
        pairs = zip(samples, wire.ref_logprobs, strict=True)
        samples = tuple(msgspec.structs.replace(sample, ref_logprob=value) for sample, value in pairs)
    return msgspec.structs.replace(group, uses=wire.uses, samples=samples)
