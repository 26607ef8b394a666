"""What a plan is made for: the numbers of a config that cost time, and the machines."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from cluster.plan.rates import DELTA_SHARE, DEVICES, Device
from cluster.plan.shapes import find_shape
from cluster.preparation.memory import BYTES, ModelShape
from cluster.preparation.placement import fitting
from core.config import Config
from core.errors import ConfigError
from core.machine import available_cpus
from learner.objectives import load_objective
from learner.step.frozen import frozen_names

ASSUMED_PROMPT_SHARE, ASSUMED_ANSWER_SHARE = 0.3, 0.6
"""Of the limits in the config, where nobody says how long prompts and answers are."""


@dataclass(frozen=True)
class Machines:
    """The nodes that a run is to go to. `device` None: without GPUs, on one node of `cores`. The network is a
    node's, in bytes a second.
    """

    device: Device | None = None
    gpus_per_node: int = 8
    network_bytes_per_s: float = 50e9
    host_memory_bytes: float = 1e12
    cores: float = math.inf

    def nodes_of(self, num_gpus: float) -> int:
        """Returns on how many nodes so many GPUs lie."""
        return max(1, math.ceil(num_gpus / self.gpus_per_node - 1e-9))

    def per_node(self, gpus: float) -> int:
        """Returns how many processes with so many GPUs, above 0, lie on one node."""
        return max(1, fitting(self.gpus_per_node, gpus))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a run, and what it is dealt to. Tokens are those of one sample, on average.

    learner_gpus, actor_gpus   of one rank, and of one engine; 0: a CPU
    generated_size     samples of a group that are generated; the others are offline
    num_scored                 frozen policies that give log-probs, as the reference does
    pushes                     "nccl" or "ipc" where weights are not pulled
    evaluated_tokens           tokens that evaluations generate, spread over the steps
    sequence_parallel          ranks that share each row of the learner
    """

    shape: ModelShape
    bytes_per_param: int
    machines: Machines
    ranks: int
    learner_gpus: float
    actors: int
    actor_gpus: float
    slots: int
    gpu_memory_share: float
    groups: int
    group_size: int
    generated_size: int
    prompt_tokens: float
    new_tokens: float
    max_new_tokens: int
    micro_batch_tokens: int
    steps: int
    num_scored: int = 0
    is_recomputed: bool = False
    is_offloaded: bool = False
    shares_prompts: bool = True
    uses: int = 1
    publish_every: int = 1
    checkpoint_every: int = 0
    lora_rank: int = 0
    sends_adapters: bool = False
    pushes: str = ""
    full_every: int = 1
    evaluated_tokens: float = 0.0
    sequence_parallel: int = 1

    @property
    def trained_params(self) -> float:
        """Returns the parameters that the optimizer keeps moments of."""
        return self.lora_rank * self.shape.adapted if self.lora_rank else self.shape.num_params

    @property
    def published_bytes(self) -> float:
        """Returns the bytes of one version on its way to an actor."""
        return self.bytes_per_param * (self.trained_params if self.sends_adapters else self.shape.num_params)

    @property
    def travelling_bytes(self) -> float:
        """Returns the bytes of one version that are stored and pulled, on average over `full_every` of them.

        After k steps since the last whole one a share of 1 - (1 - DELTA_SHARE)^k has changed; in float32 all
        has.
        """
        if self.full_every == 1 or self.bytes_per_param == 4:
            return self.published_bytes
        kept = 1 - DELTA_SHARE.likely
        shares = [1 - kept ** (number * self.publish_every) for number in range(1, self.full_every)]
        return self.published_bytes * (1 + sum(shares)) / self.full_every

    @property
    def snapshot_bytes(self) -> float:
        """Returns what rank 0 has in host memory of versions on their way: with deltas the last whole one
        too.
        """
        return (1 if self.full_every == 1 else 2) * self.published_bytes

    @property
    def num_gpus(self) -> float:
        """Returns the GPUs that learner and actors take: whole ones, since nobody else has what is left of
        one.
        """
        whole = self.ranks * self.learner_gpus if self.learner_gpus == 1 else 0.0
        part = self.learner_gpus if self.learner_gpus < 1 else 0.0
        if not 0 < self.actor_gpus < 1:
            return whole + math.ceil(part) + self.actors * self.actor_gpus
        beside = fitting(1 - part, self.actor_gpus) if part else 0
        return whole + math.ceil(part) + math.ceil(max(0, self.actors - beside) / fitting(1, self.actor_gpus))

    @property
    def samples(self) -> int:
        """Returns the samples of a step."""
        return self.groups * self.group_size

    @property
    def generated_tokens(self) -> float:
        """Returns the tokens that must be generated for a step."""
        return self.groups * self.generated_size * self.new_tokens / self.uses

    @property
    def weight_bytes(self) -> float:
        """Returns the bytes of a snapshot of all weights."""
        return self.bytes_per_param * self.shape.num_params

    @property
    def trained_tokens(self) -> float:
        """Returns the tokens that pass through the learner's model in a step.

        A prompt is in a pass once for all samples of its group that the pass holds.
        """
        if not self.shares_prompts:
            return self.samples * (self.prompt_tokens + self.new_tokens)
        # A pass is filled by samples that each count with their prompt, before these are put together.
        held = max(1, math.floor(self.micro_batch_tokens / (self.prompt_tokens + self.new_tokens) + 1e-9))
        passes = math.ceil(self.group_size / held)
        return self.groups * (passes * self.prompt_tokens + self.group_size * self.new_tokens)

    @property
    def is_split(self) -> bool:
        """Says whether an average group is larger than a micro-batch, so that its samples take a first pass
        without gradient (learner/step/update.py). Passes are planned by tokens with each sample's prompt.
        """
        return self.group_size * (self.prompt_tokens + self.new_tokens) > self.micro_batch_tokens

    @property
    def busiest_share(self) -> float:
        """Returns the share of a step's groups that the ranks with most of them train: groups stay whole."""
        return math.ceil(self.groups * self.sequence_parallel / self.ranks - 1e-9) / self.groups

    @property
    def busiest_tokens(self) -> float:
        """Returns the trained tokens of the ranks that share most groups."""
        return self.trained_tokens * self.busiest_share

    @property
    def nodes(self) -> list[tuple[int, int]]:
        """Returns the ranks and the actors of each node, rank 0's first; one node where there are no GPUs.

        Ranks fill node after node, and actors what they leave; those without a GPU are spread evenly.
        """
        ranks = self.ranks if self.learner_gpus else 0
        actors = self.actors if self.actor_gpus else 0
        found = []
        while ranks or actors:
            here = min(ranks, self.machines.per_node(self.learner_gpus)) if ranks else 0
            left = self.machines.gpus_per_node - here * self.learner_gpus
            room = fitting(left, self.actor_gpus) if actors else 0
            there = min(actors, max(room, 0 if here else 1))
            ranks, actors = ranks - here, actors - there
            found.append((here, there))
        found = found or [(0, 0)]
        ranks = 0 if self.learner_gpus else self.ranks
        actors = 0 if self.actor_gpus else self.actors
        spread = [
            (_share(ranks, place, len(found)), _share(actors, place, len(found)))
            for place in range(len(found))
        ]
        return [
            (here + more, there + many) for (here, there), (more, many) in zip(found, spread, strict=True)
        ]

    @property
    def pulling_nodes(self) -> int:
        """Returns how many nodes pull each version: those with actors, but for rank 0's."""
        return sum(actors > 0 for _, actors in self.nodes[1:])

    @property
    def cache_bytes_per_token(self) -> float:
        """Returns the bytes of keys and values of one token in all layers."""
        return 2 * self.shape.layers * self.shape.kv_width * self.bytes_per_param

    def dealt(self, ranks: int, actors: int) -> Workload:
        """Returns the same work on other numbers of ranks and actors."""
        return dataclasses.replace(self, ranks=ranks, actors=actors)


def machines_of(
    config: Config, gpu: str | None, gpus_per_node: int, network_gbit: float, host_gib: float
) -> Machines:
    """Returns the machines that the options of the command line describe.

    Raises ConfigError for a GPU that is not known, for numbers that cannot be, and where the config asks for
    GPUs and none is named, or the reverse.
    """
    for option, value in (
        ("--gpus-per-node", gpus_per_node),
        ("--network", network_gbit),
        ("--host-memory", host_gib),
    ):
        if not value > 0 or math.isinf(value):
            raise ConfigError(f"{option} {value:g}: expected a number above 0.")
    uses_gpus = config.learner.num_gpus > 0 or config.actors.num_gpus > 0
    if gpu is not None and gpu.lower() not in DEVICES:
        raise ConfigError(f"--gpu {gpu}: not one of {', '.join(DEVICES)}. Take the nearest.")
    if gpu is not None and not uses_gpus:
        raise ConfigError(
            f"--gpu {gpu}, but learner.num_gpus = 0 and actors.num_gpus = 0: this config runs on CPUs. Add "
            "learner.num_gpus=1 actors.num_gpus=1, or leave --gpu out."
        )
    for key, gpus in (
        ("learner.num_gpus", config.learner.num_gpus),
        ("actors.num_gpus", config.actors.num_gpus),
    ):
        if gpus > gpus_per_node:
            raise ConfigError(
                f"{key} = {gpus:g} with --gpus-per-node {gpus_per_node}: an engine lies on one node, and so does a rank. Set "
                f"{key} to at most {gpus_per_node} (actors.tensor_parallel too), or take larger nodes."
            )
    device = DEVICES[(gpu or "h100").lower()] if uses_gpus else None
    cores = available_cpus() if device is None else math.inf
    return Machines(device, gpus_per_node, network_gbit * 1e9 / 8, host_gib * 2**30, cores)


def workload_of(
    config: Config, machines: Machines, prompt_tokens: float | None = None, new_tokens: float | None = None
) -> tuple[Workload, list[str]]:
    """Returns the work of a config, and sentences on what was assumed.

    Raises ConfigError where the model's shape is not to be had, and for lengths that the config forbids.
    """
    shape, source = find_shape(config)
    if config.is_offline:
        raise ConfigError("data.offline with offline_share = 1: nothing is generated, and no rate to plan.")
    prompt, new, longest, assumed = _lengths(config, prompt_tokens, new_tokens)
    notes = [f"{shape.num_params:,} parameters, by {source}", *assumed]
    actors, learner = config.actors, config.learner
    job = Workload(
        shape=shape,
        bytes_per_param=BYTES[config.model.dtype],
        machines=machines,
        ranks=learner.ranks,
        learner_gpus=learner.num_gpus,
        actors=actors.most or actors.fewest,
        actor_gpus=actors.num_gpus,
        slots=actors.slots,
        gpu_memory_share=actors.gpu_memory_share,
        groups=learner.groups_per_step,
        group_size=actors.group_size,
        generated_size=actors.group_size - config.offline_samples,
        prompt_tokens=prompt,
        new_tokens=new,
        max_new_tokens=longest,
        micro_batch_tokens=learner.micro_batch_tokens,
        steps=config.run.steps,
        num_scored=len(frozen_names(load_objective(config.objective))),
        is_recomputed=learner.gradient_checkpointing,
        is_offloaded=learner.offload == "all",
        shares_prompts=learner.layout == "packed" and config.model.attention == "sdpa",
        uses=config.buffer.uses_per_group,
        publish_every=config.weights.publish_every,
        checkpoint_every=config.checkpoint.every,
        lora_rank=learner.lora_rank,
        sends_adapters=config.weights.transport == "adapters",
        pushes="" if config.weights.is_pulled else config.weights.transport,
        full_every=config.weights.full_every,
        evaluated_tokens=sum(suite.rows * suite.samples / suite.every for suite in config.suites) * new,
        sequence_parallel=learner.sequence_parallel,
    )
    return job, notes


def _lengths(
    config: Config, prompt_tokens: float | None, new_tokens: float | None
) -> tuple[float, float, int, list[str]]:
    """Returns the tokens of a prompt and of an answer on average, the most of an answer, and a sentence on
    what was assumed.
    """
    turns = config.actors.max_turns if config.environment_paths else 1
    longest = turns * config.actors.max_new_tokens
    prompt = _length("--prompt-tokens", prompt_tokens, config.data.max_prompt_tokens, ASSUMED_PROMPT_SHARE)
    new = _length("--new-tokens", new_tokens, longest, ASSUMED_ANSWER_SHARE / turns)
    assumed = [
        f"{option} {value:g}"
        for option, value, given in (
            ("--prompt-tokens", prompt, prompt_tokens),
            ("--new-tokens", new, new_tokens),
        )
        if given is None
    ]
    told = (
        f"assumed: {' '.join(assumed)} on average, {ASSUMED_PROMPT_SHARE:g} and {ASSUMED_ANSWER_SHARE:g} of the limits; say "
        "what your data has"
    )
    return prompt, new, longest, [told] * bool(assumed)


def _length(option: str, given: float | None, limit: int, share: float) -> float:
    if given is None:
        return max(1.0, round(share * limit))
    if not 1 <= given <= limit:
        raise ConfigError(
            f"{option} {given:g}: expected a number of at least 1 and at most {limit}, the config's limit."
        )
    return given


def _share(number: int, place: int, places: int) -> int:
    """Returns how many of a number are at one of the places if spread evenly, the first ones first."""
    return number // places + (place < number % places)
