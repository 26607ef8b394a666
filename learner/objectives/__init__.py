"""What an objective is: a loss over whole groups of samples, one file each in this folder, found by file name.

    per-token log-probs, rewards, groups  --Objective.loss-->  scalar, a SUM over groups, and diagnostics

Because the loss is a sum over groups divided by the number of groups of the whole step, micro-batches and ranks just add
up. A group too large for one forward pass is split with `token_gradients`: pass 1 without gradient gives the log-probs of
the whole group, `token_gradients` gives c_t = dLoss/dlogprob_t, pass 2 accumulates `(c_t * logprobs).sum()` piece by piece.
By the chain rule that is the gradient of one pass over everything, for any objective.

Tensor letters: T tokens of all completions, ordered by sequence; N sequences (samples).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cluster.config import AgroConfig
from cluster.errors import ConfigError


@dataclass(frozen=True)
class TokenBatch:
    """Whole groups, flat. Never a piece of a group: the centring needs all its members.

    logprobs_T            float, log pi of each sampled token under the current policy, nats; the leaf of the gradient
    behaviour_logprobs_T  float, the same by whatever policy sampled the token
    sequence_T            int64, sorted: the sequence, in [0, N), each token belongs to; a sequence may have no token
    rewards_N             float
    ref_logprobs_N        float, log pi_ref of the completion, summed over its tokens
    groups_N              int64, group ids
    staleness_N           float, learner step minus the version of the oldest token
    num_groups            groups of the WHOLE optimizer step, over all ranks and micro-batches: the loss's divisor

    What an objective does not name in `needs` may hold NaN. Raises ValueError when shapes disagree.
    """

    logprobs_T: Tensor
    behaviour_logprobs_T: Tensor
    sequence_T: Tensor
    rewards_N: Tensor
    ref_logprobs_N: Tensor
    groups_N: Tensor
    staleness_N: Tensor
    num_groups: int

    def __post_init__(self) -> None:
        for name, like in (
            ("behaviour_logprobs_T", "logprobs_T"),
            ("sequence_T", "logprobs_T"),
            ("ref_logprobs_N", "rewards_N"),
            ("groups_N", "rewards_N"),
            ("staleness_N", "rewards_N"),
        ):
            shape, expected = tuple(getattr(self, name).shape), tuple(getattr(self, like).shape)
            if shape != expected or len(shape) != 1:
                raise ValueError(f"{name} has shape {shape}, {like} {expected}; expected one dimension of one length")
        if self.num_groups < 1:
            raise ValueError(f"num_groups is {self.num_groups}; expected the number of groups of the optimizer step, at least 1")

    def sequence_sums(self, values_T: Tensor) -> Tensor:
        """[N] sums of per-token values over each sequence, in the dtype of `values_T`; differentiable."""
        return values_T.new_zeros(len(self.rewards_N)).index_add(0, self.sequence_T, values_T)


class Objective(Protocol):
    """A loss over whole groups. A module of this folder offers one as `build(config: AgroConfig) -> Objective`."""

    @property
    def needs(self) -> frozenset[str]:
        """What the worker must provide, of "behaviour_logprobs", "reference", "proximal", "freshness"."""
        ...

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, differentiable in `batch.logprobs_T`, and detached diagnostics, [N] each.

        The loss is a sum over groups, each divided by `num_groups`. Diagnostics have fixed names, for example
        "advantage", "residual" (reward - beta * log_ratio), "log_ratio" (log pi - log pi_ref), "weight", "zero_std".
        """
        ...


def token_gradients(objective: Objective, batch: TokenBatch) -> Tensor:
    """[T] dLoss/dlogprobs_T of the whole groups in `batch`, detached; works under `torch.no_grad` too."""
    with torch.enable_grad():
        leaf = batch.logprobs_T.detach().requires_grad_()
        loss, _ = objective.loss(dataclasses.replace(batch, logprobs_T=leaf))
        return torch.autograd.grad(loss, leaf)[0]


def load_objective(name: str, config: AgroConfig) -> Objective:
    """The objective in the file `name`.py of this folder; ConfigError with the nearest name when there is none."""
    available = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    if name not in available:
        near = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(available)}"
        raise ConfigError(f"learner.objective = {name!r} is no file under learner/objectives/; {hint}")
    return importlib.import_module(f"{__name__}.{name}").build(config)
