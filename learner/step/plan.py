"""The plan of one optimizer step on one rank: which samples, in which forward passes. Collated once, for all
passes of the step.

    Share: this rank's groups of a batch --plan_micro_batches--> passes --collate--> ModelInputs
                                                      `--in the order of the passes--> SampleArrays

Since the flat arrays are in the order of the passes, the samples of a pass are a slice of them, and so are
their tokens. A sample that no pass can hold lies in several passes, one after another, each with some of its
segments: these passes have the same sample, and the tokens that follow one another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from core.config import LearnerConfig
from learner.step.packing import ModelInputs, TokenSequence, collate, plan_micro_batches
from learner.step.samples import SampleArrays, Stretch, arrays_of, sequences_of
from learner.step.share import Share


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass over the samples of `stretch`, or over the tokens there of its one sample. `is_whole`
    says that every group in it is complete.
    """

    inputs: ModelInputs
    stretch: Stretch
    is_whole: bool


@dataclass(frozen=True)
class StepPlan:
    """What this rank does in one optimizer step; `plan_step` makes it.

    step        optimizer steps done before this one
    num_groups  groups of the step over all ranks, by which the loss is divided
    samples     the samples of this rank, in the order of the passes
    passes      first those over whole groups, then those over groups that no single pass can hold
    idle        a pass over one token that counts for nothing
    """

    step: int
    num_groups: int
    samples: SampleArrays
    passes: tuple[ForwardPass, ...]
    idle: ForwardPass

    @property
    def split_passes(self) -> tuple[ForwardPass, ...]:
        """The passes over groups that no single pass can hold."""
        return tuple(each for each in self.passes if not each.is_whole)

    @property
    def split_stretch(self) -> Stretch:
        """The samples of all groups that no single pass can hold: the last ones."""
        whole = self.samples.whole
        sample, token = whole.samples.stop, whole.tokens.stop
        if self.split_passes:
            first = self.split_passes[0].stretch
            sample, token = first.samples.start, first.tokens.start
        return Stretch(slice(sample, whole.samples.stop), slice(token, whole.tokens.stop))

    def filled(self, passes: Sequence[ForwardPass], count: int) -> tuple[ForwardPass, ...]:
        """Returns `passes` and idle ones, `count` in all: ZeRO-3 gathers in every pass, so that all ranks
        must run equally many.
        """
        return (*passes, *[self.idle] * (count - len(passes)))


def plan_step(
    share: Share,
    learner: LearnerConfig,
    *,
    needs: Collection[str],
    pad_id: int,
    device: torch.device,
    shares_beginnings: bool = False,
) -> StepPlan:
    """Makes the plan of this rank from its share of the batch.

    `needs` are those of the objective; `shares_beginnings` is for `collate`. Raises ConfigError for a
    sequence beyond `learner.micro_batch_tokens`, DataError for one whose first token was sampled.
    """
    members = [(group, place) for group in share.groups for place in range(len(group.samples))]
    segments = [sequences_of(group.samples[place]) for group, place in members]
    sequences = list(chain.from_iterable(segments))
    sample_of = [sample for sample, mine in enumerate(segments) for _ in mine]
    micro_batches = plan_micro_batches(
        [sequence.num_tokens for sequence in sequences],
        [members[sample][0].group_id for sample in sample_of],
        learner.micro_batch_tokens,
        learner.layout,
        sample_of,
    )
    order: dict[int, None] = {}  # The samples, each where its first pass is.
    passes: list[ForwardPass] = []
    first_token = 0
    for micro in micro_batches:
        inputs = collate(
            [sequences[index] for index in micro.indices],
            learner.layout,
            pad_id,
            device,
            shares_beginnings=shares_beginnings,
        )
        mine = dict.fromkeys(sample_of[index] for index in micro.indices)
        order |= mine
        stretch = Stretch(
            slice(len(order) - len(mine), len(order)), slice(first_token, first_token + len(inputs.targets_T))
        )
        passes.append(ForwardPass(inputs, stretch, micro.whole))
        first_token = stretch.tokens.stop
    return StepPlan(
        step=share.index.step,
        num_groups=len(share.index.groups),
        samples=arrays_of([members[sample] for sample in order], share.index.step, needs, device),
        passes=tuple(passes),
        idle=_idle(learner, pad_id, device),
    )


def _idle(learner: LearnerConfig, pad_id: int, device: torch.device) -> ForwardPass:
    inputs = collate([TokenSequence.of_turn([pad_id], [pad_id])], learner.layout, pad_id, device)
    return ForwardPass(inputs, Stretch(slice(0, 0), slice(0, 0)), is_whole=True)
