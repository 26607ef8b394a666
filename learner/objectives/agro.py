"""AGRO with weights after centring:

    loss = -(1/P) sum_groups (1/n) sum_i sum_t stop_gradient[w_it A_i] log pi(y_it | x, y_i<t)

A_i from `agro_advantages` over the WHOLE group, whatever version sampled it. Any positive weight applied
after the unweighted centring leaves pi* the fixed point (derived; tests/learner/objectives/test_objectives.py), since every A_i
is 0 there:

    truncated   w_it = min(cap, pi(y_i) / mu(y_i))                 one for the sequence
    geometric   w_it = min(cap, (pi(y_i) / mu(y_i))^(1/length))    one for the sequence
    token       w_it = min(cap, pi(y_it) / mu(y_it))

`target` pass@k or majority@k replaces the reward's part of A_i (learner/objectives/_k_sample.py). The on-policy term
(on_policy_coef) is valid for samples of the current policy: it acts on those of staleness 0 (on_policy_gate fresh), or on
all times min(cap, pi/mu) (weighted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.config import AgroConfig, RivalsConfig
from learner.objectives import Objective, TokenBatch
from learner.objectives._advantages import agro_advantages
from learner.objectives._k_sample import k_sample_advantages


@dataclass(frozen=True)
class Agro:
    """The objective; see the module's formula. Coefficients are computed in float64 whatever the
    log-probs' dtype.
    """

    config: AgroConfig

    @property
    def needs(self) -> frozenset[str]:
        config = self.config
        needed = {
            "reference": config.beta > 0,
            "behaviour_logprobs": config.importance_weight != "none"
            or (config.on_policy_coef > 0 and config.on_policy_gate == "weighted"),
            "freshness": config.on_policy_coef > 0 and config.on_policy_gate == "fresh",
            "prompt_variance": config.on_policy_coef > 0 and config.on_policy_baseline == "running",
            "answers": config.target.startswith("majority"),
            "completions": config.duplicates == "drop",
        }
        return frozenset(name for name, is_needed in needed.items() if is_needed)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_T = batch.logprobs_T.detach().double()
        rewards_N = batch.rewards_N.double()
        log_ratio_N = torch.zeros_like(rewards_N)
        if self.config.beta > 0:
            log_ratio_N = batch.sequence_sums(logprobs_T) - batch.ref_logprobs_N.double()
        kept_N = self._kept(batch)
        _, group_of_N = torch.unique(batch.groups_N, return_inverse=True)
        sizes_N = torch.bincount(group_of_N[kept_N], minlength=int(group_of_N.max()) + 1)[
            group_of_N
        ].clamp_min(1)
        zero_std_N = _zero_std(rewards_N, group_of_N)

        advantage_N = torch.zeros_like(rewards_N)
        advantage_N[kept_N] = self._advantages(rewards_N, log_ratio_N, logprobs_T, batch, kept_N)
        if self.config.zero_std == "drop":
            advantage_N = advantage_N.masked_fill(zero_std_N, 0.0)
        weight_T = self._weights(logprobs_T, batch)
        coefficient_T = -weight_T * (advantage_N / (sizes_N * batch.num_groups))[batch.sequence_T]
        loss = (coefficient_T.to(batch.logprobs_T.dtype) * batch.logprobs_T).sum()

        diagnostics = {
            "advantage": advantage_N,
            "residual": rewards_N - self.config.beta * log_ratio_N,
            "log_ratio": log_ratio_N,
        }
        return loss, diagnostics | {"weight": batch.sequence_means(weight_T), "zero_std": zero_std_N}

    def _advantages(
        self, rewards_N: Tensor, log_ratio_N: Tensor, logprobs_T: Tensor, batch: TokenBatch, kept_N: Tensor
    ) -> Tensor:
        """Of the samples in `kept_N`, in their order."""
        config, groups = self.config, batch.groups_N[kept_N]
        rewards, log_ratios = rewards_N[kept_N], log_ratio_N[kept_N]
        if config.target != "mean":
            answers = None if batch.answers_N is None else batch.answers_N[kept_N]
            gain = k_sample_advantages(
                rewards, groups, target=config.target.partition("@")[0], k=config.target_k, answers=answers
            )
            return gain + agro_advantages(torch.zeros_like(rewards), log_ratios, groups, beta=config.beta)
        off_policy = agro_advantages(rewards, log_ratios, groups, beta=config.beta)
        if config.on_policy_coef == 0:
            return off_policy
        variances = (
            batch.needed("prompt_variance_N")[kept_N].double()
            if config.on_policy_baseline == "running"
            else None
        )
        on_policy = agro_advantages(
            rewards,
            log_ratios,
            groups,
            beta=config.beta,
            on_policy_coef=config.on_policy_coef,
            on_policy_baseline=config.on_policy_baseline,
            running_variances=variances,
        )
        return off_policy + self._gate(logprobs_T, batch)[kept_N] * (on_policy - off_policy)

    def _gate(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        """[N] what the on-policy term is multiplied by, besides the weight that everything is
        multiplied by.
        """
        if self.config.on_policy_gate == "fresh":
            return (batch.staleness_N == 0).double()
        if self.config.importance_weight == "truncated":
            return torch.ones_like(batch.staleness_N)  # min(cap, pi/mu) is on the whole advantage already.
        return self._sequence_weight(logprobs_T, batch)

    def _weights(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        """[T] weights after centring."""
        kind = self.config.importance_weight
        if kind == "none":
            return torch.ones_like(logprobs_T)
        if kind == "truncated":
            return self._sequence_weight(logprobs_T, batch)[batch.sequence_T]
        log_weight_T = _log_weight(logprobs_T, batch)
        if kind == "geometric":
            log_weight_T = batch.sequence_means(log_weight_T)[batch.sequence_T]
        return self._capped(log_weight_T)

    def _sequence_weight(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        return self._capped(batch.sequence_sums(_log_weight(logprobs_T, batch)))

    def _capped(self, log_weight: Tensor) -> Tensor:
        """min(cap, exp(log_weight)), clamped before the exponential so that it cannot overflow."""
        return log_weight.clamp_max(math.log(self.config.importance_cap)).exp()

    def _kept(self, batch: TokenBatch) -> Tensor:
        """[N] bool: without the second and later equal completions of a group, where duplicates are
        dropped.
        """
        if self.config.duplicates == "keep":
            return torch.ones_like(batch.groups_N, dtype=torch.bool)
        keys = torch.stack([batch.groups_N, batch.needed("completions_N")])
        _, kind_of_N = torch.unique(keys, dim=1, return_inverse=True)
        order_N = torch.arange(len(kind_of_N), device=kind_of_N.device)
        first = torch.full_like(order_N, len(order_N)).scatter_reduce(0, kind_of_N, order_N, "amin")
        return first[kind_of_N] == order_N


def _log_weight(logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
    """[T] log pi/mu."""
    log_weight_T = logprobs_T - batch.behaviour_logprobs_T.double()
    if not torch.isfinite(log_weight_T).all():
        raise ValueError(
            "behaviour_logprobs_T holds values that are not finite; agro.importance_weight and on_policy_gate = "
            "weighted need every token's"
        )
    return log_weight_T


def _zero_std(rewards_N: Tensor, group_of_N: Tensor) -> Tensor:
    """[N] bool: all rewards of the sample's group are equal."""
    empty = rewards_N.new_zeros(int(group_of_N.max()) + 1)
    bounds = [
        empty.scatter_reduce(0, group_of_N, rewards_N, how, include_self=False) for how in ("amin", "amax")
    ]
    return (bounds[0] == bounds[1])[group_of_N]


def build(config: AgroConfig, rivals: RivalsConfig) -> Objective:
    """AGRO as configured; nothing of `rivals` concerns it."""
    del rivals
    return Agro(config)
