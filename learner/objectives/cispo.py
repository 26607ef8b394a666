"""CISPO: clip the importance weight, not the update, so that every token keeps a gradient.

    loss = (1/P) sum_groups (1 / sum_i |y_i|) sum_i sum_t { -stop_gradient[w_it clip(rho_it, 0, 1 +
    clip_high)] A_i log pi_it + beta k3_it }
    rho  = pi/mu of the token;     A_i and k3 as in grpo.py

The divisor is the number of tokens of the group, as in the paper; there is no lower clip (clip_low is not
used). Source: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention" (arXiv
2506.13585). The KL loss is ours: objective.beta=0 gives the method alone. w_it: importance weights, see
_common.py; with them rho is pi/pi_prox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import (
    GroupStatistics,
    corrects,
    kl_loss,
    needs,
    old_logprobs,
    proximal_weights,
    ratio,
)
from learner.objectives._knobs import ProximalConfig, ReferenceConfig, WeightConfig


class Config(ReferenceConfig, WeightConfig, ProximalConfig):
    """CISPO clips its weight from above only; the method alone has no KL loss."""

    name: Literal["cispo"] = "cispo"
    clip_high: float = Field(0.2, gt=0, description="Ratios above 1 + clip_high count as that.")


@dataclass(frozen=True)
class Cispo:
    """The objective of the module's formula: `Cispo(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(
            behaviour_logprobs=True, proximal=corrects(self.config), reference_tokens=self.config.beta > 0
        )

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        advantage_N = groups.standardised()
        rho_T = ratio(batch.logprobs_T.detach().double() - old_logprobs(batch, self.config))
        weight_T = proximal_weights(batch, self.config) * rho_T.clamp_max(1 + self.config.clip_high)
        terms_T = kl_loss(batch, beta) - weight_T * advantage_N[batch.sequence_T] * batch.logprobs_T
        mean_length_N = groups.mean(batch.sequence_sums(torch.ones_like(terms_T)))
        # `total` divides by n: with the mean length that makes the group's number of tokens.
        loss = groups.total(batch.sequence_sums(terms_T) / torch.where(mean_length_N > 0, mean_length_N, 1.0))
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(weight_T))


def build(config: Config) -> Objective:
    """Makes CISPO with these knobs."""
    return Cispo(config)
