"""How long the parts of a step take, by arithmetic. Pure.

Learner, of P parameters, N ranks, T trained tokens of sequences of length s, L layers, hidden size h:

    a pass        2 P + 2 L h s  FLOP a token: matrix products, and attention to half of the sequence
    compute       passes T / (N peak share), T / N as the rank with most groups has them, since groups stay
                  whole; passes: 1 forward, 2 backward (1 where adapters are trained), 1 recomputed, 1 for
                  each frozen policy that is asked, 1 where a group is larger than a micro-batch
    ZeRO-3        a micro-batch gathers b P twice, once more for each frozen policy, and scatters it once;
                  over NVLink within a node, and b P (nodes - 1)/nodes of each through a node's network
    optimizer     `ADAM_BYTES` a trained parameter by the memory's bandwidth, or the CPU's time offloaded
    publication   the gather, and one copy of b P to the host by rank 0; what hashing and storing take beyond
                  the steps between two publications
    checkpoint    12 bytes a trained parameter to the host, each rank its share; what hashing and writing take
                  beyond the steps between two checkpoints

Engine, of k GPUs and m running sequences of c tokens each so far, v bytes of keys and values a token:

    a step        Python + max((b P + m c v) / (k bandwidth share), m 2 P / (k peak share)) / kept^(log2 k)
    an answer     also its share of the prefill of its prompt, which its group shares
    an update     b P / k from shared memory to the card, while nothing is generated

With `weights.full_every` what travels are the bytes that changed, which are looked for and put together
again; with nccl and ipc learner and engines stand still while b P goes over the slowest link, or is copied
within the card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.plan import rates
from cluster.plan.rates import Case
from cluster.plan.workload import Workload

FILLED = 0.9
"""Of a micro-batch's tokens."""
FEW_SLOTS = 1.0


@dataclass(frozen=True)
class LearnerTimes:
    """Seconds of one optimizer step by part; publication and checkpoint are spread over the steps between."""

    compute_s: float
    exchange_s: float
    optimizer_s: float
    publish_s: float
    checkpoint_s: float

    @property
    def total_s(self) -> float:
        """Returns the seconds of a step."""
        return self.compute_s + self.exchange_s + self.optimizer_s + self.publish_s + self.checkpoint_s


@dataclass(frozen=True)
class PublishTimes:
    """Seconds of one version on its way: the learner's standstill, then beside it the hashing, the way to the
    last node, the check by an actor, and the actor's standstill.
    """

    stall_s: float
    background_s: float
    pull_s: float
    verify_s: float
    pause_s: float

    @property
    def until_used_s(self) -> float:
        """Returns the seconds from the end of the standstill until the last actor can load the version."""
        return self.background_s + self.pull_s + self.verify_s


def flops_per_token(job: Workload) -> float:
    """Returns the FLOP of one pass of one token."""
    length = job.prompt_tokens + job.new_tokens
    return 2 * job.shape.num_params + 2 * job.shape.layers * job.shape.hidden * length


def num_passes(job: Workload) -> int:
    """Returns how many passes of 2 FLOP a parameter a trained token takes."""
    backward = 1 if job.lora_rank else 2
    return 1 + backward + job.is_recomputed + job.num_scored + job.is_split


def compute_s(job: Workload, case: Case) -> float:
    """Returns the seconds of forward and backward passes of one step."""
    device = job.machines.device
    if device is None or not job.learner_gpus:
        # A core's rate was measured of all tokens, with those that are shared counted for each sample.
        work = job.samples * (job.prompt_tokens + job.new_tokens) * job.busiest_share * num_passes(job)
        speed = rates.cpu_train_tokens_per_s(job.shape.num_params) * 3 * rates.CPU_SPREAD[case]
        return work / (job.sequence_parallel * speed)
    peak = device.peak_flops * min(1.0, job.learner_gpus) * rates.TRAIN_SHARE.at(case)
    work = job.busiest_tokens * num_passes(job)
    return work * flops_per_token(job) / (job.sequence_parallel * peak)


def gather_s(job: Workload, case: Case) -> float:
    """Returns the seconds in which all ranks get the whole model once."""
    device, ranks = job.machines.device, job.ranks
    if ranks == 1 or device is None or not job.learner_gpus:
        return 0.0
    nodes = job.machines.nodes_of(ranks * job.learner_gpus)
    link = device.link_bytes_per_s * rates.LINK_SHARE.at(case)
    network = job.machines.network_bytes_per_s * rates.NETWORK_SHARE.at(case)
    within_s = job.weight_bytes * (ranks - 1) / ranks / link
    between_s = job.weight_bytes * (nodes - 1) / nodes / network
    return max(within_s, between_s)


def exchange_s(job: Workload, case: Case) -> float:
    """Returns the seconds of ZeRO-3's traffic in one step that its computation does not hide."""
    micro_batches = max(1, math.ceil(job.busiest_tokens / (job.micro_batch_tokens * FILLED)))
    moves = 2 + (0.0 if job.lora_rank else 1.0) + job.num_scored + job.is_split
    traffic_s = micro_batches * moves * gather_s(job, case)
    return max(rates.EXPOSED.at(case) * traffic_s, traffic_s - compute_s(job, case))


def learner_times(job: Workload, case: Case) -> LearnerTimes:
    """Returns the seconds of one step of the learner by part."""
    device = job.machines.device
    share = job.trained_params / job.ranks
    work_s, traffic_s = compute_s(job, case), exchange_s(job, case)
    optimizer_s = share * rates.OFFLOADED_ADAM_S.at(case)
    checkpoint_s = 0.0
    if device is not None and job.learner_gpus:
        copies = device.host_bytes_per_s * rates.HOST_COPY_SHARE.at(case)
        if not job.is_offloaded:
            speed = device.memory_bytes_per_s * rates.DECODE_BANDWIDTH.at(case)
            optimizer_s = share * rates.ADAM_BYTES / speed
        checkpoint_s = 12 * share / copies
    publish = publish_times(job, case)
    # A version that is not stored when the next is due is waited for.
    between_s = (work_s + traffic_s + optimizer_s) * job.publish_every
    stall_s = publish.stall_s + max(0.0, publish.background_s - between_s)
    # So is a checkpoint that is not written when the next is due.
    written_s = 12 * share / rates.CHECKPOINT_BYTES_PER_S.at(case)
    checkpoint_s += max(0.0, written_s - (work_s + traffic_s + optimizer_s) * job.checkpoint_every)
    return LearnerTimes(
        work_s,
        traffic_s,
        optimizer_s,
        stall_s / job.publish_every,
        checkpoint_s / job.checkpoint_every if job.checkpoint_every else 0.0,
    )


def publish_times(job: Workload, case: Case) -> PublishTimes:
    """Returns the seconds of one version from the learner to the actors."""
    if job.pushes:
        return _push_times(job, case)
    size, device, travels = job.published_bytes, job.machines.device, job.travelling_bytes
    hash_s = size / rates.HASH_BYTES_PER_S.at(case)
    compare_s = size / rates.COMPARED_BYTES_PER_S.at(case) if job.full_every > 1 else 0.0
    patch_s = size / rates.PATCHED_BYTES_PER_S.at(case) if job.full_every > 1 else 0.0
    stall_s = size / rates.STORE_BYTES_PER_S.at(case)
    pause_s = size / rates.PAGEABLE_BYTES_PER_S.at(case)
    if device is not None and job.learner_gpus:
        share = job.published_bytes / job.weight_bytes
        copies = device.host_bytes_per_s * rates.HOST_COPY_SHARE.at(case)
        stall_s = gather_s(job, case) * share + size / copies
    if device is not None and job.actor_gpus > 1:
        pause_s /= job.actor_gpus
    away = job.pulling_nodes
    pull_s = 0.0
    if away:
        network = job.machines.network_bytes_per_s
        one_s = travels / min(network, rates.PULL_BYTES_PER_S.at(case))
        pull_s = max(one_s, away * travels / min(network, rates.SERVED_BYTES_PER_S.at(case)))
    background_s = hash_s + compare_s + travels / rates.STORE_BYTES_PER_S.at(case)
    return PublishTimes(stall_s, background_s, pull_s, hash_s + patch_s, pause_s)


def _push_times(job: Workload, case: Case) -> PublishTimes:
    """Returns the seconds of one version that is pushed: learner and actors stand still for it."""
    size, device = job.published_bytes, job.machines.device
    assert device is not None  # Only GPUs push.
    if job.pushes == "ipc":  # Within one card: read and written once.
        pushed_s = 2 * size / (device.memory_bytes_per_s * rates.DECODE_BANDWIDTH.at(case))
    else:
        network = job.machines.network_bytes_per_s if len(job.nodes) > 1 else math.inf
        pushed_s = size / (min(device.link_bytes_per_s, network) * rates.PUSH_SHARE.at(case))
    return PublishTimes(gather_s(job, case) + pushed_s, 0.0, 0.0, 0.0, pushed_s)


# --- engines ---


def running_slots(job: Workload) -> float:
    """Returns how many sequences of average length an engine's memory holds at once, at most its slots."""
    device = job.machines.device
    if device is None or not job.actor_gpus or not job.cache_bytes_per_token:
        return float(job.slots)
    context = job.prompt_tokens + job.new_tokens / 2
    left = cache_bytes(job)
    return max(0.0, min(float(job.slots), left / (context * job.cache_bytes_per_token)))


def cache_bytes(job: Workload) -> float:
    """Returns what an engine's GPUs have for keys and values, in bytes; below 0: the weights do not fit."""
    device = job.machines.device
    if device is None:
        return math.inf
    gpus = max(1.0, job.actor_gpus)
    return gpus * (device.memory_bytes * job.gpu_memory_share - rates.ENGINE_RESERVE_BYTES) - job.weight_bytes


def engine_step_s(job: Workload, running: float, case: Case) -> float:
    """Returns the seconds of an engine's step with so many running sequences: each gets a token.

    The prefill of prompts and what a sample costs beside its tokens are spread over its tokens.
    """
    device, params = job.machines.device, job.shape.num_params
    extra_s = running / job.new_tokens
    if device is None or not job.actor_gpus:
        speed = rates.cpu_decode_tokens_per_s(params) * rates.CPU_SPREAD[case]
        return max(running, FEW_SLOTS) / speed + extra_s * rates.CPU_SAMPLE_S.at(case)
    gpus = job.actor_gpus
    kept = rates.TENSOR_PARALLEL.at(case) ** math.log2(max(1.0, gpus))
    peak = device.peak_flops * gpus * kept
    context = job.prompt_tokens + job.new_tokens / 2
    read = job.weight_bytes + running * context * job.cache_bytes_per_token
    memory_s = read / (device.memory_bytes_per_s * gpus * kept * rates.DECODE_BANDWIDTH.at(case))
    matrix_s = running * 2 * params / (peak * rates.DECODE_COMPUTE.at(case))
    prefill_s = job.prompt_tokens / job.generated_size * 2 * params / (peak * rates.PREFILL_SHARE.at(case))
    sample_s = prefill_s + rates.GPU_SAMPLE_S.at(case)
    return rates.ENGINE_STEP_S.at(case) + max(memory_s, matrix_s) + extra_s * sample_s


def actor_tokens_per_s(job: Workload, case: Case) -> float:
    """Returns the tokens that one actor generates a second, all its slots running; 0 where it holds none."""
    running = running_slots(job)
    return running / engine_step_s(job, running, case) if running >= 1 else 0.0


def generation_s(job: Workload, case: Case) -> float:
    """Returns the seconds in which all actors generate a step's samples, with its share of evaluations and of
    standstills for updates.
    """
    speed = job.actors * actor_tokens_per_s(job, case)
    if not speed:
        return math.inf
    tokens = job.generated_tokens + job.evaluated_tokens
    return tokens / speed + publish_times(job, case).pause_s / job.publish_every


def bound_s(job: Workload, case: Case) -> float:
    """Returns the slower of generation and training, in seconds of a step: what asynchrony leaves."""
    return max(learner_times(job, case).total_s, generation_s(job, case))
