"""Which settings of different sections do not go together, and which do but are probably not meant."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

from core.config.environments import all_paths
from core.config.rewards import ENVIRONMENT
from core.config.section import LEAST_SHARE, shown
from core.staleness import StalenessBound

if TYPE_CHECKING:
    from core.config import Config

SLOW_TOKENS_PER_S = 20.0
"""Of one sample in a busy engine."""
MIN_TEMPERATURE = 0.01
"""vLLM samples at this one whenever a lower one is asked for, with a warning in its log; at 0 it takes
the likeliest token.
"""
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM makes buffers (its MaxLoRARanks)."""


def served_rank(rank: int) -> int:
    """The rank of vLLM's buffers for adapters of this rank: the smallest that is not below it."""
    return min(served for served in SERVED_RANKS if served >= rank)


def check(config: Config) -> None:
    """Raises ValueError that names the settings, their values, and what to do."""
    _rooms_fit_together(config)
    _something_is_rewarded(config)
    _template_is_used(config)
    _temperatures_are_vllms(config)
    _suites_are_whole(config)
    _metrics_are_of_suites(config)
    config.objective.check(config)
    _samples_come_from_somewhere(config)
    _band_can_be_held(config)
    _devices_fit(config)
    _rows_can_be_shared(config)
    _weights_can_travel(config)


def longest_sequence(config: Config) -> str:
    """Returns the settings that `config.max_sequence_tokens` comes from, as an error names them."""
    if config.actors.max_sequence_tokens is not None:
        return "actors.max_sequence_tokens"
    if all_paths(config):
        return "data.max_prompt_tokens + actors.max_turns * actors.max_new_tokens"
    return "data.max_prompt_tokens + actors.max_new_tokens"


def _rooms_fit_together(config: Config) -> None:
    if config.buffer.capacity < config.learner.groups_per_step:
        raise ValueError(
            f"buffer.capacity = {config.buffer.capacity} is below learner.groups_per_step = "
            f"{config.learner.groups_per_step}: "
            "a batch could never be filled. Raise buffer.capacity or lower learner.groups_per_step."
        )
    if config.admitted_groups < config.buffer.num_shards:
        raise ValueError(
            f"buffer.num_shards = {config.buffer.num_shards} is above the {config.admitted_groups} groups "
            "that may be under way, "
            "min(buffer.capacity, (buffer.max_staleness + 1) * learner.groups_per_step): some shards would "
            "never lease. Lower it."
        )
    if config.learner.micro_batch_tokens < config.max_sequence_tokens:
        raise ValueError(
            f"learner.micro_batch_tokens = {config.learner.micro_batch_tokens} is below the longest "
            f"sequence, {longest_sequence(config)} = {config.max_sequence_tokens}. Raise it to at least that."
        )
    if config.max_sequence_tokens <= config.data.max_prompt_tokens:
        raise ValueError(
            f"actors.max_sequence_tokens = {config.max_sequence_tokens} leaves no token for what the policy says after a "
            f"prompt of data.max_prompt_tokens = {config.data.max_prompt_tokens}. Raise it, or lower "
            "data.max_prompt_tokens."
        )
    if config.data.system_prompt is not None and not config.data.chat_template:
        raise ValueError(
            "data.system_prompt is set but data.chat_template = false: nothing would put it before the "
            "prompts. "
            "Set data.chat_template=true or remove data.system_prompt."
        )


def _something_is_rewarded(config: Config) -> None:
    functions = config.rewards.functions
    if not functions:
        raise ValueError(
            "rewards.functions is empty: give at least one function and its weight, for example "
            "{exact_match: 1.0}, or environments that reward."
        )
    if ENVIRONMENT in functions and not config.environments:
        raise ValueError(
            f"rewards.functions.{ENVIRONMENT} = {functions[ENVIRONMENT]:g} is the environment's own reward, and there is "
            "none: set environments, or name another function."
        )
    for suite in config.suites:
        if ENVIRONMENT in suite.functions and not suite.environments:
            key, inherited = suite.key("functions"), ""
            if not suite.has_own_functions:
                inherited = " (inherited from rewards.functions)"
            raise ValueError(
                f"{key}{inherited}: {ENVIRONMENT!r} is the environment's own reward, and the suite has no environment. Set "
                f"{suite.key('environments')}, or name other functions in {key}."
            )


def _template_is_used(config: Config) -> None:
    if config.data.template_options and not config.data.chat_template:
        raise ValueError(
            f"data.template_options = {config.data.template_options} but data.chat_template = false: there is no "
            "template to take them. Set data.chat_template=true or remove data.template_options."
        )


def _temperatures_are_vllms(config: Config) -> None:
    sampling, evaluating = config.actors.temperature, config.eval.temperature
    if sampling < MIN_TEMPERATURE:
        raise ValueError(
            f"actors.temperature = {sampling:g} is below {MIN_TEMPERATURE:g}, at which vLLM would sample "
            "instead: not what the learner "
            f"computes. Set it to {MIN_TEMPERATURE:g} or more."
        )
    told = {f"eval.sampling = [{config.eval.samples}, {evaluating:g}]": evaluating}
    for name, suite in config.eval.suites.items():
        if suite.temperature is not None:
            told[f"eval.suites.{name}.temperature = {suite.temperature:g}"] = suite.temperature
    for setting, temperature in told.items():
        if temperature < MIN_TEMPERATURE and temperature != 0:
            raise ValueError(
                f"{setting}: vLLM samples at {MIN_TEMPERATURE:g} or above, or greedily at a temperature of 0. Set it to 0, "
                f"or to {MIN_TEMPERATURE:g} or more."
            )


def _suites_are_whole(config: Config) -> None:
    for suite in config.suites:
        if suite.rows < 1:
            raise ValueError(
                f"eval.suites.{suite.name}.rows is missing, and data.eval_rows = {suite.rows} is none. Set "
                f"eval.suites.{suite.name}.rows to the number of rows to evaluate, or remove the suite."
            )


def _metrics_are_of_suites(config: Config) -> None:
    """Raises ValueError where `eval.keep_best` or `eval.stop_at` names no metric of a suite."""
    valid = {f"{suite.name}/{metric}": suite for suite in config.suites for metric in suite.metric_names}
    stop_metric = None if config.eval.stop_at is None else config.eval.stop_at[0]
    for key, wanted in (("eval.keep_best", config.eval.keep_best), ("eval.stop_at", stop_metric)):
        if wanted is None or wanted in valid:
            continue
        if not valid:
            raise ValueError(
                f"{key} = {wanted}: nothing is evaluated (data.eval_rows = 0, no eval.suites). Remove it, or set either."
            )
        near = difflib.get_close_matches(wanted, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{key} = {shown(wanted)} is no SUITE/METRIC of this run; {hint}valid here: {', '.join(valid)}"
        )


def _samples_come_from_somewhere(config: Config) -> None:
    data = config.data
    if data.offline is None and data.path is None:
        raise ValueError(
            "data.path is missing; give training prompts, or data.offline for generations to train on"
        )
    if not config.is_offline and data.path is None:
        raise ValueError(
            f"data.offline = {data.offline}: the other samples are generated, from prompts: set data.path."
        )
    if not config.is_offline and config.actors.fewest == 0:
        raise ValueError(
            "actors.count = 0: nothing would generate. Set it to 1 or more, or train on data.offline alone."
        )
    if config.is_offline and data.curriculum is not None:
        raise ValueError(
            f"data.curriculum = {data.curriculum} with data.offline = {data.offline}: what a log has solved stays so, whatever "
            "the policy learns. Remove data.curriculum."
        )
    if (
        data.offline is not None
        and not config.is_offline
        and not 0 < config.offline_samples < config.actors.group_size
    ):
        raise ValueError(
            f"data.offline = {data.offline}: {data.offline_share} of actors.group_size = {config.actors.group_size} rounds to "
            f"{config.offline_samples} samples. Choose a share that leaves at least one offline and one "
            "fresh sample."
        )


def _band_can_be_held(config: Config) -> None:
    buffer, size = config.buffer, config.learner.groups_per_step
    if buffer.samples_per_insert is None:
        return
    low, high = buffer.samples_per_insert
    if not 0 <= low <= high or high < 1:
        raise ValueError(
            f"buffer.samples_per_insert = [{low:g}, {high:g}]: expected 0 <= low <= high and high >= 1."
        )
    if high > buffer.uses_per_group:
        raise ValueError(
            f"buffer.samples_per_insert = [{low:g}, {high:g}]: no group is used more than buffer.uses_per_group = "
            f"{buffer.uses_per_group} times. "
            "Raise buffer.uses_per_group or lower the band."
        )
    if buffer.num_shards > 1:
        raise ValueError("buffer.samples_per_insert does not go with buffer.num_shards > 1. Remove it.")
    if config.admitted_groups < size:
        raise ValueError(
            f"buffer.samples_per_insert needs min(capacity, ...) = {config.admitted_groups} >= "
            f"groups_per_step = {size}."
        )


def _devices_fit(config: Config) -> None:
    actors, learner = config.actors, config.learner
    parallel = actors.tensor_parallel
    for key, amount in (
        ("actors.num_cpus", actors.num_cpus),
        ("actors.num_gpus", actors.num_gpus),
        ("learner.num_cpus", learner.reserved_cpus),
        ("learner.num_gpus", learner.num_gpus),
    ):
        if 0 < amount < LEAST_SHARE:
            raise ValueError(
                f"{key} = {amount:g}: Ray gives no less than {LEAST_SHARE:g}. Set it to 0, or more."
            )
    if actors.num_gpus > 1 and parallel == 1:
        whole = math.ceil(actors.num_gpus)
        divided = f"actors.tensor_parallel={whole}"
        if whole != actors.num_gpus:
            divided += f" actors.num_gpus={whole}"
        raise ValueError(
            f"actors.num_gpus = {actors.num_gpus:g} with actors.tensor_parallel = 1: an engine that is not divided uses one "
            f"GPU. Set actors.num_gpus=1 and raise actors.count instead, or, for a model that one GPU does not hold, {divided}."
        )
    if parallel > 1 and actors.num_gpus not in (0, parallel):
        raise ValueError(
            f"actors.tensor_parallel = {parallel} with actors.num_gpus = {actors.num_gpus:g}: each of an engine's "
            f"{parallel} processes has a GPU, or none has. Set actors.num_gpus={parallel}, or 0 for CPUs."
        )
    own = min(1.0, actors.num_gpus)
    if actors.num_gpus > 0 and actors.engine_memory is not None and actors.engine_memory > own:
        raise ValueError(
            f"actors.engine_memory = {actors.engine_memory:g} with actors.num_gpus = {actors.num_gpus:g}: on a GPU it is a share "
            f"of the card's memory, not GiB, and above {own:g} it is taken from others. Set it to at most {own:g}, for example "
            f"{actors.model_copy(update={'engine_memory': None}).gpu_memory_share:g}, or raise actors.num_gpus."
        )
    if actors.num_gpus > 0 and actors.engine_memory == 1:
        raise ValueError(
            f"actors.engine_memory = 1 with actors.num_gpus = {actors.num_gpus:g}: CUDA itself takes some of a card, and vLLM "
            "does not start where less is free than it may take. Set it to 0.95 or less."
        )
    if learner.num_gpus > 1:
        raise ValueError(
            f"learner.num_gpus = {learner.num_gpus}: one rank uses one GPU. Set learner.num_gpus=1 and raise "
            "learner.ranks instead."
        )
    if learner.ranks > 1 and not learner.num_gpus.is_integer():
        raise ValueError(
            f"learner.num_gpus = {learner.num_gpus:g} with learner.ranks = {learner.ranks}: ranks that share a GPU cannot meet, "
            "NCCL takes no two of them on one. Set learner.num_gpus=1, or learner.ranks=1."
        )
    if config.model.attention == "flash_attention_2" and (
        learner.num_gpus == 0 or config.model.dtype != "bfloat16"
    ):
        raise ValueError(
            f"model.attention = flash_attention_2 needs learner.num_gpus > 0 (here {learner.num_gpus:g}) and "
            "model.dtype = bfloat16 "
            f"(here {config.model.dtype}). Use model.attention=sdpa otherwise."
        )


def _rows_can_be_shared(config: Config) -> None:
    learner, shared = config.learner, config.learner.sequence_parallel
    name = f"learner.sequence_parallel = {shared}"
    if learner.ranks % shared:
        fits = [number for number in range(1, learner.ranks + 1) if learner.ranks % number == 0]
        raise ValueError(
            f"{name} does not divide learner.ranks = {learner.ranks}. Set it to one of "
            f"{', '.join(map(str, fits))}, or learner.ranks={shared * -(-learner.ranks // shared)}."
        )
    if shared > 1 and (learner.layout != "packed" or config.model.attention != "sdpa"):
        raise ValueError(
            f"{name} with learner.layout = {learner.layout} and model.attention = {config.model.attention}: only rows that are "
            "packed and attended to by sdpa are divided. Set learner.layout=packed model.attention=sdpa, or "
            "learner.sequence_parallel=1."
        )


def _weights_can_travel(config: Config) -> None:
    actors, learner, transport = config.actors, config.learner, config.weights.transport
    name = f"weights.transport = {transport}"
    if transport == "adapters" and not 0 < learner.lora_rank <= SERVED_RANKS[-1]:
        raise ValueError(
            f"{name} needs learner.lora_rank from 1 to {SERVED_RANKS[-1]}, which is what vLLM applies; it is "
            f"{learner.lora_rank}. Set it, or weights.transport=snapshot."
        )
    if transport == "adapters" and actors.num_gpus > 0 and config.model.dtype == "float32":
        raise ValueError(
            f"{name} with actors.num_gpus = {actors.num_gpus:g} and model.dtype = float32: on a GPU vLLM applies adapters of 16 "
            "bits alone. Set model.dtype=bfloat16, or weights.transport=snapshot, which merges them."
        )
    if config.weights.is_pulled:
        return
    if config.weights.full_every > 1:
        raise ValueError(
            f"{name} with weights.full_every = {config.weights.full_every}: what is pushed is whole every "
            "time. Set weights.full_every=1, or weights.transport=snapshot."
        )
    if actors.num_gpus == 0 or learner.num_gpus == 0:
        raise ValueError(
            f"{name} goes from GPU to GPU, but actors.num_gpus = {actors.num_gpus:g} and learner.num_gpus = "
            f"{learner.num_gpus:g}. "
            "Give both a GPU, or set weights.transport=snapshot, which needs none."
        )
    if actors.tensor_parallel > 1:
        # Such a worker takes orders from a queue, one after the other: nobody could tell one that waits in a
        # broadcast that the broadcast is broken off, and the rendezvous would stop generation.
        raise ValueError(
            f"{name} with actors.tensor_parallel = {actors.tensor_parallel}: weights are pushed only to engines that run "
            "in the actor's own process, because a worker of another process cannot be told to break off. Set "
            "weights.transport=snapshot, or actors.tensor_parallel=1."
        )
    if actors.on_update == "drain":
        raise ValueError(
            f"{name} with actors.on_update = drain: the learner would wait for the longest generation of any "
            "actor. "
            "Set actors.on_update=continue or abort, or weights.transport=snapshot."
        )
    gpus = learner.num_gpus + (actors.most or actors.fewest) * actors.num_gpus
    if transport == "ipc" and (learner.ranks > 1 or gpus > 1):
        raise ValueError(
            f"{name} stays within one GPU, but {learner.ranks} learner ranks and "
            f"{actors.most or actors.fewest} actors ask for {gpus:g}. "
            "Set learner.ranks=1 and fractions that add up to 1, such as learner.num_gpus=0.5 "
            "actors.num_gpus=0.5, "
            "or weights.transport=nccl."
        )
    if transport == "nccl" and (actors.num_gpus < 1 or learner.num_gpus < 1):
        raise ValueError(
            f"{name} takes no two processes on one GPU, but actors.num_gpus = {actors.num_gpus:g} and "
            "learner.num_gpus = "
            f"{learner.num_gpus:g}. Give each a whole one, or set weights.transport=ipc or snapshot."
        )


def warnings(config: Config) -> list[str]:
    """What is allowed but probably not meant, one sentence each."""
    found = []
    if config.actors.top_p < 1:
        found.append(
            f"actors.top_p = {config.actors.top_p}: truncated sampling does not cover the "
            "reference: the optimum is another one."
        )
    found += config.objective.warnings(config)
    # With publish_every = 1 the buffer hands out nothing that would be too old: an actor waits for the
    # version that is on its way.
    bound = StalenessBound(config.buffer.max_staleness)
    if bound.evicts_between_snapshots(config.weights.publish_every) and not config.is_offline:
        found.append(
            f"buffer.max_staleness = {config.buffer.max_staleness} < weights.publish_every = "
            f"{config.weights.publish_every}: "
            "what is generated ahead of the next snapshot will be evicted as stale."
        )
    slowest_s = config.actors.max_new_tokens / SLOW_TOKENS_PER_S
    if slowest_s > config.run.timeout_s and not config.is_offline:
        found.append(
            f"actors.max_new_tokens = {config.actors.max_new_tokens} takes {slowest_s:.0f} s at "
            f"{SLOW_TOKENS_PER_S:g} tokens per second, "
            f"longer than run.timeout_s = {config.run.timeout_s:g}: nothing is lost by that, but stalls will "
            "be told that are none. "
            "Raise run.timeout_s."
        )
    learner = config.learner
    if (teams := learner.ranks // learner.sequence_parallel) > learner.groups_per_step:
        found.append(
            f"learner.ranks = {learner.ranks} with learner.groups_per_step = {learner.groups_per_step}: a group stays whole, so "
            f"that {(teams - learner.groups_per_step) * learner.sequence_parallel} ranks have nothing to train. Raise "
            "learner.groups_per_step, or lower learner.ranks."
        )
    if config.weights.full_every > 1 and config.model.dtype == "float32":
        found.append(
            f"weights.full_every = {config.weights.full_every} with model.dtype = float32: nearly every element changes in a "
            "step, and what has changed travels as it would without. Set weights.full_every=1, or model.dtype=bfloat16."
        )
    warmup_steps, _ = learner.schedule
    if warmup_steps >= config.run.steps:
        found.append(
            f"learner.schedule warms up for {warmup_steps} steps >= run.steps = {config.run.steps}: the peak learning rate is "
            "not passed."
        )
    if config.learner.offload == "all" and config.learner.num_gpus == 0:
        found.append("learner.offload = all with learner.num_gpus = 0: everything is in CPU memory anyway.")
    on_gpu = [room for room in ("learner", "actors") if getattr(config, room).num_gpus]
    if on_gpu and config.model.dtype == "float32":
        asked = " and ".join(f"{room}.num_gpus = {getattr(config, room).num_gpus:g}" for room in on_gpu)
        found.append(
            f"model.dtype = float32 with {asked}: GPUs have their speed, and flash attention, in 16 bits. Set "
            "model.dtype=bfloat16, unless the model is a tiny one."
        )
    if not any(config.rewards.functions.values()):
        found.append("rewards.functions: every weight is 0, so that nothing is rewarded.")
    return found
