"""Dr. GRPO: GRPO without the two normalisations that bias it, by the group's std and by the completion's
length.

    loss = (1/P) sum_groups (1/n) sum_i sum_t { -w_it min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 +
    clip_high) A_i) + beta k3_it }
    A_i  = r_i - mean_j r_j;     the rest as in grpo.py

The paper divides the sum over tokens by a constant, the generation limit. Here the constant is 1, the same
for any sharding and any config: learner.lr takes the difference, and agro.beta is per token either way. The
paper uses no KL: agro.beta=0. Source: Liu et al., "Understanding R1-Zero-Like Training: A Critical
Perspective" (arXiv 2503.20783).
"""

from __future__ import annotations

from core.config import AgroConfig, RivalsConfig
from learner.objectives import Objective
from learner.objectives._common import refuse_agro_only
from learner.objectives.grpo import Grpo


def build(agro: AgroConfig, rivals: RivalsConfig) -> Objective:
    """Dr. GRPO as configured; ConfigError for knobs of AGRO's it does not have."""
    refuse_agro_only("dr_grpo", agro)
    return Grpo(agro, rivals, normalised=False)
