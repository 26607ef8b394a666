"""Says whether each node has the memory for what Ray puts there: of the host, of its part of the object
store, of /dev/shm. Enough in sum is not enough.

    ask_ray, with_shm --resources of each node--> placement.spread --ranks and actors of each--> memory_warnings

Pure, but for the first two and `this_machine`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from cluster.preparation.cards import own_card_memory
from cluster.preparation.memory import BYTES, GIB, MemoryEstimate, has_changes, on_host
from cluster.preparation.surroundings import cluster_address
from core.config import Config
from core.machine import shm_bytes
from core.weights.board import KEEP

Resources: TypeAlias = Mapping[str, float]
"""Of a node, as Ray names them: `CPU`, `GPU`, `memory` (bytes of the host that Ray found free, its object
store left out), `object_store_memory`, and `node:` with its address; and `shm`, the bytes that /dev/shm there
can hold.
"""
MEMORY, STORE, SHM, NODE = "memory", "object_store_memory", "shm", "node:"
ANSWER_S = 60.0
LEAST_SHM_BYTES = GIB
"""Docker gives 64 MiB unless told; NCCL and vLLM's workers meet in what is left of it."""


# --- What there is ---


def ask_ray() -> list[dict[str, float]]:
    """Returns the resources of every live node of the cluster that this process is connected to, by address:
    Ray gives them in any order.
    """
    import ray

    return sorted((dict(node["Resources"]) for node in ray.nodes() if node["Alive"]), key=address_of)


def with_shm(nodes: Sequence[Resources]) -> list[Resources]:
    """Returns the nodes with what only can be seen there: on each node a process of Ray's looks for it.

    A node that does not answer within `ANSWER_S` stays without.
    """
    if cluster_address() is None:
        return [{**node, SHM: shm_bytes()} for node in nodes]
    import ray
    from ray.exceptions import RayError

    look = ray.remote(num_cpus=0, max_retries=0)(shm_bytes)
    looks = [look.options(resources={NODE + address_of(node): 0.001}).remote() for node in nodes]
    answered, late = ray.wait(looks, num_returns=len(looks), timeout=ANSWER_S)
    found: list[Resources] = []
    for node, answer in zip(nodes, looks, strict=True):
        if answer in late:
            ray.cancel(answer)
        try:
            found.append({**node, SHM: ray.get(answer)} if answer in answered else node)
        except RayError:  # The node was lost meanwhile, or starts no process: its actors will say why.
            found.append(node)
    return found


def this_machine(num_cpus: float) -> dict[str, float]:
    """Returns what a local Ray of our own would have here: at least `num_cpus`, since they are logical, the
    GPUs that torch sees, and the memory as it would divide it.
    """
    import psutil
    import torch
    from ray._private.utils import estimate_available_memory, resolve_object_store_memory

    store = float(resolve_object_store_memory(estimate_available_memory()))
    gpus = float(torch.cuda.device_count())
    return {
        "CPU": max(float(os.cpu_count() or 1), num_cpus),
        "GPU": gpus,
        MEMORY: psutil.virtual_memory().total - store,
        STORE: store,
        SHM: shm_bytes(),
        **(own_card_memory() if gpus else {}),
    }


def address_of(node: Resources) -> str:
    """Returns the node's address, with which Ray marks it; "" where it is no node of Ray's."""
    marks = (key.removeprefix(NODE) for key in node if key.startswith(NODE) and "__" not in key)
    return next(marks, "")


def name_of(node: Resources, number: int) -> str:
    """Returns how a node is called: by its number, and its address where Ray tells it."""
    address = address_of(node)
    return f"node {number}{f' ({address})' * bool(address)}"


# --- Whether it is enough ---


def published_bytes(config: Config, estimate: MemoryEstimate) -> float:
    """Returns the bytes of one version of the weights in the object store; 0 where the model is not known."""
    if config.weights.transport == "adapters":
        adapters = sum(part.num_bytes for part in estimate.learner if part.name == "adapters")
        return adapters * config.learner.ranks
    return BYTES[config.model.dtype] * (estimate.num_params or 0)


def memory_warnings(
    config: Config, estimate: MemoryEstimate, nodes: Sequence[Resources], counts: Sequence[tuple[int, int]]
) -> list[str]:
    """Returns a sentence for each node whose memory will not do for its `counts` of ranks and actors."""
    found = []
    for number, (node, (ranks, actors)) in enumerate(zip(nodes, counts, strict=True), start=1):
        if ranks or actors:
            is_first = bool(ranks) and not any(before for before, _ in counts[: number - 1])
            name = name_of(node, number)
            found += _host_warnings(config, estimate, node, name, (ranks, actors, is_first))
            found += _store_warnings(config, estimate, node, name)
            found += _shm_warnings(config, node, name, ranks)
    return found


def _host_warnings(
    config: Config, estimate: MemoryEstimate, node: Resources, name: str, there: tuple[int, int, bool]
) -> list[str]:
    ranks, actors, is_first = there
    asked = ranks * on_host(estimate.learner, config.learner.num_gpus)
    asked += actors * on_host(estimate.actor, config.actors.num_gpus)
    if is_first:  # Rank 0 holds a snapshot, or two, to copy weights into.
        asked += published_bytes(config, estimate) * (2 if has_changes(config) else 1)
    has = node.get(MEMORY, 0.0)
    if not has or asked <= has:
        return []
    return [
        f"{name}: {_counted(ranks, 'learner rank')} and {_counted(actors, 'actor')} there want about "
        f"{asked / GIB:.1f} GiB of host memory, there are {has / GIB:.1f} GiB beside the object store. Spread them "
        "over more nodes, lower actors.count, or take nodes with more memory."
    ]


def _store_warnings(config: Config, estimate: MemoryEstimate, node: Resources, name: str) -> list[str]:
    size, has = published_bytes(config, estimate), node.get(STORE, 0.0)
    asked = KEEP * size
    if not has or asked <= has:
        return []
    start = (
        "`ray start` there"
        if cluster_address() is not None
        else "`ray start --head` here, and join it (RAY_ADDRESS=auto),"
    )
    return [
        f"{name}: {KEEP} versions of the weights, {size / 1e9:.2f} GB each, want {asked / 1e9:.2f} GB of Ray's object "
        f"store, which has {has / 1e9:.2f} GB there: Ray will write them to disk and read them back, at every "
        f"publication. Give {start} --object-store-memory={math.ceil(asked * 1.2e-7) * 10**7}, and /dev/shm as much."
    ]


def _shm_warnings(config: Config, node: Resources, name: str, ranks: int) -> list[str]:
    shm, store = node.get(SHM), node.get(STORE, 0.0)
    if shm is None:
        return []
    remedy = "In Docker: --shm-size; on Kubernetes: an emptyDir of medium Memory at /dev/shm."
    if shm < store:
        return [
            f"{name}: Ray's object store of {store / 1e9:.2f} GB lies on disk, for /dev/shm has {shm / 1e9:.2f} GB "
            f"there. {remedy}"
        ]
    has_meetings = (ranks > 1 and config.learner.num_gpus > 0) or config.actors.tensor_parallel > 1
    if has_meetings and shm < LEAST_SHM_BYTES:
        return [
            f"{name}: /dev/shm has {shm / 2**20:.0f} MiB there, in which NCCL and vLLM's workers meet: it wants "
            f"{LEAST_SHM_BYTES / GIB:.0f} GiB. {remedy}"
        ]
    return []


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
