"""vLLM's packed CUDA IPC: learner and actors on one GPU; chunks of one bucket are copied out of a buffer both
processes map.

The handles travel as arguments of Ray calls, not as pickles in HTTP requests:
VLLM_ALLOW_INSECURE_SERIALIZATION stays unset. There is no group: an actor that fails is left out, and the
chunks go on to the others.

tests/core/weights/test_transports.py runs all of it, and vLLM's engines at both ends, with handles that are
CPU tensors; the case `run-ipc` of `make test-gpu` is a run with CUDA's.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.base import WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

from core.weights.transports.base import Sender, Transport
from core.weights.transports.passes import VLLM_SYMBOLS as PASS_SYMBOLS
from core.weights.transports.passes import Pass
from core.weights.transports.push import PushTransport

VLLM_SYMBOLS = (
    *PASS_SYMBOLS,
    "vllm.distributed.weight_transfer.ipc_engine:IPCTrainerInitInfo",
    "vllm.distributed.weight_transfer.ipc_engine:IPCTrainerWeightTransferEngine.send_weights",
)


def build(sender: Sender) -> Transport:
    """Returns the transport by CUDA IPC, with snapshots for who does not take part."""
    return IpcTransport(sender)


class IpcPass(Pass, WeightSource):
    """A pass as vLLM's trainer API defines a source."""


class IpcTransport(PushTransport):
    """Hands chunks of each pass to the actors on the same GPU; see the module's docstring."""

    make_pass = IpcPass

    coupled = False

    def __init__(self, sender: Sender) -> None:
        super().__init__(sender)
        self._engine: Any = None
        self._told: set[str] = set()  # That chunks are packed.

    def send(self, weights: Pass) -> None:
        """Hands the pass over, chunk by chunk."""
        if not self.client.members.keys() <= self._told:
            info = IPCTrainerInitInfo(
                rank=0, packed=True, packed_buffer_size_bytes=self._sender.source.largest_bytes
            )
            self._engine = IPCTrainerWeightTransferEngine.trainer_init(
                info, client=self.client, source=weights
            )
            self._told |= self.client.members.keys()
        self._engine.source = weights
        self._engine.send_weights()
