"""What the ranks of a learner tell each other within a step; nothing at all where there is one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """This rank among the others: `ranks.largest([3, 1])` is [5, 1] where another rank says [5, 0]. Its
    methods are collective.

    Ranks that share their rows (`learner.sequence_parallel`) follow one another, do the same and say the
    same: `gather` asks one of them.
    """

    def __init__(self, sequence_parallel: int = 1) -> None:
        self.number, self.count, self._alike = 0, 1, sequence_parallel
        if dist.is_initialized():
            self.number, self.count = dist.get_rank(), dist.get_world_size()

    def largest(self, counts: Sequence[int]) -> list[int]:
        """Returns the largest value of any rank, for each of `counts`."""
        if self.count == 1:
            return [int(count) for count in counts]
        values = torch.tensor([int(count) for count in counts])
        dist.all_reduce(values, dist.ReduceOp.MAX)
        found: list[int] = values.tolist()
        return found

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, by rank; of those that share their rows the first one's."""
        if self.count == 1:
            return [value]
        values = [value] * self.count
        dist.all_gather_object(values, value)
        return values[:: self._alike]

    def first(self, value: T) -> T:
        """Returns rank 0's value; what the others give is not looked at. On the CPU."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]
