"""OAPL: regression of the log-ratio to the lagged behaviour policy on the optimal advantage.

    loss = (1/P) sum_groups (1/n) sum_i w_i (1 / (2 beta)) (beta log(pi(y_i|x) / mu(y_i|x)) - (r_i - V))^2
    V    = beta log mean_j exp(r_j / beta)

The behaviour policy takes the place of pi_ref: each step solves the KL-regularised problem around what
sampled, so that beta limits the step and not the distance to the model at the start. The factor 1/(2 beta)
puts it on the scale of a policy gradient. Source: Ritter et al., "LLMs Can Learn to Reason Via Off-Policy RL"
(arXiv 2602.19362). Diagnostics: "advantage" is r - V - beta log(pi/mu). w_i: importance weights of the
sequence, see _common.py; any positive one leaves the solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import GroupStatistics, known, needs, sequence_weights
from learner.objectives._knobs import RegressionConfig, SequenceWeightConfig


class Config(RegressionConfig, SequenceWeightConfig):
    """OAPL divides by beta, and has no reference."""

    name: Literal["oapl"] = "oapl"


@dataclass(frozen=True)
class Oapl:
    """The objective of the module's formula: `Oapl(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(behaviour_logprobs=True)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        best_N = groups.maximum(groups.rewards_N)
        value_N = best_N + beta * groups.mean(((groups.rewards_N - best_N) / beta).exp()).log()
        log_ratio_N = batch.sequence_sums(batch.logprobs_T.double() - known(batch, "behaviour_logprobs_T"))
        gap_N = groups.rewards_N - value_N - beta * log_ratio_N
        weight_N = sequence_weights(batch, self.config)
        return groups.total(weight_N * gap_N.square() / (2 * beta)), groups.report(
            self.needs, beta, gap_N, weight_N
        )


def build(config: Config) -> Objective:
    """Makes OAPL with these knobs."""
    return Oapl(config)
