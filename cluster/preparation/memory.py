"""How much memory a run will want, from the model's config alone: no weights are read, nothing is downloaded.

An estimate, for choosing GPUs before they are paid for. Legend: P parameters, N ranks, b bytes of
`model.dtype`, T `learner.micro_batch_tokens` over `learner.sequence_parallel`, L layers, h hidden size, f MLP
size, k key/value width (heads x head size), V vocabulary, Q parameters that are trained: P, or with LoRA rank
(in + out) of every linear layer but the LM head.

Learner, per rank, DeepSpeed ZeRO-3 with AdamW (DeepSpeed 0.19's buffers; the same sum as the ZeRO paper's,
arXiv 1910.02054):

    parameters    b P/N, adapters b Q/N
    gradients     4 Q/N, summed in float32; Adam's two moments 8 Q/N
    master        4 Q/N, the float32 copy; none if b = 4, where the parameters are it
    reference     b P/N, proximal policy b P/N, each only where the objective needs it; with LoRA b Q/N, and
                  nothing before it has moved
    gathered      b min(P, 1e9), if N > 1 or all is offloaded from a GPU: whole parameters kept at hand
                  (stage3_max_live_parameters); those of an offloaded reference are gone before the backward
                  pass needs its memory
    bucket        b 5e8 on a GPU: gradients on their way (reduce_bucket_size); on a CPU never touched in full
    step          a flat float32 copy of the gradients, 4 min(Q/N, 1e9) (sub_group_size), instead of
                  activations and log-probs, which are gone by then: only what is above these counts
    activations   b T (L (8h + 2k + 4f) + 2h), counted on Llama with sdpa; with gradient checkpointing
                  b T (L h + 8h + 2k + 4f + 2h); with LoRA a layer keeps 2h less, whose norms need no
                  gradient, and 7 rank more
    log-probs     three float32 chunks of the logits, 128 MiB each at most (512 on a GPU), up to 256 MiB of logits
                  (learner/step/logprobs.py); the LM head's gradient, b V h, and 4 V h more while it is
                  summed over chunks, unless it is frozen. For models that rescale their logits: 2 b T V,
                  all logits and their gradient, and 128 MiB to upcast pieces of them
    checkpoint    what is saved, once more in host memory: (4 + 8) Q/N, and copies that have moved

Actor: weights b P, adapters that come alone b Q (by vLLM's next higher rank), and a KV cache of 2 L k b per
token. With `actors.tensor_parallel` each of its GPUs has a share of weights and cache; a process is in host
memory for each, and new weights b P once, from which all of them read. Where only changes are stored
(`weights.full_every`) new weights are put together in b P of host memory more, and rank 0 holds two
snapshots. Else an actor reads them where Ray's object store has them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from core.config import ActorsConfig, Config, LearnerConfig, ModelConfig
from core.config.checks import longest_sequence, served_rank
from core.errors import ConfigError
from core.model_shape import adapted_layers, empty_model, num_fused, reads_config
from learner.objectives import load_objective
from learner.step.frozen import PROXIMAL, REFERENCE, frozen_names
from learner.step.logprobs import CHUNK_BYTES, KEPT_BYTES, chunk_bytes_on, install_logprob_head

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
# DeepSpeed's defaults.
MAX_LIVE_PARAMETERS = SUB_GROUP_PARAMETERS = 1e9
REDUCE_BUCKET_PARAMETERS = 5e8
PROCESS_BYTES = 0.6 * GIB  # Resident with torch, Ray and the libraries imported, measured.
_SIZE_IN_NAME = re.compile(r"(?<![A-Za-z\d.])(?:(\d+)x)?(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z\d])")


class MemoryUse(NamedTuple):
    """One use of memory, such as `MemoryUse("gradients", 4 * trained)`. `on_host` says that it lies in CPU
    memory
    also when the process has a GPU.
    """

    name: str
    num_bytes: float
    on_host: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory that one learner rank and one actor want. `source` says where the figures come from; without
    a model the parts are empty.

    `notes` are sentences about what follows for the config.
    """

    source: str
    num_params: int | None = None
    learner: tuple[MemoryUse, ...] = ()
    actor: tuple[MemoryUse, ...] = ()
    notes: tuple[str, ...] = ()


class ModelShape(NamedTuple):
    """The sizes that the formulas need of a model. All but the parameters are 0 when only these are known."""

    num_params: int
    layers: int = 0
    hidden: int = 0
    mlp: int = 0
    kv_width: int = 0
    vocabulary: int = 0
    adapted: int = 0
    """Inputs and outputs of all linear layers but the LM head."""
    has_whole_logits: bool = False
    fused: int = 0
    """Parameters of experts that lie together in one tensor, which files have apart."""


def estimate_memory(config: Config, known: ModelShape | None = None) -> MemoryEstimate:
    """Returns the estimate for `config.model`: by its config if that is on disk or in the hub's cache, else
    by the size in its name. A shape that is known already is taken as it is.
    """
    path = config.model.path
    try:
        shape = known or shape_of(config.model, config.learner)
    except (OSError, ConfigError) as error:
        millions = _size_in_name(path)
        reason = _why_not_at_hand(path, error)
        if millions is None:
            return MemoryEstimate(f"{path}: model config not at hand ({reason}): no estimate")
        unknown = f"activations, logits, KV cache{', adapters' if config.learner.lora_rank else ''} left out"
        source = f"{path}: model config not at hand ({reason}): rough, by the size in the name; {unknown}"
        shape = ModelShape(int(millions * 1e6))
    else:
        source = f"{shape.num_params:,} parameters, counted from the config of {path}; the rest by formula"
    learner, actor = _learner_parts(config, shape), _actor_parts(config, shape)
    return MemoryEstimate(source, shape.num_params, learner, actor, tuple(_notes(config, shape)))


def shape_of(model_config: ModelConfig, learner: LearnerConfig) -> ModelShape:
    """Returns the model's shape by its Hugging Face config, built on the meta device.

    Raises OSError when there is no config at hand, ConfigError when it is broken or no transformer's.
    """
    model = empty_model(model_config, local_files_only=True)
    with reads_config(model_config):
        shape = _shape_of(model, learner)
    if shape.num_params and shape.layers and shape.hidden:
        return shape
    raise ConfigError(
        f"model.path = {model_config.path}: its config describes a model of {shape.num_params} parameters in "
        f"{shape.layers} layers. Give one with some."
    )


def _shape_of(model: Any, learner: LearnerConfig) -> ModelShape:
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    layers = adapted_layers(model).values() if learner.lora_rank else ()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        mlp=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
        adapted=sum(layer.in_features + layer.out_features for layer in layers),
        has_whole_logits=install_logprob_head(model) is None,
        fused=num_fused(model),
    )


def _why_not_at_hand(path: str, error: Exception) -> str:
    if isinstance(error, OSError) and not os.path.isdir(path):
        return "neither a model directory nor in the hub's cache"
    return str(error).strip().splitlines()[0]


def _size_in_name(path: str) -> float | None:
    """Returns millions of parameters by a name such as `Llama-3-8B`, `SmolLM2-135M` or `8x7B`; None when it
    says nothing.
    """
    match = _SIZE_IN_NAME.search(path.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        return None
    experts, number, unit = match.groups()
    return int(experts or 1) * float(number) * (1000 if unit in "Bb" else 1)


def _learner_parts(config: Config, shape: ModelShape) -> tuple[MemoryUse, ...]:
    learner, b = config.learner, BYTES[config.model.dtype]
    share = shape.num_params / learner.ranks
    adapters = learner.lora_rank * shape.adapted / learner.ranks
    trained = adapters if learner.lora_rank else share
    states = 4 + 8  # Bytes of fp32 weights and Adam's moments, which is what a checkpoint holds.
    reference, proximal = _frozen_bytes(config, share, adapters)
    moved = (reference if config.objective.reference_moves_every else 0) + proximal
    on_gpu = learner.num_gpus > 0
    forward = _activation_bytes(config.model, learner, shape) + _logprob_bytes(config.model, learner, shape)
    all_aside = learner.offload == "all"
    frozen_aside = all_aside or (learner.offload == "reference" and on_gpu)
    step = 4 * min(trained, SUB_GROUP_PARAMETERS)
    is_gathered = learner.ranks > 1 or (all_aside and on_gpu)
    gathered = min(shape.num_params, MAX_LIVE_PARAMETERS) if is_gathered else 0
    master = 4 * trained if b < 4 else 0
    bucket = REDUCE_BUCKET_PARAMETERS if on_gpu else 0
    saved = states * trained + moved if config.checkpoint.every else 0
    parts = [
        MemoryUse("parameters", b * share, all_aside),
        MemoryUse("adapters", b * adapters, all_aside),
        MemoryUse("gradients", 4 * trained, all_aside),
        MemoryUse("float32 master", master, all_aside),
        MemoryUse("Adam moments", 8 * trained, all_aside),
        MemoryUse("reference", reference, frozen_aside),
        MemoryUse("proximal policy", proximal, frozen_aside),
        MemoryUse("gathered parameters", b * gathered),
        MemoryUse("gradient bucket", b * bucket),
        MemoryUse("activations", _activation_bytes(config.model, learner, shape)),
        MemoryUse("log-probs", _logprob_bytes(config.model, learner, shape)),
        MemoryUse("optimizer step", max(0, step - forward), all_aside),
        MemoryUse("checkpoint buffers", saved, on_host=True),
        MemoryUse("process", PROCESS_BYTES, on_host=True),
    ]
    return tuple(part for part in parts if part.num_bytes)


def _frozen_bytes(config: Config, share: float, adapters: float) -> tuple[float, float]:
    """Returns the bytes of the reference and of the proximal policy, of one rank: whole models, or copies of
    adapters.
    """
    names = frozen_names(load_objective(config.objective))
    has_reference, has_proximal = REFERENCE in names, PROXIMAL in names
    b = BYTES[config.model.dtype]
    if config.learner.lora_rank:
        return b * adapters * (
            has_reference and config.objective.reference_moves_every > 0
        ), b * adapters * has_proximal
    return b * share * has_reference, b * share * has_proximal


def _activation_bytes(model: ModelConfig, learner: LearnerConfig, shape: ModelShape) -> float:
    if not shape.layers:
        return 0.0
    one_layer = 8 * shape.hidden + 2 * shape.kv_width + 4 * shape.mlp
    if learner.lora_rank:
        one_layer += 7 * learner.lora_rank - 2 * shape.hidden
    layers = shape.layers * one_layer
    if learner.gradient_checkpointing:
        layers = shape.layers * shape.hidden + one_layer
    num_tokens = learner.micro_batch_tokens / learner.sequence_parallel
    return BYTES[model.dtype] * num_tokens * (layers + 2 * shape.hidden)


def _logprob_bytes(model: ModelConfig, learner: LearnerConfig, shape: ModelShape) -> float:
    """Returns the bytes of the LM head's log-probs and their gradient."""
    b = BYTES[model.dtype]
    logits = learner.micro_batch_tokens / learner.sequence_parallel * shape.vocabulary
    if shape.has_whole_logits:
        return 2 * b * logits + CHUNK_BYTES
    chunk = chunk_bytes_on(is_gpu=learner.num_gpus > 0)
    head = shape.vocabulary * shape.hidden * (b if 4 * logits <= chunk else b + 4)
    if learner.lora_rank:
        head = 0
    return 3 * min(4 * logits, chunk) + min(b * logits, KEPT_BYTES) + head


def _actor_parts(config: Config, shape: ModelShape) -> tuple[MemoryUse, ...]:
    b = BYTES[config.model.dtype]
    parallel, is_alone = config.actors.tensor_parallel, config.weights.transport == "adapters"
    share = parallel if config.actors.num_gpus else 1  # In host memory all shares are one sum.
    weights = MemoryUse("weights", b * shape.num_params / share)
    adapters = MemoryUse(
        "adapters",
        b * served_rank(config.learner.lora_rank) * shape.adapted if is_alone else 0,
    )
    if config.actors.num_gpus == 0:
        cache = MemoryUse("KV cache", config.actors.kv_cache_gib * GIB)
    else:
        cache = MemoryUse(
            "KV cache of all slots",
            _cache_bytes(config.model, config.max_sequence_tokens, shape) * config.actors.slots / share,
        )
    num_copies = (parallel > 1) + has_changes(config) if not is_alone else 0
    on_host = (
        MemoryUse("new weights", num_copies * b * shape.num_params, on_host=True),
        MemoryUse("process", PROCESS_BYTES * config.actors.num_processes, on_host=True),
    )
    return tuple(part for part in (weights, adapters, cache, *on_host) if part.num_bytes)


def has_changes(config: Config) -> bool:
    """Says whether only what has changed is stored of some versions: rank 0 and actors keep whole ones for
    that.
    """
    return config.weights.is_pulled and config.weights.full_every > 1


def _cache_bytes(model: ModelConfig, num_tokens: int, shape: ModelShape) -> float:
    """Returns the KV cache of one sequence, in bytes: 2 L k b num_tokens."""
    per_token = 2 * shape.layers * shape.kv_width * BYTES[model.dtype]
    return per_token * num_tokens


def _notes(config: Config, shape: ModelShape) -> list[str]:
    notes, actors = [], config.actors
    one = _cache_bytes(config.model, config.max_sequence_tokens, shape)
    whole = BYTES[config.model.dtype] * shape.num_params / GIB
    if whole >= 1 and config.weights.transport != "adapters":
        kept = (
            "two snapshots of the weights take" if has_changes(config) else "a snapshot of the weights takes"
        )
        notes.append(
            f"{kept} {whole * (1 + has_changes(config)):.1f} GiB of host memory beside learner rank 0, and each version that "
            f"actors still load up to {whole:.1f} GiB of Ray's object store."
        )
    if whole >= 1 and config.learner.ranks == 1:  # Several ranks load under zero.Init, each its share.
        notes.append(
            f"while it loads, the learner holds the whole model once more: {whole:.1f} GiB, first "
            "in host memory."
        )
    experts = BYTES[config.model.dtype] * shape.fused / GIB
    if experts >= 1 and config.learner.ranks > 1:  # transformers' way under zero.Init.
        notes.append(
            f"while it loads, each of the {config.learner.ranks} ranks puts all experts together in host memory, "
            f"{experts:.1f} GiB a rank: with all on one node {experts * config.learner.ranks:,.1f} GiB."
        )
    if not one:
        return notes
    length = f"full length ({config.max_sequence_tokens} tokens)"
    cache = f"actors.engine_memory = {actors.kv_cache_gib}"
    if actors.num_gpus > 0:
        gpu = (
            sum(part.num_bytes for part in _actor_parts(config, shape) if not part.on_host)
            / actors.gpu_memory_share
        )
        each = (
            "an actor's GPU"
            if actors.tensor_parallel == 1
            else f"each of an actor's {actors.num_gpus:g} GPUs"
        )
        notes.append(
            f"{each} of {gpu / GIB:.1f} GiB holds all {actors.slots} slots at {length}; on a smaller "
            "one vLLM runs fewer at once."
        )
    elif actors.kv_cache_gib * GIB < one:
        notes.append(
            f"{cache} is below one sequence of {length}, {one / GIB:.2f} GiB: vLLM will refuse to start. "
            f"Raise it, or lower {longest_sequence(config)}."
        )
    elif actors.kv_cache_gib * GIB < one * actors.slots:
        notes.append(
            f"{cache} holds {int(actors.kv_cache_gib * GIB // one)} sequences of {length}, fewer than "
            f"actors.slots = {actors.slots}; "
            f"all of them want {one * actors.slots / GIB:.2f} GiB."
        )
    return notes


def host_bytes(actors: ActorsConfig, learner: LearnerConfig, estimate: MemoryEstimate) -> float:
    """Returns the CPU memory of all ranks and actors together, in bytes."""
    ranks_bytes = learner.ranks * on_host(estimate.learner, learner.num_gpus)
    return ranks_bytes + actors.fewest * on_host(estimate.actor, actors.num_gpus)


def on_host(parts: tuple[MemoryUse, ...], num_gpus: float) -> float:
    """Returns the bytes of CPU memory of one process with these parts: all of them where it has no GPU."""
    return sum(part.num_bytes for part in parts if part.on_host or not num_gpus)


def render_memory(actors: ActorsConfig, learner: LearnerConfig, estimate: MemoryEstimate) -> list[str]:
    """Returns lines: the source, then the parts of one rank and one actor in GiB."""
    lines = [f"  {estimate.source}"]
    for role, parts, num_gpus in (
        (f"learner, each of {learner.ranks}", estimate.learner, learner.num_gpus),
        (f"actor, each of {actors.fewest}", estimate.actor, actors.num_gpus),
    ):
        for where, here in (
            ("GPU", [p for p in parts if num_gpus and not p.on_host]),
            ("host", [p for p in parts if p.on_host or not num_gpus]),
        ):
            if here:
                listed = ", ".join(f"{part.name} {part.num_bytes / GIB:.2f}" for part in here)
                lines.append(
                    f"  {role:<22} {where:<4} {sum(part.num_bytes for part in here) / GIB:>7.2f} "
                    f"GiB: {listed}"
                )
    return lines + [f"  {note}" for note in estimate.notes]
