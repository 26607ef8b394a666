"""TOPR: tapered off-policy REINFORCE. Good samples count in full, bad ones the less the less likely they have
become.

    loss  = (1/P) sum_groups (1/n) sum_i { -stop_gradient[w_i rho_i A_i] log pi(y_i|x) + beta sum_t k3_it }
    A_i   = r_i - mean_j r_j
    rho_i = 1 where A_i >= 0,  clip(pi(y_i|x) / mu(y_i|x), 0, 1) of the whole sequence where A_i < 0

Source: Le Roux et al., "Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs"
(arXiv 2503.14286). There the sign of the return, rewards of -1 and 1 less a baseline, tells good from bad;
rewards of 0 and 1 would have no bad samples, so that the baseline here is the group's mean. The KL loss is
ours: objective.beta=0 gives the method alone. w_i: importance weights, see _common.py; with them rho_i is
pi/pi_prox, and w_i acts on good samples too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import (
    GroupStatistics,
    corrects,
    kl_loss,
    needs,
    old_logprobs,
    proximal_weights,
)
from learner.objectives._knobs import ProximalConfig, ReferenceConfig, SequenceWeightConfig


class Config(ReferenceConfig, SequenceWeightConfig, ProximalConfig):
    """TOPR has weights of sequences only; the method alone has no KL loss."""

    name: Literal["topr"] = "topr"


@dataclass(frozen=True)
class Topr:
    """The objective of the module's formula: `Topr(Config()).loss(batch)`."""

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
        advantage_N = groups.centred(groups.rewards_N)
        log_rho_N = batch.sequence_sums(batch.logprobs_T.detach().double() - old_logprobs(batch, self.config))
        taper_N = torch.where(advantage_N >= 0, 1.0, log_rho_N.clamp_max(0).exp())
        weight_T = proximal_weights(batch, self.config) * taper_N[batch.sequence_T]
        terms_T = kl_loss(batch, beta) - weight_T * advantage_N[batch.sequence_T] * batch.logprobs_T
        loss = groups.total(batch.sequence_sums(terms_T))
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(weight_T))


def build(config: Config) -> Objective:
    """Makes TOPR with these knobs."""
    return Topr(config)
