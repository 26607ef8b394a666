"""What processes on another node of a cluster have from the driver, what is known of that node, and how often
a snapshot travels there; run on the head, it prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import msgspec
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.preparation.nodes import ask_ray, with_shm
from cluster.session import ray_session
from core.calls import Calls
from core.processes import threads
from core.weights.board import BOARD, Board, BoardClient
from core.weights.fetching import snapshot_of
from core.weights.snapshots import SnapshotWriter
from tests.support.configs import make_config

NUM_READERS = 3
NUM_TENSORS, TENSOR_FLOATS, BUCKET_BYTES = 12, 2**20, 8 * 2**20


class Reader:
    """A process on another node: what it finds, and what its node has received."""

    def environment(self, names: list[str]) -> dict[str, Any]:
        """Returns variables by name, and at how many objects the garbage collector looks."""
        return {**{name: os.environ.get(name) for name in names}, "threshold": gc.get_threshold()[0]}

    def received_bytes(self) -> int:
        """Returns what this node's network has received."""
        with open("/proc/net/dev", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.strip().startswith("eth0:"))

    def fetch(self, board: BoardClient, version: int) -> int:
        """Fetches a snapshot as an actor does; returns its bytes."""
        return sum(tensor.nbytes for _, tensor in Calls(60.0).ask(snapshot_of(board, version)))


def publish(board: BoardClient, calls: Calls, version: int) -> int:
    """Publishes a snapshot from here, as rank 0 does; returns its bytes."""
    writer = SnapshotWriter(BUCKET_BYTES, ray.put)
    for number in range(NUM_TENSORS):
        writer.add(f"tensor.{number}", torch.full((TENSOR_FLOATS,), float(version)))
    manifest, references = writer.finish(version)
    calls.ask(board.publish(msgspec.msgpack.encode(manifest), references, version, evaluate=()))
    return manifest.num_bytes


def main(names: list[str]) -> None:
    """Has readers on the node that is not this one."""
    config, calls = make_config(), Calls(60.0)
    with ray_session(config.actors, config.learner):
        here = ray.get_runtime_context().get_node_id()
        there = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here)
        strategy = NodeAffinitySchedulingStrategy(there, soft=False)
        board_class = ray.remote(Board).options(num_cpus=0, max_concurrency=100)
        board = BoardClient(board_class.remote(config.run, {}, print), BOARD)
        reader_class = ray.remote(Reader).options(
            num_cpus=0, scheduling_strategy=strategy, runtime_env=threads(1)
        )
        readers = [reader_class.remote() for _ in range(NUM_READERS)]
        first = readers[0]
        found = {"environment": ray.get([reader.environment.remote(names) for reader in readers])[0]}
        size = publish(board, calls, 0)
        before = ray.get(first.received_bytes.remote())
        fetched = ray.get([reader.fetch.remote(board, 0) for reader in readers])
        fetched.append(ray.get(first.fetch.remote(board, 0)))
        received = ray.get(first.received_bytes.remote()) - before
        found |= {"size": size, "fetched": fetched, "received": received, "nodes": with_shm(ask_ray())}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
