"""Copies weights from host memory to a GPU, by way of page-locked memory.

    views on the object store --threads--> one half | the other half --device's copies--> tensors on the device

A GPU takes memory that may be swapped out piece by piece, at a few GB/s, and generation stands still
meanwhile. From page-locked memory it takes what its bus gives; and while it takes one half, the other is
filled. The object store's own memory cannot be locked by a process that maps it now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

HALF_BYTES = 64 * 2**20
SPARE_BYTES = 512 * 2**20
"""Of the device, beyond a tensor that is brought there: for what vLLM makes of it."""
NUM_THREADS, PIECE_BYTES = 4, 4 * 2**20
"""One thread copies slower than a bus of today takes."""


class Lane(Protocol):
    """The way from page-locked memory to a device."""

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begins to copy; `source` must not change until that has arrived."""

    def mark(self) -> Callable[[], object]:
        """Returns what waits until all that was begun so far has arrived."""

    def free_bytes(self) -> float:
        """Returns the device's free memory."""


class CudaLane:
    """The current stream of a GPU: what is done there next finds the tensors complete."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Puts a copy into the stream."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], object]:
        """Returns what waits for the stream as far as it is filled now."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def free_bytes(self) -> float:
        """Returns what CUDA can give, and not what the allocator keeps besides: CUDA graphs have a part of
        that.
        """
        return torch.cuda.mem_get_info(self._device)[0]


class Staging:
    """Two halves of page-locked memory, and the lane from there.

        staging = Staging(torch.device("cuda:0"))
        model.load_weights(staging.staged(weights))

    A tensor for which the device has no room beside is handed on as it is.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None, half_bytes: int = HALF_BYTES) -> None:
        is_locked = device.type == "cuda"
        self._device, self._lane = device, CudaLane(device) if lane is None else lane
        self._halves = [torch.empty(half_bytes, dtype=torch.uint8, pin_memory=is_locked) for _ in range(2)]
        self._wait: list[Callable[[], object]] = [lambda: None] * 2
        self._here = self._used = 0
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="staging")

    def staged(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the same weights, brought to the device one by one; its stream may use them at once."""
        for name, tensor in weights:
            has_room = self._lane.free_bytes() >= tensor.nbytes + SPARE_BYTES
            yield name, self._brought(tensor) if has_room else tensor

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        target, source = (each.flatten().view(torch.uint8) for each in (found, tensor.contiguous()))
        done = 0
        while done < source.nbytes:
            if self._used == self._halves[self._here].nbytes:
                self._turn()
            half = self._halves[self._here][self._used :]
            size = min(half.nbytes, source.nbytes - done)
            self._fill(half[:size].numpy(), source[done : done + size].numpy())
            self._lane.begin(target[done : done + size], half[:size])
            self._used, done = self._used + size, done + size
        return found

    def _turn(self) -> None:
        """Goes on in the other half, once what was in it has arrived."""
        self._wait[self._here] = self._lane.mark()
        self._here, self._used = 1 - self._here, 0
        self._wait[self._here]()

    def _fill(self, target: np.ndarray, source: np.ndarray) -> None:
        if source.nbytes <= PIECE_BYTES:
            np.copyto(target, source)
            return
        starts = range(0, source.nbytes, -(-source.nbytes // NUM_THREADS))
        size = starts.step
        parts = [(target[start : start + size], source[start : start + size]) for start in starts]
        for _ in self._threads.map(lambda part: np.copyto(*part), parts):
            pass
