"""Asymmetric REINFORCE: a baseline below the mean, so that good samples weigh more than bad ones.

    loss = (1/P) sum_groups (1/n) sum_i sum_t { -stop_gradient[w_it A_i] log pi_it + beta k3_it }
    A_i  = r_i - (mean_j r_j - baseline_shift)

Source: Arnal et al., "Asymmetric REINFORCE for off-Policy Reinforcement Learning: Balancing positive and
negative rewards" (arXiv 2506.20520): a baseline under the behaviour's expected reward improves the policy
off-policy, one above it collapses. The KL loss (k3 against pi_ref, per token) is ours: the method alone is
beta = 0, the default. A group of one has no term here either. w_it: importance weights, see _common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import GroupStatistics, corrects, kl_loss, needs, token_weights
from learner.objectives._knobs import ReferenceConfig, WeightConfig


class Config(ReferenceConfig, WeightConfig):
    """Asymmetric REINFORCE has a baseline that is shifted; the method alone has no KL loss."""

    name: Literal["asymre"] = "asymre"
    baseline_shift: float = Field(
        0.1, ge=0, description="How far the baseline lies below the group's mean reward."
    )


@dataclass(frozen=True)
class AsymRe:
    """The objective of the module's formula: `AsymRe(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(reference_tokens=self.config.beta > 0, behaviour_logprobs=corrects(self.config))

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        advantage_N = groups.centred(groups.rewards_N) + self.config.baseline_shift
        weight_T = token_weights(batch, self.config)
        terms_T = kl_loss(batch, beta) - weight_T * advantage_N[batch.sequence_T] * batch.logprobs_T
        loss = groups.total(batch.sequence_sums(terms_T))
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(weight_T))


def build(config: Config) -> Objective:
    """Makes asymmetric REINFORCE with these knobs."""
    return AsymRe(config)
