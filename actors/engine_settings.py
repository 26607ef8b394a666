"""What a vLLM engine is started with: its environment, its arguments, and what we use of it.

Nothing of vLLM is imported here. The surprises of a CPU engine, of states and of adapters stand where they
are answered.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from core.config import ActorsConfig, ModelConfig
from core.config.checks import served_rank
from core.errors import ConfigError
from core.model_shape import adapted_layers, carries_state, empty_model, load_model_config

VLLM_SYMBOLS = (
    "vllm:EngineArgs",
    "vllm:LLMEngine.from_engine_args",
    "vllm:LLMEngine.add_lora",
    "vllm:LLMEngine.collective_rpc",
    "vllm:LLMEngine.get_supported_tasks",
    "vllm:LLMEngine.get_tokenizer",
    "vllm:LLMEngine.set_weight_version",
    "vllm:SamplingParams",
    "vllm.exceptions:VLLMValidationError",
    "vllm.inputs.engine:tokens_input",
    "vllm.platforms:current_platform.is_cuda_alike",
    "vllm.platforms:current_platform.is_cpu",
    "vllm.v1.engine.core:EngineCore.pause_scheduler",
    "vllm.v1.engine.core:EngineCore.resume_scheduler",
    "vllm.v1.engine.core_client:InprocClient.abort_requests",
    "vllm.v1.engine.core_client:InprocClient.add_request",
    "vllm.v1.engine.core_client:InprocClient.get_output",
    "vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
    "vllm.model_executor.layers.activation:SiluAndMul",
    "vllm.model_executor.layers.fused_moe.router.cpu_router:CPURouter",
    "vllm.model_executor.layers.layernorm:RMSNorm.forward_native",
    "vllm.model_executor.model_loader.reload:initialize_layerwise_reload",
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload",
    "vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
    "vllm.config:set_current_vllm_config",
    "vllm.config.lora:MaxLoRARanks",
    "vllm.lora.model_manager:LoRAModelManager.get_adapter",
    "vllm.config.weight_transfer:WeightTransferConfig",
    "vllm.lora.request:LoRARequest",
    "vllm.v1.worker.gpu_worker:Worker.get_model",
    "vllm.v1.worker.gpu_worker:Worker.shutdown_weight_transfer_engine",
    "vllm.v1.worker.gpu_worker:Worker.start_weight_update",
    "vllm.v1.worker.gpu_worker:Worker.update_weights",
    "vllm.v1.worker.gpu_worker:Worker.finish_weight_update",
    "vllm.distributed.weight_transfer.base:WeightTransferEngine.init_transfer_engine",
    "vllm.distributed.weight_transfer.base:WeightTransferEngine.parse_init_info",
    "vllm.distributed.weight_transfer.base:WeightTransferEngine.shutdown",
)
"""What actors/engine.py, engine_worker.py and engine_cpu.py use of vLLM 0.32, checked by a contract test that
names what is missing.
"""


CPU_PASS_TOKENS, GPU_PASS_TOKENS = 2048, 8192
"""What a pass takes at least, where there are slots for so many: vLLM's defaults for a CPU engine like ours,
and for a server on a GPU.
"""
CONTEXT_BYTES = 2 * 2**30
"""Of a card's memory, for CUDA itself, its libraries and CUDA graphs: an estimate."""


_LOWERING = "torch._inductor.lowering"


class Adapters(NamedTuple):
    """The kind of LoRA adapters that are published without the weights they belong to: y = W x + (alpha /
    rank) B A x.
    """

    rank: int
    alpha: float


def set_engine_environment(config: ActorsConfig) -> None:
    """Sets the environment that vLLM reads when an engine is built, before vllm is imported: torch reads its
    part at the import.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Of the workers of an engine over several GPUs: a fork of a process with threads may hang.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if config.num_gpus == 0:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if config.tensor_parallel > 1:  # Its workers take the number of their threads from here.
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(config.num_cpus / config.tensor_parallel)))
        # Latent attention (DeepSeek) as any other: vLLM's own kernel for it wants bfloat16 where the CPU has
        # AMX.
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")
        # One small sampler function of vLLM would be compiled by a C++ compiler, for 2-6 s, at the first
        # token.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    else:
        # Of float32 vLLM's attention would take ten bits of each factor (TF32): too far from the learner's.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Collects nothing while libraries load, and leaves out of later collections what is there by then.

    An actor has its engine after 5.4 s of CPU time instead of 7.4: vLLM itself asks for full collections when
    an engine is built, and each would visit every object of torch.
    """
    was_enabled, is_first = gc.isenabled(), "vllm" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:  # Later, an engine that is gone may lie in cycles, and would be kept for ever.
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def without_lowering(config: ActorsConfig) -> Iterator[None]:
    """Lets vLLM be imported for a CPU without torch's lowering of compiled graphs, half a second of imports:
    vLLM mends it wherever it can be imported, and a CPU engine compiles nothing.
    """
    if config.num_gpus or _LOWERING in sys.modules:
        yield
        return
    sys.modules[_LOWERING] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_LOWERING]


def check_device(config: ActorsConfig, platform: Any) -> None:
    """Raises ConfigError where the installed vLLM, whose `current_platform` is given, has no engine for the
    device asked for.

    vLLM for CUDA has none for a CPU: with `actors.num_gpus` = 0 it would take a GPU that belongs to others.
    """
    if config.num_gpus == 0 and platform.is_cuda_alike():
        raise ConfigError(
            "actors.num_gpus = 0, but the vLLM of this node is for GPUs and would take one that Ray gave to others. Set "
            "actors.num_gpus=1, or a fraction such as 0.25, or install the CPU's (make setup KIND=cpu)."
        )
    if config.num_gpus > 0 and platform.is_cpu():
        raise ConfigError(
            f"actors.num_gpus = {config.num_gpus:g}, but the vLLM of this node is for CPUs. Set actors.num_gpus=0, or install the "
            "GPUs' (make setup KIND=gpu)."
        )


def engine_arguments(
    model: ModelConfig, config: ActorsConfig, *, max_model_len: int, seed: int, card_bytes: int = 0
) -> dict[str, Any]:
    """Returns the arguments of vLLM's engine, by the names of its EngineArgs; `card_bytes` is the memory of a
    card that the engine shares.

    Raises ConfigError where its share has no room for a cache.
    """
    arguments = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.slots,
        "seed": seed,
        "logprobs_mode": "processed_logprobs",
        # On a CPU vLLM keeps states for a prefix only where prompts come in pieces: see _device_arguments.
        "enable_prefix_caching": config.num_gpus > 0 or not carries_state(load_model_config(model)),
        "disable_log_stats": True,
        "trust_remote_code": model.trust_remote_code,
        "generation_config": "vllm",
        # Not Mistral's own config and weights where they lie beside Hugging Face's, which are what the
        # learner has.
        "config_format": "hf",
        "load_format": "hf",
        "worker_extension_cls": "actors.engine_worker.EngineWorker",
        "max_num_batched_tokens": _tokens_of_a_pass(config, max_model_len),
        **_parallel_arguments(config),
        **_device_arguments(config),
    }
    if 0 < config.num_gpus < 1:
        # vLLM would take for its own what others on the card take while it measures, and end where they give
        # some back.
        pass_tokens = arguments["max_num_batched_tokens"]
        arguments["kv_cache_memory_bytes"] = _cache_of_a_share(model, config, pass_tokens, card_bytes)
    return arguments


def _cache_of_a_share(model: ModelConfig, config: ActorsConfig, pass_tokens: int, card_bytes: int) -> int:
    """Returns the bytes for keys and values in an engine's share of a card: what weights, a pass and CUDA
    leave.

    A pass of T tokens holds six hidden states and three MLP states a token, and four float32 rows of logits a
    slot.
    """
    text, size = load_model_config(model).get_text_config(), getattr(torch, model.dtype).itemsize
    weights = size * sum(parameter.numel() for parameter in empty_model(model).parameters())
    mlp = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    states = size * pass_tokens * (6 * text.hidden_size + 3 * mlp)
    logits = 4 * 4 * config.slots * text.vocab_size
    share = config.gpu_memory_share * card_bytes
    left = int(share - weights - states - logits - CONTEXT_BYTES)
    if left <= 0:
        needs = (share - left) / 2**30
        raise ConfigError(
            f"actors.engine_memory = {config.gpu_memory_share:g} is {share / 2**30:.1f} GiB of this card: weights, a pass and CUDA "
            f"take {needs:.1f} GiB, which leaves none for keys and values. Raise actors.num_gpus and actors.engine_memory, or "
            "lower actors.slots."
        )
    return left


def _tokens_of_a_pass(config: ActorsConfig, max_model_len: int) -> int:
    """Returns how many tokens one pass takes at most: vLLM's own choice is 2,048 wherever an engine is in the
    caller's process, so that long prompts would come in slices, and refuses more slots than that.
    """
    most = max(GPU_PASS_TOKENS if config.num_gpus else CPU_PASS_TOKENS, config.slots)
    if not config.num_gpus:
        most = max(most, max_model_len)  # A prompt does not come in pieces: see _device_arguments.
    return min(most, config.slots * max_model_len)


def lora_arguments(model: ModelConfig, adapters: Adapters) -> dict[str, Any]:
    """Returns the arguments of an engine that serves adapters alone, besides `engine_arguments`."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "max_lora_rank": served_rank(adapters.rank),
        # Else vLLM makes room for adapters of the embedding and the LM head too, and refuses vocabularies
        # above 258,048.
        "lora_target_modules": sorted(
            {name.rpartition(".")[2] for name in adapted_layers(empty_model(model))}
        ),
    }


def _parallel_arguments(config: ActorsConfig) -> dict[str, Any]:
    if config.tensor_parallel == 1:
        return {}
    # Said, because in a placement group of Ray's vLLM would ask Ray for workers in bundles of their own.
    return {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": "mp"}


def _device_arguments(config: ActorsConfig) -> dict[str, Any]:
    if config.num_gpus:
        return {"gpu_memory_utilization": config.gpu_memory_share}
    # More OpenMP threads than cores, with a learner beside it, made no progress at all on two cores.
    torch.set_num_threads(max(1, int(config.num_cpus)))
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30 / config.tensor_parallel),
        # Not vLLM's 128 for a CPU: only whole blocks of a prompt are shared by its group.
        "block_size": 32,
        # A prompt in pieces ends a CPU engine where requests have vLLM's own seeds: its generators have no
        # offset to set back. With those of actors/engine_cpu.py pieces were never tried.
        "enable_chunked_prefill": False,
    }
