"""TBA: the trajectory balance loss with the group's estimate of the normaliser.

    loss  = (1/P) sum_groups (1/n) sum_i w_i (beta/2) (stop_gradient[log Z^] + ell_i - r_i / beta)^2
    log Z^ = mean_j (r_j / beta - ell_j),     ell = log pi - log pi_ref of the sequence

The factor beta/2 puts it on the scale of a policy gradient: its gradient is that of AGRO without weight times
(n-1)/n, since -beta times the bracket is the residual R_i = r_i - beta ell_i less the group's mean. Source:
Bartoldson et al., "Trajectory Balance with Asynchrony: Decoupling Exploration and Learning for Fast, Scalable
LLM Post-Training" (arXiv 2503.18929). w_i: importance weights of the sequence, see _common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import GroupStatistics, corrects, known, needs, sequence_weights
from learner.objectives._knobs import ReferenceConfig, RegressionConfig, SequenceWeightConfig


class Config(RegressionConfig, ReferenceConfig, SequenceWeightConfig):
    """TBA divides by beta."""

    name: Literal["tba"] = "tba"


@dataclass(frozen=True)
class Tba:
    """The objective of the module's formula: `Tba(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(reference=True, behaviour_logprobs=corrects(self.config))

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        ell_N = batch.sequence_sums(batch.logprobs_T.double()) - known(batch, "ref_logprobs_N")
        residual_N = groups.rewards_N - beta * ell_N
        gap_N = residual_N - groups.mean(residual_N.detach())
        weight_N = sequence_weights(batch, self.config)
        return groups.total(weight_N * gap_N.square() / (2 * beta)), groups.report(
            self.needs, beta, gap_N, weight_N
        )


def build(config: Config) -> Objective:
    """Makes TBA with these knobs."""
    return Tba(config)
