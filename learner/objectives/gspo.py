"""GSPO: the clipped surrogate with one ratio per sequence, the geometric mean of its tokens' ratios.

    loss = (1/P) sum_groups (1/n) sum_i { -w_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i) +
    (beta/|y_i|) sum_t k3_it }
    s_i  = (pi(y_i|x) / mu(y_i|x))^(1/|y_i|);     A_i and k3 as in grpo.py

s_i stays much closer to 1 than a token's ratio: the paper clips at 3e-4 and 4e-4, set rivals.clip_low and
clip_high accordingly. Source: Zheng et al., "Group Sequence Policy Optimization" (arXiv 2507.18071). It
reports no KL loss: agro.beta=0. w_i: importance weights of the sequence, see _common.py; with them s_i runs
against pi_prox.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.config import AgroConfig, RivalsConfig
from learner.objectives import Objective, TokenBatch
from learner.objectives._common import (
    Groups,
    clipped_gain,
    corrects,
    kl_loss,
    known,
    needs,
    old_logprobs,
    ratio,
    refuse_agro_only,
    refuse_token_weights,
    sequence_weights,
)


@dataclass(frozen=True)
class Gspo:
    """The objective; see the module's formula."""

    agro: AgroConfig
    rivals: RivalsConfig

    @property
    def needs(self) -> frozenset[str]:
        return needs(
            behaviour_logprobs=True, proximal=corrects(self.rivals), reference_tokens=self.agro.beta > 0
        )

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        groups, beta = Groups(batch), self.agro.beta
        advantage_N = groups.standardised()
        s_N = ratio(batch.sequence_means(batch.logprobs_T.double() - old_logprobs(batch, self.rivals)))
        weight_N = sequence_weights(
            batch, self.rivals, known(batch, "proximal_logprobs_T") if corrects(self.rivals) else None
        )
        terms_N = batch.sequence_means(kl_loss(batch, beta)) - weight_N * clipped_gain(
            s_N, advantage_N, self.rivals
        )
        return groups.total(terms_N), groups.report(self.needs, beta, advantage_N, weight_N * s_N)


def build(agro: AgroConfig, rivals: RivalsConfig) -> Objective:
    """GSPO as configured; ConfigError for token-level weights and for knobs of AGRO's it does not have."""
    refuse_agro_only("gspo", agro)
    refuse_token_weights("gspo", rivals)
    return Gspo(agro, rivals)
