"""Says whether a run fits its machines: memory of GPUs and hosts, object store, a node's network. Pure.

The learner's memory is that of cluster/preparation/memory.py, part by part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.plan import parts
from cluster.plan.workload import Workload
from cluster.preparation.memory import MemoryEstimate, on_host
from core.config.actors import GPU_MEMORY_SHARE
from core.weights.board import KEEP

FRAGMENTED = 1.1
"""What an allocator takes beyond what is used, and CUDA's own context: an estimate."""
STORE_SHARE = 0.3
"""Of a node's memory: what Ray gives its object store by itself."""


@dataclass(frozen=True)
class Fit:
    """Bytes that are wanted; `problems` are why a run would not start, `hints` what would cost it time, in
    sentences with what to change.

    learner_gpu, actor_gpu  of one card; the second is weights and the cache of all slots at average length
    rank_host, actor_host   of one process; rank 0 has snapshots besides
    store                   of Ray's object store, on the learner's first node
    network_per_step        out of that node in a step, for versions that other nodes pull
    """

    learner_gpu: float
    actor_gpu: float
    rank_host: float
    actor_host: float
    store: float
    network_per_step: float
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


def fit_of(job: Workload, estimate: MemoryEstimate) -> Fit:
    """Returns what the job wants of its machines, and what does not fit."""
    on_gpu = bool(job.learner_gpus)
    learner_gpu = FRAGMENTED * sum(part.num_bytes for part in estimate.learner if on_gpu and not part.on_host)
    context = job.prompt_tokens + job.new_tokens / 2
    cache = job.slots * context * job.cache_bytes_per_token
    on_card = (job.weight_bytes + cache) / max(1.0, job.actor_gpus)
    found = Fit(
        learner_gpu=learner_gpu,
        actor_gpu=on_card if job.actor_gpus else 0.0,
        rank_host=on_host(estimate.learner, job.learner_gpus),
        actor_host=on_host(estimate.actor, job.actor_gpus),
        store=KEEP * job.published_bytes,
        network_per_step=_out_of_the_first_node(job),
    )
    return dataclasses.replace(found, problems=tuple(_problems(job, found)), hints=tuple(_hints(job, found)))


def _out_of_the_first_node(job: Workload) -> float:
    """Returns the bytes a step that leave the learner's first node: a pull for each other node with actors,
    or one broadcast, which these hand on.
    """
    times = min(1, len(job.nodes) - 1) if job.pushes else job.pulling_nodes
    return times * job.travelling_bytes / job.publish_every


def _problems(job: Workload, fit: Fit) -> Iterator[str]:
    machines = job.machines
    if machines.device is not None:
        card, share = machines.device.memory_bytes, min(1.0, job.learner_gpus or 1.0)
        part = f", {share:g} of which is its own" if share < 1 else ""
        if fit.learner_gpu > card * share:
            yield f"a learner rank wants {fit.learner_gpu / 1e9:.0f} GB of a card of {card / 1e9:.0f} GB{part}."
    host = fullest_host_bytes(job, fit)
    if host > machines.host_memory_bytes:
        yield (
            f"a node wants {host / 1e9:.0f} GB of host memory and has {machines.host_memory_bytes / 1e9:.0f} GB. Spread ranks "
            "and actors over more nodes, or take nodes with more memory."
        )


def _hints(job: Workload, fit: Fit) -> Iterator[str]:
    yield from engine_problems(job)
    if fit.store > STORE_SHARE * job.machines.host_memory_bytes:
        yield (
            f"{KEEP} versions want {fit.store / 1e9:.0f} GB of Ray's object store, which by itself is "
            f"{STORE_SHARE:.0%} of the node's memory. Start Ray with --object-store-memory={math.ceil(fit.store * 1.2e-9) * 10**9}."
        )


def fullest_host_bytes(job: Workload, fit: Fit) -> float:
    """Returns the host memory that the fullest node wants, versions in the object store included.

    Rank 0 has snapshots besides.
    """
    hosts = [ranks * fit.rank_host + actors * fit.actor_host for ranks, actors in job.nodes]
    return max(hosts[0] + job.snapshot_bytes, *hosts) + fit.store


def _more_cards(job: Workload) -> str:
    """Returns what to type for an engine whose cards do not hold the weights and a sequence."""
    whole = max(job.gpu_memory_share, GPU_MEMORY_SHARE)
    for cards in (1, 2, 4, 8, 16):
        if cards >= job.actor_gpus and cards <= job.machines.gpus_per_node:
            changed = dataclasses.replace(job, actor_gpus=float(cards), gpu_memory_share=whole)
            if parts.running_slots(changed) >= 1:
                share = "" if whole == job.gpu_memory_share else f" actors.engine_memory={whole:g}"
                return f"Set actors.num_gpus={cards} actors.tensor_parallel={cards}{share}."
    return "Take cards with more memory, or a smaller model."


def engine_problems(job: Workload) -> list[str]:
    """Returns why an engine's cards do not hold its slots: no room at all, or for few of them."""
    device, slots = job.machines.device, parts.running_slots(job)
    if device is None or slots >= 0.75 * job.slots:
        return []
    if slots < 1:
        return [
            f"an engine's weights of {job.weight_bytes / 1e9:.0f} GB leave no room on {max(1.0, job.actor_gpus):g} x "
            f"{device.memory_bytes / 1e9:.0f} GB at actors.engine_memory = {job.gpu_memory_share:g}. {_more_cards(job)}"
        ]
    return [
        f"an engine holds about {slots:.0f} of actors.slots = {job.slots} at these lengths: the rest waits. Raise "
        "actors.engine_memory, or lower actors.slots or the limit on lengths."
    ]
