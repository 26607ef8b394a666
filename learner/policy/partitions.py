"""A rank's part of a parameter that ZeRO-3 has cut, and how it is read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from learner.checkpoints.checkpoint import partition

Read: TypeAlias = Callable[[str, int, int], torch.Tensor]
"""(key, start, stop) -> these elements of a flattened tensor."""


def trained(module: Any) -> Iterator[tuple[str, Any]]:
    """Returns the parameters that are trained, with their names."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def held(parameter: Any) -> tuple[int, int]:
    """Returns (start, stop): this rank's elements of the flattened parameter."""
    return partition(parameter.ds_numel, dist.get_world_size(), dist.get_rank())


def padded(parameter: Any, read: Read, key: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns this rank's partition as ZeRO-3 wants it: the elements it holds, then zeros."""
    values = torch.zeros(parameter.ds_tensor.ds_numel, dtype=dtype)
    first, last = held(parameter)
    values[: last - first] = read(key, first, last)
    return values
