"""Dr. GRPO: GRPO without the two normalisations that bias it, by the group's std and by the completion's
length.

    loss = (1/P) sum_groups (1/n) sum_i sum_t { -w_it min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 +
    clip_high) A_i) + beta k3_it }
    A_i  = r_i - mean_j r_j;     the rest as in grpo.py

The paper divides the sum over tokens by a constant, the generation limit. Here the constant is 1, the same
for any sharding and any config: learner.lr takes the difference, and beta is per token either way. The
paper uses no KL: beta=0. Source: Liu et al., "Understanding R1-Zero-Like Training: A Critical
Perspective" (arXiv 2503.20783).
"""

from __future__ import annotations

from typing import Literal

from learner.objectives import Objective
from learner.objectives._knobs import RatioConfig
from learner.objectives.grpo import Grpo


class Config(RatioConfig):
    """Dr. GRPO has no KL loss unless asked for."""

    name: Literal["dr_grpo"] = "dr_grpo"


def build(config: Config) -> Objective:
    """Makes Dr. GRPO with these knobs."""
    return Grpo(config, normalised=False)
