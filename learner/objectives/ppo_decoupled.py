"""Decoupled PPO without a critic: the clip holds pi near a recent policy, a separate factor corrects for who
sampled.

    loss = (1/P) sum_groups (1/n) sum_i (1/|y_i|) sum_t
               { -v_it min(u_it A_i, clip(u_it, 1 - clip_low, 1 + clip_high) A_i) + beta k3_it }
    u    = pi/pi_prox of the token,     v = pi_prox/mu of the token, detached,     A_i and k3 as in grpo.py

pi_prox is a copy of the policy made every `objective.proximal_every` steps. `objective.importance_weight`
acts on v, which is there anyway: none leaves it as it is, tis caps it, mis masks it, at the level of the
token or of the sequence (then v is the sequence's). Source: the decoupled objective of Hilton et al., "Batch
size-invariance for policy optimization" (arXiv 2110.00641), as used by Fu et al., "AReaL" (arXiv 2505.24298).
The mean over each completion's tokens and the KL loss are GRPO's, so that the two compare.
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
    known,
    needs,
    proximal_weights,
    ratio,
)
from learner.objectives._knobs import RatioConfig


class Config(RatioConfig):
    """Decoupled PPO always has a proximal policy; the KL loss is off unless asked for."""

    name: Literal["ppo_decoupled"] = "ppo_decoupled"


@dataclass(frozen=True)
class PpoDecoupled:
    """The objective of the module's formula: `PpoDecoupled(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(behaviour_logprobs=True, proximal=True, reference_tokens=self.config.beta > 0)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        advantage_N = groups.standardised()
        proximal_T = known(batch, "proximal_logprobs_T")
        u_T = ratio(batch.logprobs_T.double() - proximal_T)
        v_T = (
            proximal_weights(batch, self.config)
            if corrects(self.config)
            else ratio(proximal_T - known(batch, "behaviour_logprobs_T"))
        )
        terms_T = kl_loss(batch, beta) - v_T * clipped_gain(u_T, advantage_N[batch.sequence_T], self.config)
        loss = groups.total(batch.sequence_means(terms_T))
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(v_T * u_T))


def build(config: Config) -> Objective:
    """Makes decoupled PPO with these knobs."""
    return PpoDecoupled(config)
