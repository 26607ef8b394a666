"""The inference engine: every call into vLLM is in this file.

vLLM's engine runs inside this process (no engine-core process), so that weights can be swapped between two steps while
unfinished generations go on. Each sample is a request of its own; vLLM's prefix cache shares the prompt of a group.

Weights arrive through vLLM's layerwise reload, the lifecycle of its own transfer engines. Two surprises are handled here:
on a CPU vLLM packs the linear layers and drops the originals, so a bare `load_weights` fails; and after a reload a tied
`lm_head` keeps the packed matrix of the OLD weights, silently wrong. `tests/test_engine.py` holds both to account.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import torch

from buffer.records import Sample, VersionSpan
from cluster.config import ActorsConfig, ModelConfig

# What this file uses of vLLM 0.32, checked by a contract test that names what is missing.
VLLM_SYMBOLS = (
    "vllm:EngineArgs",
    "vllm:LLMEngine",
    "vllm:SamplingParams",
    "vllm.sampling_params:RequestOutputKind",
    "vllm.model_executor.model_loader.reload:initialize_layerwise_reload",
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
)


def set_engine_environment(config: ActorsConfig, *, seed_threads: bool = True) -> None:
    """Environment that vLLM reads at import: call before the first import of vllm in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.num_gpus == 0:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
        if seed_threads:
            # More OpenMP threads than cores, with a learner beside it, made no progress at all on two cores.
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(config.num_cpus)))


class Engine:
    """One vLLM engine that speaks token ids in, Samples out."""

    def __init__(self, model: ModelConfig, config: ActorsConfig, *, max_model_len: int, seed: int = 0, version: int = 0) -> None:
        if "vllm" not in sys.modules:
            set_engine_environment(config)
        from vllm import EngineArgs, LLMEngine

        self._config = config
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model.path,
                dtype=model.dtype,
                max_model_len=max_model_len,
                max_num_seqs=config.slots,
                seed=seed,
                enforce_eager=config.num_gpus == 0,
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                disable_log_stats=True,
                trust_remote_code=model.trust_remote_code,
                gpu_memory_utilization=config.gpu_memory_utilization,
                tensor_parallel_size=max(1, int(config.num_gpus)),
                generation_config="vllm",
            )
        )
        self.version = version
        self._engine.set_weight_version(str(version))

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return self._engine.get_num_unfinished_requests()

    def submit(self, request_id: str, prompt_ids: tuple[int, ...], *, seed: int | None = None, temperature: float | None = None) -> None:
        """Queue one sample. `temperature` None: the configured one; 0: greedy."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = self._config
        params = SamplingParams(
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
            seed=seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": list(prompt_ids)}, params)

    def step(self) -> list[tuple[str, Sample]]:
        """One forward pass of everything running; the samples that finished with it."""
        return [(output.request_id, _sample(output.outputs[0])) for output in self._engine.step() if output.finished]

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests."""
        self._engine.abort_request(request_ids)

    def load_weights(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Swap in the weights of `version`; unfinished generations continue with them.

        The prefix cache is dropped, so that new requests attend to nothing of older weights. `weights` must be complete.
        """
        tensors = list(weights)
        self._engine.apply_model(lambda model: _reload(model, tensors, self._engine.vllm_config.model_config))
        self._engine.reset_prefix_cache()
        self._engine.set_weight_version(str(version))
        self.version = version


def _sample(output) -> Sample:  # type: ignore[no-untyped-def]
    token_ids = tuple(output.token_ids)
    return Sample(
        token_ids=token_ids,
        logprobs=tuple(step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)),
        version_spans=tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions),
        finish_reason=output.finish_reason,
        text=output.text,
    )


def _reload(model: torch.nn.Module, tensors: list[tuple[str, torch.Tensor]], model_config) -> None:  # type: ignore[no-untyped-def]
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    model.load_weights(tensors)  # type: ignore[operator]
    finalize_layerwise_reload(model, model_config)
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "cpu_linear", None) is not None and getattr(head, "weight", None) is not None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
