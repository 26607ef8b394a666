"""The policy's weights as vLLM's trainer API wants them (`WeightSource`), from a model partitioned by ZeRO-3.

Nothing of vLLM is imported here: its trainer engines ask for `metadata()` and iterate, and that is all of the
interface that a source which holds every parameter has to have. The push transports make the formal
`WeightSource` of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch

from core.weights.transports.base import Parameter
from learner.policy.file_weights import file_units, plain_units
from learner.policy.lora import adapters_of


class Weights(Protocol):
    """A policy, as far as its weights go (`learner.policy.zero.ZeroPolicy`)."""

    @property
    def module(self) -> torch.nn.Module:
        """The module whose weights they are."""
        ...

    def named_weights(
        self, bucket_bytes: int, *, adapters_alone: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, whole tensor) of each weight (`learner.policy.zero.ZeroPolicy.named_weights`)."""
        ...


class ZeroSource:
    """The weights as (name, whole tensor), tied ones once, in the order of `metadata()`: `for name, tensor in
    source` is a fresh pass.

    A pass is collective: every rank must make it, to its end. One bucket of `bucket_bytes` is gathered at any
    time, or one larger parameter. A tensor is valid only until the next is asked for; with one rank it IS the
    parameter, which the next step changes.
    """

    def __init__(self, policy: Weights, bucket_bytes: int, *, adapters_alone: bool = False) -> None:
        """`adapters_alone` yields the adapters and nothing else."""
        self._policy, self.bucket_bytes, self._adapters_alone = policy, bucket_bytes, adapters_alone

    def metadata(self) -> list[Parameter]:
        """Returns what a pass yields, from ZeRO-3's own records (`ds_shape`): nothing is gathered. Not
        collective.
        """
        return self._metadata

    @cached_property
    def _metadata(self) -> list[Parameter]:
        module = self._policy.module
        units = plain_units(adapters_of(module)) if self._adapters_alone else file_units(module)
        return [
            Parameter(entry.key, getattr(torch, entry.dtype), entry.shape)
            for unit in units
            for entry in unit.entries
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._policy.named_weights(self.bucket_bytes, adapters_alone=self._adapters_alone))

    @property
    def largest_bytes(self) -> int:
        """The bytes that a buffer of one bucket must hold: a bucket, or the largest parameter."""
        return max(self.bucket_bytes, max((parameter.num_bytes for parameter in self.metadata()), default=0))
