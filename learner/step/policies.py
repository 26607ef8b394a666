"""What a step asks of policies. learner/policy/zero.py has them under ZeRO-3, benchmarks/studies/lag_lab.py
as plain modules.

Every method is collective: all ranks call it equally often and in one order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from learner.step.packing import ModelInputs


class ScoringPolicy(Protocol):
    """A policy that says how likely given tokens are."""

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor:
        """Returns [T] log-probs of the sampled tokens, nats; a trained policy's are differentiable unless
        under `torch.no_grad`.
        """
        ...


class FrozenPolicy(ScoringPolicy, Protocol):
    """A policy that is not trained, and now and then becomes a copy of the one that is."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over these weights, which `TrainedPolicy.own_weights` gave."""
        ...


class TrainedPolicy(ScoringPolicy, Protocol):
    """The policy that is trained."""

    @property
    def shares_beginnings(self) -> bool:
        """True where this policy, and those frozen beside it, take what `collate` makes with
        `shares_beginnings`.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates the gradient of this rank's part of the loss; `last` marks the step's last call."""
        ...

    def step(self, lr: float) -> float:
        """Takes an optimizer step and returns the gradient's norm before clipping.

        Where the norm is not finite the step was not done: the gradients are gone, nothing has changed.
        """
        ...

    def own_weights(self, bucket_bytes: int) -> Iterable[tuple[str, Tensor]]:
        """Yields (name, whole tensor) of each weight, gathered in buckets of about `bucket_bytes`."""
        ...
