"""A rank's share of a batch: the index of all of it, and the groups that this rank trains, decoded by it
alone.

    rank 0: encoded batch --open_batch--> index ------- broadcast -------> every rank: which groups are whose
                                    `---> payloads -- to whom they belong -> that rank: decoded

The batch as a whole is nowhere decoded. What every rank must know alike, such as ages, rewards and whether
the log-probs are finite, is in the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from core.records import (
    Batch,
    BatchIndex,
    EncodedBatch,
    Group,
    complete_group,
    decode_index,
    encode,
    index_of,
)
from learner.step.packing import assign_groups
from learner.step.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """A rank's part of a batch: `groups` are those of `index` that it trains, whole, in the index's order.

    share = receive_share(open_batch(payload) if rank == 0 else None)
    """

    index: BatchIndex
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, batch: Batch, sequence_parallel: int = 1) -> Share:
        """Returns this rank's share of a batch that every rank has whole."""
        ranks, index = Ranks(), index_of(batch)
        mine = owned(index, ranks.count, sequence_parallel)[ranks.number]
        return cls(index, tuple(batch.groups[place] for place in mine))


def owned(index: BatchIndex, num_ranks: int, sequence_parallel: int = 1) -> list[list[int]]:
    """Returns for each rank the places in the index of its groups; the same on every rank that asks.

    `sequence_parallel` ranks that follow one another share their rows, and so have the same groups.
    """
    sizes = [group.num_tokens for group in index.groups]
    dealt = assign_groups(sizes, num_ranks // sequence_parallel)
    return [dealt[rank // sequence_parallel] for rank in range(num_ranks)]


def receive_share(batch: EncodedBatch | None, sequence_parallel: int = 1) -> Share:
    """Returns this rank's share of the batch that rank 0 has; the others give None. Collective, on the CPU.

    Raises msgspec.MsgspecError when a payload is not the group that the index says.
    """
    ranks = Ranks()
    if ranks.count == 1:
        assert batch is not None
        return _decoded(batch.index, range(len(batch.payloads)), batch.payloads)
    told = None if batch is None else (encode(batch.index), [len(payload) for payload in batch.payloads])
    box = [told]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    assert box[0] is not None
    index, sizes = decode_index(box[0][0]), box[0][1]
    places = owned(index, ranks.count, sequence_parallel)
    mine = places[ranks.number]
    if batch is None:
        return _decoded(index, mine, _received([sizes[place] for place in mine]))
    for other in range(1, ranks.count):
        if places[other]:
            joined = bytearray().join(batch.payloads[place] for place in places[other])
            dist.send(torch.frombuffer(joined, dtype=torch.uint8), other)
    return _decoded(index, mine, [batch.payloads[place] for place in mine])


def _received(sizes: list[int]) -> list[memoryview]:
    if not sizes:
        return []
    whole = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.recv(whole, 0)
    view, ends = whole.numpy().data, np.cumsum(sizes).tolist()
    return [view[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _decoded(
    index: BatchIndex, places: range | list[int], payloads: tuple[memoryview, ...] | list[memoryview]
) -> Share:
    pairs = zip(places, payloads, strict=True)
    return Share(index, tuple(complete_group(index.groups[place], payload) for place, payload in pairs))
