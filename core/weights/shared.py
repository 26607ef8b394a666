"""Weights that the processes of an engine over several GPUs read together, from memory that has no name.

    (name, tensor)* --share--> SharedWeights --pickled, to each process--> (name, tensor)*

vLLM's workers are no workers of Ray: they have no object store, and a message to them is no place for a
model. So its bytes lie once in a file in memory (`memfd_create`), which each of them maps. It is found by
this process and its descriptor, and so is gone with this process, however that ends, and is no part of
/dev/shm, which containers keep small.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from core.errors import SnapshotError
from core.weights.snapshots import ALIGNMENT_BYTES, ParamEntry, tensor_of


class SharedWeights:
    """Parameters in shared memory: iterated, here or where it was pickled to, it yields (name, tensor), views
    that nobody writes to.

    The memory lives as long as this does, in the process that shared it, or a view somewhere.
    """

    def __init__(self, entries: tuple[ParamEntry, ...], path: str, memory: Any = None) -> None:
        self._entries, self._path, self._memory = entries, path, memory

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedWeights, (self._entries, self._path)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            with open(self._path, "rb") as file:
                memory = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        except OSError as error:  # It was dropped, or is another user's.
            raise SnapshotError(f"shared weights cannot be read: {error}") from error
        return ((entry.name, tensor_of(entry, memory)) for entry in self._entries)


def share(weights: Iterable[tuple[str, torch.Tensor]]) -> SharedWeights:
    """Returns a copy of `weights` in shared memory.

    Raises SnapshotError where there is no memory for it.
    """
    tensors = list(weights)
    entries, size = [], 0
    for name, tensor in tensors:
        offset = size + -size % ALIGNMENT_BYTES
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(ParamEntry(name, dtype, tuple(tensor.shape), 0, offset))
        size = offset + tensor.nbytes
    try:
        file = os.fdopen(os.memfd_create("agro-weights"), "w+b")
        os.posix_fallocate(file.fileno(), 0, max(size, 1))  # Else a lack of memory would be a SIGBUS later.
        memory = np.frombuffer(mmap.mmap(file.fileno(), max(size, 1)), np.uint8)
    except OSError as error:
        raise SnapshotError(f"no {size / 2**30:.1f} GiB of memory to share weights in: {error}") from error
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        tensor_of(entry, memory).copy_(tensor)
    return SharedWeights(tuple(entries), f"/proc/{os.getpid()}/fd/{file.fileno()}", file)
