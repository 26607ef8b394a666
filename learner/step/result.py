"""What one optimizer step gave: the same on every rank, whichever rank trained which sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from learner.objectives import TokenBatch
from learner.step.bad_batch import Skip
from learner.step.diagnostics import COLUMNS, Column, objective_metrics
from learner.step.ranks import Ranks
from learner.step.samples import SampleArrays

FOUND = ("advantage", "weight", "log_ratio", "log_importance", "loss", "ref_logprob")
"""The columns that a step finds out; the others of COLUMNS are known before it."""


@dataclass(frozen=True)
class StepResult:
    """One learner step, done or skipped: `result = updater.update(share, lr)`, then `result.metrics()`.

    step       optimizer steps done before it
    lr         learning rate
    grad_norm  norm of the gradient before clipping; not finite when the step was skipped
    beta       strength of the KL term, for the metrics
    samples    the columns COLUMNS, one value a sample, by group and place; none when the step was skipped
    mismatch   metrics of actors' against learner's log-probs; none where no sample was fresh
    skip       why the step was not done; None when it was
    """

    step: int
    lr: float
    grad_norm: float
    beta: float = 0.0
    samples: Mapping[str, Column] = field(default_factory=dict)
    mismatch: Mapping[str, float] = field(default_factory=dict)
    skip: Skip | None = None

    def metrics(self) -> dict[str, float]:
        """Returns the step's metrics by their names in metrics.jsonl; only the optimizer's when it was
        skipped.
        """
        optimizer = {"optim/grad_norm": self.grad_norm, "optim/lr": self.lr}
        if self.skip is not None:
            return optimizer
        return {**optimizer, **self.mismatch, **objective_metrics(self.samples, self.beta)}

    def by_group(self, column: str) -> dict[int, list[float]]:
        """Returns the values of a column for each group that was trained, in the order of its samples."""
        if self.skip is not None:
            return {}
        groups, firsts = np.unique(self.samples["group"], return_index=True)
        pieces = np.split(self.samples[column], firsts[1:])
        return {int(group): piece.tolist() for group, piece in zip(groups, pieces, strict=True)}


def found_of(batch: TokenBatch, diagnostics: Mapping[str, Tensor]) -> Tensor:
    """Returns [N, len(FOUND)] float64: what the objective says of the samples of `batch`, and what holds for
    any objective.
    """
    logprobs_T = batch.logprobs_T.detach().double()
    logprob_N = batch.sequence_sums(logprobs_T)
    columns = {
        "advantage": diagnostics["advantage"],
        "weight": diagnostics["weight"],
        "log_ratio": logprob_N - batch.ref_logprobs_N,
        "log_importance": batch.sequence_sums(logprobs_T - batch.behaviour_logprobs_T.double()),
        "loss": -diagnostics["weight"] * diagnostics["advantage"] * logprob_N,
        "ref_logprob": batch.ref_logprobs_N,
    }
    return torch.stack([columns[name].double() for name in FOUND], dim=1)


def gather_samples(ranks: Ranks, samples: SampleArrays, found_NK: Tensor) -> dict[str, Column]:
    """Returns the columns COLUMNS of all ranks' samples, ordered by group and place in it. Collective."""
    known = {
        "group": samples.groups_N,
        "prompt_index": samples.prompts_N,
        "index": samples.places_N,
        "reward": samples.rewards_N,
        "staleness": samples.staleness_N,
        **dict(zip(FOUND, found_NK.unbind(1), strict=True)),
    }
    mine = torch.stack([known[name].double() for name in COLUMNS], dim=1).cpu().numpy()
    table = np.concatenate(ranks.gather(mine))
    table = table[np.lexsort((table[:, COLUMNS.index("index")], table[:, COLUMNS.index("group")]))]
    return {name: table[:, number] for number, name in enumerate(COLUMNS)}


def gather_skip(
    ranks: Ranks,
    samples: SampleArrays,
    faults: Sequence[str | None],
    mean_logprobs: Sequence[float | None],
    grad_norm: float = math.nan,
) -> Skip:
    """Returns why the step is not done, as every rank then knows it. Collective.

    `faults` are what is not finite of each sample of this rank; `mean_logprobs` its mean by the policy, where
    the policy saw it.
    """
    mine = list(zip(samples.groups_N.tolist(), samples.places_N.tolist(), faults, mean_logprobs, strict=True))
    reasons: dict[int, str] = {}
    means: dict[int, list[float | None]] = {}
    for group_id, _, fault, mean in sorted(chain(*ranks.gather(mine)), key=itemgetter(0, 1)):
        means.setdefault(group_id, []).append(mean)
        if fault:
            reasons.setdefault(group_id, fault)
    return Skip(
        reasons=reasons,
        grad_norm=grad_norm,
        mean_logprobs={group_id: tuple(values) for group_id, values in means.items()},
    )
