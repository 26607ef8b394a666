"""Gradients of learner steps in fp64, to compare with plain formulas."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.studies.lag_lab import PlainPolicy
from core.config import Config
from core.records import Batch, index_of
from learner.objectives import load_objective
from learner.step.frozen import frozen_names
from learner.step.share import Share, owned
from learner.step.update import Updater


class Fp64Policy(PlainPolicy):
    """A policy in fp64 that keeps the gradient and does not step."""

    def __init__(self, config: Config, *, seed: int | None = None, trained: bool = True) -> None:
        super().__init__(config, trained=trained)
        self.module.double()
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def step(self, lr: float) -> float:
        self.gradient = flat([parameter.grad for parameter in self.module.parameters()])
        self.module.zero_grad()
        return float(self.gradient.norm())


def flat(gradients: Any) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def step_gradient(
    config: Config, batch: Batch, num_ranks: int = 1
) -> tuple[torch.Tensor, Fp64Policy, Fp64Policy]:
    """The gradient of a learner step on the batch, summed over the shares of `num_ranks` ranks, by the
    policy; and the reference.
    """
    policy, reference = Fp64Policy(config, seed=1), Fp64Policy(config, trained=False)
    objective, index, gradients = load_objective(config.objective), index_of(batch), []
    for places in owned(index, num_ranks):
        if not places:  # Its passes are idle ones, which the other ranks ask for.
            continue
        frozen = dict.fromkeys(frozen_names(objective), reference)
        updater = Updater(config, policy, objective, frozen, pad_id=0, device=torch.device("cpu"))
        result = updater.update(Share(index, tuple(batch.groups[place] for place in places)), 0.0)
        assert result.skip is None
        gradients.append(policy.gradient)
    return torch.stack(gradients).sum(0), policy, reference
