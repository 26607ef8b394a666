"""KL-regularised policy gradient, the KL in the reward: the baseline AGRO is compared with.

    loss = -(1/P) sum_groups (1/n) sum_i stop_gradient[w_i A_i] log pi(y_i|x)
    A_i  = r_i - mean_{j != i} r_j - beta * ell_i
    ell_i = log pi - log pi_ref of the sequence, at the CURRENT policy

Only the reward is centred. On fresh data that changes nothing on average; off-policy E_mu[grad log pi] != 0
and the fixed point is no longer pi*. Source: the KL-regularised policy gradient of Tang et al. (arXiv
2503.19612), its form derived here. w_i: importance weights, see _common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import GroupStatistics, corrects, log_ratios, needs, token_weights
from learner.objectives._knobs import ReferenceConfig, WeightConfig, strength


class Config(ReferenceConfig, WeightConfig):
    """KL-PG has a pull towards the reference, and importance weights."""

    name: Literal["kl_pg"] = "kl_pg"
    beta: float = strength(0.03)


@dataclass(frozen=True)
class KlPg:
    """The objective of the module's formula: `KlPg(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(reference=self.config.beta > 0, behaviour_logprobs=corrects(self.config))

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        advantage_N = groups.leave_one_out(groups.rewards_N)
        if beta > 0:
            advantage_N = advantage_N - beta * log_ratios(batch, self.needs)
        weight_T = token_weights(batch, self.config)
        loss = groups.total(-advantage_N * batch.sequence_sums(weight_T * batch.logprobs_T))
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(weight_T))


def build(config: Config) -> Objective:
    """Makes the KL-regularised policy gradient with these knobs."""
    return KlPg(config)
