"""The running variance of each prompt's residual, the baseline `running` of AGRO's on-policy term."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from learner.step.diagnostics import Column

MEMORY = 0.5
"""How much an earlier visit still counts; prompts come back an epoch later, to another policy."""


class PromptVariances:
    """A running variance for each prompt: `of` before a step, `observe` after it. Equal on every rank."""

    def __init__(self) -> None:
        self._variances: dict[int, float] = {}

    def of(self, prompts_N: Tensor) -> Tensor:
        """Returns [N] float64, the variance of each sample's prompt; NaN for one that was never visited."""
        values = [self._variances.get(prompt, math.nan) for prompt in prompts_N.tolist()]
        return torch.tensor(values, dtype=torch.float64, device=prompts_N.device)

    def observe(self, samples: Mapping[str, Column], beta: float) -> None:
        """Lets the residuals r - beta * ell of these samples (learner/step/diagnostics.py) count for their
        prompts' next visit.
        """
        residuals = samples["reward"] - beta * samples["log_ratio"]
        for prompt in np.unique(samples["prompt_index"]):
            values = residuals[samples["prompt_index"] == prompt]
            if len(values) > 1:
                variance = float(np.var(values, ddof=1))
                before = self._variances.get(int(prompt), variance)
                self._variances[int(prompt)] = MEMORY * before + (1 - MEMORY) * variance

    def get_state(self) -> list[tuple[int, float]]:
        """Returns (prompt, variance) of all that were visited, as JSON."""
        return sorted(self._variances.items())

    def set_state(self, state: Iterable[tuple[int, float]]) -> None:
        """Takes over what `get_state` returned."""
        self._variances = {int(prompt): float(variance) for prompt, variance in state}
