"""vLLM's NCCL and IPC engines, both ends, on a CPU and within one process: only CUDA and the wires are
stand-ins.

    with on_cpu() as wires: ...     in the modules of vllm.distributed.weight_transfer, `torch` is CPU torch with a torch.cuda that does
                                    nothing, groups are `Communicator`s, and IPC handles are names of CPU
                                    tensors

A broadcast waits for its receivers, and goes on waiting for one that is dead, as NCCL's does, until somebody
calls `destroy`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

MODULES = ("base", "nccl_engine", "nccl_common", "ipc_engine", "packed_tensor")
LIMIT_S = 60.0


class Nothing:
    """A stream, or a module of them."""

    def synchronize(self, *_: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass


class CpuTorch:
    """`torch`, but for what needs a GPU."""

    cuda = SimpleNamespace(
        Stream=lambda **_: Nothing(),
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=Nothing,
        get_device_properties=lambda index: SimpleNamespace(uuid="the one CPU"),
        ipc_collect=lambda: None,
        synchronize=lambda: None,
        is_available=lambda: False,
    )
    accelerator = SimpleNamespace(current_device_index=lambda: 0, synchronize=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, device: Any = None, **named: Any) -> torch.Tensor:
        return torch.empty(*shape, **named)


class Wires:
    """Every group and every exported tensor. `formed`: the world size of each group, in order;
    `num_bytes`: through all of them.
    """

    def __init__(self) -> None:
        self.formed: list[int] = []
        self.num_bytes = 0
        self._groups: dict[int, Group] = {}
        self._lock = threading.Lock()
        self._exported: dict[int, torch.Tensor] = {}
        self._numbers = itertools.count()

    def join(self, host: str, port: int, rank: int, world_size: int, device: Any = None) -> Communicator:
        with self._lock:
            if port not in self._groups:
                self.formed.append(world_size)
                self._groups[port] = Group(self, world_size)
            group = self._groups[port]
        return group.join(rank)

    def export(self, tensor: torch.Tensor) -> tuple[None, tuple[Any, ...]]:
        number = next(self._numbers)
        self._exported[number] = tensor
        return None, (number, 1, 2, 3, 4, 5, "device")

    def rebuild(self, number: int, *_: Any) -> torch.Tensor:
        return self._exported[number]


class Group:
    """The members that met on a port. `slots`: by receiver, what it has not taken yet."""

    def __init__(self, wires: Wires, world_size: int) -> None:
        self.wires, self.world_size = wires, world_size
        self.members: dict[int, Communicator] = {}
        self.slots: dict[int, torch.Tensor] = {}
        self.changed = threading.Condition()

    def join(self, rank: int) -> Communicator:
        with self.changed:
            assert rank not in self.members, f"rank {rank} joined twice"
            self.members[rank] = Communicator(self, rank)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(self.members) == self.world_size, LIMIT_S), (
                "the rendezvous was not complete"
            )
            return self.members[rank]


class Communicator:
    """As much of PyNcclCommunicator as the engines use."""

    def __init__(self, group: Group, rank: int) -> None:
        self._group, self._rank = group, rank
        self.disabled = False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        group = self._group
        with group.changed:
            if self._rank == src:
                for rank in range(group.world_size):
                    if rank != src:
                        self._wait(lambda rank=rank: rank not in group.slots)
                        group.slots[rank] = tensor.clone()
                        group.wires.num_bytes += tensor.nbytes
            else:
                self._wait(lambda: self._rank in group.slots)
                if not self.disabled:
                    tensor.copy_(group.slots.pop(self._rank))
            group.changed.notify_all()

    def destroy(self) -> None:
        with self._group.changed:
            self.disabled = True
            self._group.changed.notify_all()

    def _wait(self, condition: Any) -> None:
        assert self._group.changed.wait_for(lambda: self.disabled or condition(), LIMIT_S), (
            "a broadcast hung and nobody aborted it"
        )


@contextlib.contextmanager
def on_cpu() -> Iterator[Wires]:
    """vLLM's transfer engines on stand-in wires."""
    wires = Wires()
    package = "vllm.distributed.weight_transfer"
    modules = {name: importlib.import_module(f"{package}.{name}") for name in MODULES}
    with contextlib.ExitStack() as stack:
        patches: list[Any] = [mock.patch.object(module, "torch", CpuTorch()) for module in modules.values()]
        patches += [
            mock.patch.object(modules["nccl_common"], "stateless_init_process_group", wires.join),
            mock.patch.object(modules["packed_tensor"], "reduce_tensor", wires.export),
            mock.patch("torch.multiprocessing.reductions.rebuild_cuda_tensor", wires.rebuild),
        ]
        for patch in patches:
            stack.enter_context(patch)
        modules["packed_tensor"]._get_streams.cache_clear()
        yield wires


def wait_until(condition: Any, what: str, timeout_s: float = 60.0) -> None:
    """Fails by name when it does not come true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"in {timeout_s:g} s never: {what}"
        time.sleep(0.005)
