"""GRPO: PPO's clipped surrogate per token, with the group's standardised reward as advantage and a KL loss.

    loss = (1/P) sum_groups (1/n) sum_i (1/|y_i|) sum_t
               { -w_it min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) + beta k3_it }
    rho  = pi/mu of the token,     A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-6)
    k3   = q - log q - 1,          q   = pi_ref/pi of the token

The std is with ddof 1. Where all rewards of a group are equal A is 0, the KL loss stays. Source: Shao et al.,
"DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models" (arXiv 2402.03300). w_it:
importance weights, see _common.py; with them rho is pi/pi_prox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import (
    GroupStatistics,
    clipped_gain,
    corrects,
    kl_loss,
    needs,
    old_logprobs,
    proximal_weights,
    ratio,
)
from learner.objectives._knobs import RatioConfig, strength


class Config(RatioConfig):
    """GRPO has the KL loss of its paper."""

    name: Literal["grpo"] = "grpo"
    beta: float = strength(0.04)


@dataclass(frozen=True)
class Grpo:
    """The objective of the module's formula: `Grpo(Config()).loss(batch)`. `normalised` off leaves out the
    std and 1/|y_i| (dr_grpo.py).
    """

    config: RatioConfig
    normalised: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(
            behaviour_logprobs=True, proximal=corrects(self.config), reference_tokens=self.config.beta > 0
        )

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        advantage_N = groups.standardised() if self.normalised else groups.centred(groups.rewards_N)
        rho_T = ratio(batch.logprobs_T.double() - old_logprobs(batch, self.config))
        weight_T = proximal_weights(batch, self.config)
        terms_T = kl_loss(batch, beta) - weight_T * clipped_gain(
            rho_T, advantage_N[batch.sequence_T], self.config
        )
        loss = groups.total(
            batch.sequence_means(terms_T) if self.normalised else batch.sequence_sums(terms_T)
        )
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(weight_T * rho_T))


def build(config: Config) -> Objective:
    """Makes GRPO with these knobs."""
    return Grpo(config)
