"""RLOO: leave-one-out REINFORCE, the KL in the reward, both as of the sampling.

    loss = -(1/P) sum_groups (1/n) sum_i stop_gradient[w_i A_i] log pi(y_i|x)
    A_i  = R_i - mean_{j != i} R_j,     R_i = r_i - beta * (log mu(y_i|x) - log pi_ref(y_i|x))

mu is the behaviour policy: the penalty stays what it was when the sample was drawn, so that stale data never
feels how far pi has moved since. With mu = pi it is AGRO without weight. Source: Ahmadian et al., "Back to
Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs" (arXiv 2402.14740).
w_i: importance weights, see _common.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from learner.objectives import Objective, TokenBatch
from learner.objectives._common import GroupStatistics, corrects, known, needs, token_weights
from learner.objectives._knobs import ReferenceConfig, WeightConfig, strength


class Config(ReferenceConfig, WeightConfig):
    """RLOO has a pull towards the reference, and importance weights."""

    name: Literal["rloo"] = "rloo"
    beta: float = strength(0.03)


@dataclass(frozen=True)
class Rloo:
    """The objective of the module's formula: `Rloo(Config()).loss(batch)`."""

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        return needs(
            reference=self.config.beta > 0, behaviour_logprobs=self.config.beta > 0 or corrects(self.config)
        )

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        groups, beta = GroupStatistics(batch), self.config.beta
        penalised_N = groups.rewards_N
        if beta > 0:
            behaviour_N = batch.sequence_sums(known(batch, "behaviour_logprobs_T"))
            penalised_N = penalised_N - beta * (behaviour_N - known(batch, "ref_logprobs_N"))
        advantage_N = groups.leave_one_out(penalised_N)
        weight_T = token_weights(batch, self.config)
        loss = groups.total(-advantage_N * batch.sequence_sums(weight_T * batch.logprobs_T))
        return loss, groups.report(self.needs, beta, advantage_N, batch.sequence_means(weight_T))


def build(config: Config) -> Objective:
    """Makes RLOO with these knobs."""
    return Rloo(config)
