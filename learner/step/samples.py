"""The samples of one rank as flat arrays: the one place where records become tensors.

Tensor letters: N samples, T sampled tokens of all of them, ordered by sample, then position.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.arrays import Int32s
from core.records import Group, Sample
from core.staleness import is_fresh, sample_staleness
from learner.step.packing import TokenSequence

Member: TypeAlias = tuple[Group, int]
"""A group, and the place of one of its samples in it."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive samples of many: `samples` is their slice of [N] arrays, `tokens` that of [T] arrays."""

    samples: slice
    tokens: slice

    def __len__(self) -> int:
        return int(self.samples.stop - self.samples.start)

    def within(self, whole: Stretch) -> Stretch:
        """Returns where these samples lie in arrays of the samples of `whole` alone."""
        sample, token = whole.samples.start, whole.tokens.start
        return Stretch(
            slice(self.samples.start - sample, self.samples.stop - sample),
            slice(self.tokens.start - token, self.tokens.stop - token),
        )


@dataclass(frozen=True)
class SampleArrays:
    """What an optimizer step knows of its samples before any forward pass (`arrays_of` makes it of records).

    groups_N              int64, group ids
    places_N              int64, the sample's place in its group
    prompts_N             int64, the prompt's place among the usable ones
    rewards_N             float64, NaN for a sample without one
    staleness_N           float64, of the oldest token, learner steps; NaN for an offline sample
    is_fresh_N            bool, whether all tokens are of the weights that the step begins with
    ref_logprobs_N        float64, sum of log pi_ref over the sampled tokens, as the batch brought it
    has_reference_N       bool, whether the batch brought it
    sizes_N               int64, sampled tokens
    sequence_T            int64, sorted: the sample of each token
    behaviour_logprobs_T  float32, nats; NaN for an offline sample
    answers_N             int64, equal for equal answers; None unless the objective needs it
    completions_N         int64, equal for equal tokens; None unless the objective needs it
    """

    groups_N: Tensor
    places_N: Tensor
    prompts_N: Tensor
    rewards_N: Tensor
    staleness_N: Tensor
    is_fresh_N: Tensor
    ref_logprobs_N: Tensor
    has_reference_N: Tensor
    sizes_N: Tensor
    sequence_T: Tensor
    behaviour_logprobs_T: Tensor
    answers_N: Tensor | None = None
    completions_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.groups_N)

    @property
    def whole(self) -> Stretch:
        """All samples."""
        return Stretch(slice(0, len(self)), slice(0, len(self.sequence_T)))

    def of(self, stretch: Stretch) -> SampleArrays:
        """Returns the arrays of the samples of `stretch` alone."""
        cut = {
            name: value[stretch.tokens if name.endswith("_T") else stretch.samples]
            for name, value in vars(self).items()
            if value is not None
        }
        cut["sequence_T"] = cut["sequence_T"] - stretch.samples.start
        return dataclasses.replace(self, **cut)

    def sums(self, values_T: Tensor, stretch: Stretch | None = None) -> Tensor:
        """Returns [N] float64 sums of `values_T` over each sample.

        These are the values of all tokens, or of those of `stretch`; samples out of it then have the sum 0.
        """
        sequence_T = self.sequence_T if stretch is None else self.sequence_T[stretch.tokens]
        zeros_N = values_T.new_zeros(len(self), dtype=torch.float64)
        return zeros_N.index_add(0, sequence_T, values_T.double())

    def faults(self) -> list[str | None]:
        """Returns what came with each sample and is not finite; None for a sound sample."""
        is_offline_T = self.staleness_N.isnan()[self.sequence_T]
        return faults_of(
            {
                "reward": self.rewards_N,
                "behaviour log-probs": self.sums(self.behaviour_logprobs_T.masked_fill(is_offline_T, 0.0)),
                "stored reference log-prob": self.ref_logprobs_N.masked_fill(~self.has_reference_N, 0.0),
            }
        )


def arrays_of(
    members: Sequence[Member], step: int, needs: Collection[str], device: torch.device | str
) -> SampleArrays:
    """Returns the arrays of `members` at learner step `step`, on `device`; `needs` are those of the
    objective.
    """
    samples = [group.samples[place] for group, place in members]

    def integers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    def numbers(values: Iterable[float | None]) -> Tensor:
        known = [math.nan if value is None else value for value in values]
        return torch.tensor(known, dtype=torch.float64, device=device)

    def truths(values: Iterable[bool]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.bool, device=device)

    sizes_N = integers(sample.num_sampled for sample in samples)
    answers_N = completions_N = None
    if "answers" in needs:
        answers_N = integers(sample.answer_id or 0 for sample in samples)
    if "completions" in needs:
        completions_N = integers(_completion_id(sample) for sample in samples)
    return SampleArrays(
        groups_N=integers(group.group_id for group, _ in members),
        places_N=integers(place for _, place in members),
        prompts_N=integers(group.prompt_index for group, _ in members),
        rewards_N=numbers(sample.reward for sample in samples),
        staleness_N=numbers(sample_staleness(sample, step) for sample in samples),
        is_fresh_N=truths(is_fresh(sample, step) for sample in samples),
        ref_logprobs_N=numbers(sample.ref_logprob for sample in samples),
        has_reference_N=truths(sample.ref_logprob is not None for sample in samples),
        sizes_N=sizes_N,
        sequence_T=torch.arange(len(samples), device=device).repeat_interleave(sizes_N),
        behaviour_logprobs_T=_behaviour(samples).to(device),
        answers_N=answers_N,
        completions_N=completions_N,
    )


def sequences_of(sample: Sample) -> list[TokenSequence]:
    """Returns the trajectory of a sample as a forward pass takes it: a sequence for each segment."""
    tokens, is_sampled = sample.tokens.numpy(), sample.is_sampled.numpy()
    if not sample.segments:
        return [TokenSequence(tokens, is_sampled)]
    bounds = pairwise((0, *sample.segments, len(tokens)))
    return [TokenSequence(tokens[first:last], is_sampled[first:last]) for first, last in bounds]


def faults_of(named: Mapping[str, Tensor]) -> list[str | None]:
    """Returns for each of N samples the first name under which its value, [N] each, is not finite,
    or None.
    """
    found: list[str | None] = []
    names = list(named)
    is_faulty_KN = ~torch.stack(list(named.values())).isfinite()
    if not bool(is_faulty_KN.any()):
        return [None] * is_faulty_KN.shape[1]
    for column in is_faulty_KN.T.tolist():
        found.append(names[column.index(True)] if any(column) else None)
    return found


def _behaviour(samples: Sequence[Sample]) -> Tensor:
    """Returns [T] float32 log-probs of the sampled tokens by whoever sampled them; NaN for an offline
    sample's.
    """
    values: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)]
    for sample in samples:
        is_known = not sample.is_offline
        values.append(
            sample.logprobs.numpy() if is_known else np.full(sample.num_sampled, math.nan, np.float32)
        )
    return torch.from_numpy(np.concatenate(values))


def _completion_id(sample: Sample) -> int:
    """Returns 64 bits of a digest of the tokens, of which of them were sampled, and of the segments."""
    bounds = Int32s.of(sample.segments).data
    digest = hashlib.blake2b(sample.tokens.data + sample.is_sampled.data + bounds, digest_size=8)
    return int.from_bytes(digest.digest(), signed=True)
