"""vLLM's packed NCCL broadcast from learner rank 0 to a group of GPU actors, in chunks of one bucket.

The group is formed anew, on a new port, when the actors that take part are others than last time: one joined,
died, was late or is evaluating. Where a member fails in the middle of a broadcast, both sides abort their
communicators (vLLM's `destroy`), and the actors that had begun to receive fall back to a snapshot.

NEVER RUN ON A GPU: tests/core/weights/test_transports.py runs all of it, and vLLM's engines at both ends,
with a communicator for the CPU.
"""

from __future__ import annotations

import concurrent.futures
import socket
import threading
import warnings
from concurrent.futures import Future
from typing import Any

import ray
from vllm.distributed.weight_transfer.base import WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from core.weights.transports.base import Sender, Transport
from core.weights.transports.client import GroupBroken
from core.weights.transports.passes import VLLM_SYMBOLS as PASS_SYMBOLS
from core.weights.transports.passes import Pass
from core.weights.transports.push import PushTransport

VLLM_SYMBOLS = (
    *PASS_SYMBOLS,
    "vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerInitInfo",
    "vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerWeightTransferEngine.send_weights",
    "vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerWeightTransferEngine.shutdown",
    "vllm.distributed.device_communicators.pynccl:PyNcclCommunicator.destroy",
)


def build(sender: Sender) -> Transport:
    """Returns the transport by NCCL, with snapshots for who is not in the group."""
    return NcclTransport(sender)


class NcclPass(Pass, WeightSource):
    """A pass as vLLM's trainer API defines a source."""


class NcclTransport(PushTransport):
    """Broadcasts each pass to a group of actors; see the module's docstring."""

    make_pass = NcclPass

    coupled = True

    def __init__(self, sender: Sender) -> None:
        super().__init__(sender)
        warnings.filterwarnings("ignore", r"Tensor '.*' has size \d+ bytes, which exceeds buffer_size_bytes")
        self._engine: Any = None
        self._formed: tuple[str, ...] = ()
        self.client.on_broken = self._leave

    def send(self, weights: Pass) -> None:
        """Broadcasts the pass, in a group that is formed anew where the members are others than last time."""
        names = tuple(self.client.members)
        if self._engine is None or names != self._formed:
            self._form(names, weights)
        self._engine.source = weights
        self._engine.send_weights()

    def _form(self, names: tuple[str, ...], weights: Pass) -> None:
        """Forms a group of these actors and us. Raises GroupBroken, which names who kept it from being
        formed.
        """
        self._leave()
        self.client.greet()  # In the rendezvous nobody could tell any more who does not come.
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=_free_port(),
            world_size=1 + len(names) * max(1, int(self._sender.config.actors.num_gpus)),
            # A larger parameter goes in a chunk of its own, of which vLLM only warns; with chunks of the
            # largest one's size, an embedding's, either side would hold several of them.
            packed_buffer_size_bytes=self._sender.source.bucket_bytes,
        )
        forming: Future[Any] = Future()

        def form() -> None:
            try:
                forming.set_result(
                    NCCLTrainerWeightTransferEngine.trainer_init(info, client=self.client, source=weights)
                )
            except BaseException as error:  # noqa: BLE001 -- the boundary of a thread: its caller gets it
                forming.set_exception(error)

        # Where a member dies in the rendezvous, NCCL waits for it without end: in a thread, that can be left
        # behind.
        threading.Thread(target=form, name="nccl rendezvous", daemon=True).start()
        timeout_s = self._sender.config.run.timeout_s
        done, _ = concurrent.futures.wait(
            [forming, self.client.failure], timeout_s, return_when=concurrent.futures.FIRST_COMPLETED
        )
        if not done:
            raise GroupBroken(
                f"an NCCL group of {', '.join(names)} was not formed within {timeout_s:.0f} s (run.timeout_s)"
            )
        self._engine, self._formed = done.pop().result(), names

    def _leave(self) -> None:
        """Aborts what is under way in the group; the next publication forms another."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
