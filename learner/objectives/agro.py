"""AGRO with weights after centring:

    loss = -(1/P) sum_groups (1/n) sum_i stop_gradient[w_i A_i] sum_t log pi(y_it | x, y_i<t)

A_i from `agro_advantages` over the WHOLE group, whatever version sampled it. Any positive w_i applied after the unweighted
centring leaves pi* the fixed point (derived; tests/test_objectives.py): `truncated` is min(cap, pi/mu) of the sequence.
The on-policy term (lr_coef) is valid for samples of the current policy only: stale ones get the off-policy advantage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.config import AgroConfig
from learner.agro import agro_advantages
from learner.objectives import Objective, TokenBatch


@dataclass(frozen=True)
class Agro:
    """The objective; see the module's formula. Coefficients are computed in float64 whatever the log-probs' dtype."""

    config: AgroConfig

    @property
    def needs(self) -> frozenset[str]:
        weighted = {"behaviour_logprobs"} if self.config.weight == "truncated" else set()
        on_policy = {"freshness"} if self.config.lr_coef > 0 else set()
        return frozenset({"reference"} | weighted | on_policy)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_T = batch.logprobs_T.detach().double()
        rewards_N = batch.rewards_N.double()
        log_ratio_N = batch.sequence_sums(logprobs_T) - batch.ref_logprobs_N.double()
        _, group_of_N, sizes_P = torch.unique(batch.groups_N, return_inverse=True, return_counts=True)
        zero_std_N = _zero_std(rewards_N, group_of_N, len(sizes_P))
        advantage_N = self._advantages(rewards_N, log_ratio_N, batch)
        if self.config.zero_std == "drop":
            advantage_N = advantage_N.masked_fill(zero_std_N, 0.0)
        weight_N = self._weights(logprobs_T, batch)

        coefficient_N = -weight_N * advantage_N / (sizes_P[group_of_N] * batch.num_groups)
        loss = (coefficient_N.to(batch.logprobs_T.dtype)[batch.sequence_T] * batch.logprobs_T).sum()
        residual_N = rewards_N - self.config.beta * log_ratio_N
        diagnostics = {"advantage": advantage_N, "residual": residual_N, "log_ratio": log_ratio_N, "weight": weight_N}
        return loss, diagnostics | {"zero_std": zero_std_N}

    def _advantages(self, rewards_N: Tensor, log_ratio_N: Tensor, batch: TokenBatch) -> Tensor:
        config = self.config
        off_policy_N = agro_advantages(rewards_N, log_ratio_N, batch.groups_N, beta=config.beta)
        if config.lr_coef == 0:
            return off_policy_N
        on_policy_N = agro_advantages(
            rewards_N, log_ratio_N, batch.groups_N, beta=config.beta, lr_coef=config.lr_coef, lr_baseline=config.lr_baseline
        )
        return torch.where(batch.staleness_N == 0, on_policy_N, off_policy_N)

    def _weights(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        """[N] min(cap, pi/mu), clamped before the exponential so that it cannot overflow; ones for weight = none."""
        if self.config.weight == "none":
            return torch.ones_like(batch.rewards_N, dtype=torch.float64)
        log_weight_N = batch.sequence_sums(logprobs_T - batch.behaviour_logprobs_T.double())
        if not torch.isfinite(log_weight_N).all():
            raise ValueError("behaviour_logprobs_T holds values that are not finite; agro.weight = truncated needs every token's")
        return log_weight_N.clamp_max(math.log(self.config.weight_cap)).exp()


def _zero_std(rewards_N: Tensor, group_of_N: Tensor, num_groups: int) -> Tensor:
    """[N] bool: all rewards of the sample's group are equal."""
    bounds = [rewards_N.new_zeros(num_groups).scatter_reduce(0, group_of_N, rewards_N, how, include_self=False) for how in ("amin", "amax")]
    return (bounds[0] == bounds[1])[group_of_N]


def build(config: AgroConfig) -> Objective:
    """AGRO as configured."""
    return Agro(config)
