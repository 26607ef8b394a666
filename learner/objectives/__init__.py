"""An objective is a loss over whole groups of samples: one file each in this folder, found by its name.

    per-token log-probs, rewards, groups  --Objective.loss-->  scalar, a SUM over groups, and diagnostics

Because the loss is a sum over groups divided by the number of groups of the whole step, micro-batches and
ranks just add up. A group too large for one forward pass is split with `token_gradients`: pass 1 without
gradient gives the log-probs of the whole group, `token_gradients` gives c_t = dLoss/dlogprob_t, pass 2
accumulates `(c_t * logprobs).sum()` piece by piece. By the chain rule that is the gradient of one pass over
everything, for any objective.

Tensor letters: N samples, T sampled tokens of all of them, ordered by sample.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.config import ObjectiveConfig


@dataclass(frozen=True)
class TokenBatch:
    """Whole groups, flat. Never a piece of a group: the centring needs all its members.

    logprobs_T            float, log pi of each sampled token by the current policy, nats; the gradient's leaf
    behaviour_logprobs_T  float, the same by whatever policy sampled the token
    sequence_T            int64, sorted: the sample, in [0, N), of each token; a sample may have none
    rewards_N             float
    ref_logprobs_N        float, log pi_ref summed over the sampled tokens
    groups_N              int64, group ids
    staleness_N           float, of the oldest token, learner steps; NaN for offline samples
    num_groups            groups of the WHOLE optimizer step, over all ranks and passes: the loss's divisor

    The following are there only where an objective names them in `needs`; without, those above may hold NaN:

    ref_logprobs_T        float, log pi_ref of each token                                   "reference_tokens"
    proximal_logprobs_T   float, log pi of each token as of the newest proximal copy        "proximal"
    prompt_variance_N     float, the prompt's running residual variance, NaN when unseen    "prompt_variance"
    answers_N             int64, equal where samples of one group vote for one answer       "answers"
    completions_N         int64, equal where samples of one group have the same tokens      "completions"

    Raises ValueError when shapes disagree.
    """

    logprobs_T: Tensor
    behaviour_logprobs_T: Tensor
    sequence_T: Tensor
    rewards_N: Tensor
    ref_logprobs_N: Tensor
    groups_N: Tensor
    staleness_N: Tensor
    num_groups: int
    ref_logprobs_T: Tensor | None = None
    proximal_logprobs_T: Tensor | None = None
    prompt_variance_N: Tensor | None = None
    answers_N: Tensor | None = None
    completions_N: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            like = "logprobs_T" if name.endswith("_T") else "rewards_N"
            shape, expected = tuple(value.shape), tuple(getattr(self, like).shape)
            if shape != expected or len(shape) != 1:
                raise ValueError(
                    f"{name} has shape {shape}, {like} {expected}; expected one dimension of one length"
                )
        if self.num_groups < 1:
            raise ValueError(
                f"num_groups is {self.num_groups}; expected the number of groups of the "
                "optimizer step, at least 1"
            )

    def sequence_sums(self, values_T: Tensor) -> Tensor:
        """Returns [N] sums of per-token values over each sample, in the dtype of `values_T`;
        differentiable.
        """
        return values_T.new_zeros(len(self.rewards_N)).index_add(0, self.sequence_T, values_T)

    def sequence_means(self, values_T: Tensor) -> Tensor:
        """Returns [N] means of per-token values over each sample; 0 for a sample without sampled tokens."""
        return self.sequence_sums(values_T) / self.sequence_sums(torch.ones_like(values_T)).clamp_min(1)

    def needed(self, name: str) -> Tensor:
        """Returns the optional field `name`. Raises ValueError when it was not provided."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"{name} is None; the objective must list it in `needs`, and the caller provide it"
            )
        return value


NEEDS = frozenset(
    {
        "behaviour_logprobs",  # What sampled each token is known, with its log-prob.
        "reference",  # log pi_ref of the sequence.
        "reference_tokens",  # log pi_ref of each token.
        "proximal",  # log-probs of a copy of the policy made every `proximal_every` steps.
        "freshness",  # Some samples are of the current policy.
        "prompt_variance",
        "answers",
        "completions",
    }
)


class Objective(Protocol):
    """A loss over whole groups. A module of this folder holds its knobs, `Config`, and offers it as
    `build(config: Config) -> Objective`.

        objective = load_objective(config.objective)
        loss, diagnostics = objective.loss(batch)
        loss.backward()
    """

    @property
    def needs(self) -> frozenset[str]:
        """What the learner must provide, of NEEDS. A config that cannot provide it is refused at the
        start.
        """
        ...

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the scalar loss, differentiable in `batch.logprobs_T`, and detached diagnostics, [N] each.

        The loss is a sum over groups, each divided by `num_groups`. Diagnostics have fixed names:
        "advantage", "residual" (reward - beta * log_ratio), "log_ratio" (log pi - log pi_ref), "weight",
        "zero_std".
        """
        ...


def token_gradients(objective: Objective, batch: TokenBatch) -> Tensor:
    """Returns [T] dLoss/dlogprobs_T of the whole groups in `batch`, detached; it works under `torch.no_grad`,
    too.
    """
    with torch.enable_grad():
        leaf = batch.logprobs_T.detach().requires_grad_()
        loss, _ = objective.loss(dataclasses.replace(batch, logprobs_T=leaf))
        return torch.autograd.grad(loss, leaf)[0]


def load_objective(config: ObjectiveConfig) -> Objective:
    """Makes the objective that has these knobs, of the file in this folder that they name."""
    return importlib.import_module(f"{__name__}.{config.name}").build(config)
