"""Roads for the learner's weights to the actors, one file each in this folder, chosen by `weights.transport`.

    ZeroPolicy --ZeroSource--> Transport.publish -.-> snapshot.py  buckets in Ray's object store, pulled
                                                  |-> nccl.py      vLLM's packed broadcast to GPU actors
                                                  `-> ipc.py       vLLM's packed handles, on one GPU

snapshot.py is the default, and what nccl.py and ipc.py fall back to. These two share push.py and client.py,
and actors/receiver.py is their other end.

A transport's file has `build(sender) -> Transport`. It is imported only when chosen: nccl.py and ipc.py
import vLLM's `vllm.distributed.weight_transfer`, and with it most of vLLM, which takes ten seconds.
"""

from __future__ import annotations

import importlib

from core.weights.transports.base import NoTransport, Sender, Transport

__all__ = ["NoTransport", "Sender", "Transport", "load_transport"]


def load_transport(sender: Sender) -> Transport:
    """The transport that `weights.transport` names, on this learner rank."""
    module = importlib.import_module(f"{__name__}.{sender.config.weights.carrier}")
    transport: Transport = module.build(sender)
    return transport
