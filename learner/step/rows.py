"""The samples of a batch as an update handles them on one rank, and what of them is not finite."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from core.records import Batch, Group, Sample
from core.staleness import sample_staleness
from learner.step.packing import TokenSequence


class Row:
    """One sample with what belongs to it, as the learner handles it."""

    def __init__(self, group: Group, index: int, step: int) -> None:
        self.sample: Sample = group.samples[index]
        self.group_id, self.index, self.prompt_row = group.group_id, index, group.row
        staleness = sample_staleness(self.sample, step)
        self.staleness = math.nan if staleness is None else float(staleness)
        self.sequence = TokenSequence(group.prompt_ids, self.sample.token_ids)
        self.ref_logprob = self.sample.ref_logprob
        self.ref_logprobs: Tensor | None = None  # Per token, where the objective needs them.
        self.proximal_logprobs: Tensor | None = None
        self.logprobs: Tensor | None = None  # By the policy, detached.
        self.fault: str | None = None  # What of it is not finite.

    @property
    def mean_logprob(self) -> float | None:
        """Over its tokens, by the policy, nats; None before the policy saw it."""
        return None if self.logprobs is None else float(self.logprobs.double().mean())

    @property
    def behaviour_logprobs(self) -> Sequence[float]:
        """One per token; NaN for an offline sample."""
        return self.sample.logprobs if not self.sample.is_offline else [math.nan] * len(self.sample.token_ids)

    @property
    def answer_id(self) -> int:
        """Equal for equal answers."""
        return zlib.crc32(
            (self.sample.text.strip() if self.sample.answer is None else self.sample.answer).encode()
        )

    @property
    def completion_id(self) -> int:
        """Equal for equal tokens."""
        return hash(self.sample.token_ids)


def batch_faults(batch: Batch) -> dict[int, str]:
    """By group, what came with it that is not finite. Every rank looks at the whole batch, so that all
    of them skip together.
    """
    faults: dict[int, str] = {}
    for group in batch.groups:
        for sample in group.samples:
            values = {
                "reward": math.nan if sample.reward is None else sample.reward,
                "behaviour log-probs": sum(sample.logprobs),
                "stored reference log-prob": sample.ref_logprob or 0.0,
            }
            for name, value in values.items():
                if not math.isfinite(value):
                    faults.setdefault(group.group_id, name)
    return faults


def by_row(rows: Sequence[Row], indices: Sequence[int], values_T: Tensor) -> tuple[Tensor, ...]:
    """One tensor per row of `indices`, of its tokens' values, which `values_T` has one after another."""
    return values_T.split([len(rows[i].sample.token_ids) for i in indices])


def note_faults(rows: Sequence[Row], indices: Sequence[int], values_T: Tensor, what: str) -> None:
    """Mark the rows whose values are not all finite."""
    if bool(torch.isfinite(values_T).all()):
        return
    for index, values in zip(indices, by_row(rows, indices, values_T), strict=True):
        if not bool(torch.isfinite(values).all()):
            rows[index].fault = rows[index].fault or what


def note_logprobs(rows: Sequence[Row], indices: Sequence[int], logprobs_T: Tensor) -> None:
    """Let the rows have their log-probs by the policy, detached."""
    for index, values in zip(indices, by_row(rows, indices, logprobs_T), strict=True):
        rows[index].logprobs = values
    note_faults(rows, indices, logprobs_T, "log-probs by the policy")
