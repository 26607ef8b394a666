"""GSPO: the clipped surrogate with one ratio per sequence, the geometric mean of its tokens' ratios.

    loss = (1/P) sum_groups (1/n) sum_i { -w_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)
                                          + (beta/|y_i|) sum_t k3_it }
    s_i  = (pi(y_i|x) / mu(y_i|x))^(1/|y_i|);     A_i and k3 as in grpo.py

s_i stays much closer to 1 than a token's ratio: the paper clips at 3e-4 and 4e-4, and so do the defaults
here. Source: Zheng et al., "Group Sequence Policy Optimization" (arXiv 2507.18071). It reports no KL loss:
objective.beta=0. w_i: importance weights of the sequence, see _common.py; with them s_i runs against pi_prox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import (
    GroupStatistics,
    clipped_gain,
    corrects,
    kl_loss,
    known,
    needs,
    old_logprobs,
    ratio,
    sequence_weights,
)
from learner.objectives._knobs import ClipConfig, ProximalConfig, ReferenceConfig, SequenceWeightConfig


class Config(ReferenceConfig, ClipConfig, SequenceWeightConfig, ProximalConfig):
    """GSPO clips where its paper does, and has no KL loss unless asked for."""

    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, gt=0, lt=1, description="Ratios below 1 - clip_low are clipped.")
    clip_high: float = Field(4e-4, gt=0, description="Ratios above 1 + clip_high are clipped.")


@dataclass(frozen=True)
class Gspo:
    """The objective of the module's formula: `Gspo(Config()).loss(batch)`."""

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
        s_N = ratio(batch.sequence_means(batch.logprobs_T.double() - old_logprobs(batch, self.config)))
        weight_N = sequence_weights(
            batch, self.config, known(batch, "proximal_logprobs_T") if corrects(self.config) else None
        )
        terms_N = batch.sequence_means(kl_loss(batch, beta)) - weight_N * clipped_gain(
            s_N, advantage_N, self.config
        )
        return groups.total(terms_N), groups.report(self.needs, beta, advantage_N, weight_N * s_N)


def build(config: Config) -> Objective:
    """Makes GSPO with these knobs."""
    return Gspo(config)
