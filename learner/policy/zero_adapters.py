"""A frozen policy where adapters are trained: the policy with its adapters off, or with a copy of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from learner.checkpoints.checkpoint import TensorPart
from learner.policy.lora import adapters_off
from learner.policy.partitions import Read, held, padded, trained
from learner.policy.zero import ZeroPolicy
from learner.step.packing import ModelInputs


class ZeroAdapters:
    """A frozen policy that costs next to nothing where adapters are trained: at first it is the policy with
    its adapters off, the base.

    After a `load` it is a copy of the adapters as they were then; while it is asked for log-probs, they
    change places with the policy's. It serves as reference and as proximal policy, in place of a ZeroFrozen.
    """

    def __init__(self, policy: ZeroPolicy) -> None:
        self._policy = policy
        self._copy: list[torch.Tensor] | None = None  # This rank's partition of each adapter.

    @torch.no_grad()
    def logprobs(self, inputs: ModelInputs, temperature: float) -> torch.Tensor:
        """Returns [T] log-probs of the sampled tokens, nats. Collective."""
        with adapters_off(self._policy.module) if self._copy is None else self._exchanged(self._copy):
            return self._policy.logprobs(inputs, temperature)

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies the policy's adapters as they are. The merged `weights` are not looked at, so that nobody
        makes them. Not collective.
        """
        del weights
        self._copy = [parameter.ds_tensor.clone() for _, parameter in trained(self._policy.module)]

    def parts(self, kind: str) -> Iterator[TensorPart]:
        """Yields this rank's part of the copied adapters, named `<kind>/<parameter>`. They are views, to be
        copied. Not collective.
        """
        for (name, parameter), values in zip(trained(self._policy.module), self._copy or (), strict=True):
            first, last = held(parameter)
            yield TensorPart(f"{kind}/{name}", tuple(parameter.ds_shape), values[: last - first])

    def restore(self, kind: str, read: Read) -> None:
        """Takes over adapters saved by `parts(kind)`; `read` is `Checkpoint.read`. Not collective."""
        self._copy = [
            padded(parameter, read, f"{kind}/{name}", parameter.ds_tensor.dtype).to(
                parameter.ds_tensor.device
            )
            for name, parameter in trained(self._policy.module)
        ]

    @contextlib.contextmanager
    def _exchanged(self, copy: list[torch.Tensor]) -> Iterator[None]:
        """Lets the policy's adapters and `copy` change places for the time of the block."""
        self._exchange(copy)
        try:
            yield
        finally:
            self._exchange(copy)

    def _exchange(self, copy: list[torch.Tensor]) -> None:
        self._policy.forget_gathered()
        for (_, parameter), values in zip(trained(self._policy.module), copy, strict=True):
            mine = parameter.ds_tensor.clone()
            parameter.ds_tensor.copy_(values)
            values.copy_(mine)
