"""The inference engine: every call into vLLM is in this file.

vLLM's engine runs inside this process (no engine-core process), so that weights can be swapped between two steps while
unfinished generations go on. Each sample is a request of its own; vLLM's prefix cache shares the prompt of a group.

Weights arrive through vLLM's layerwise reload, the lifecycle of its own transfer engines. Two surprises are handled here:
on a CPU vLLM packs the linear layers and drops the originals, so a bare `load_weights` fails; and after a reload a tied
`lm_head` keeps the packed matrix of the OLD weights, silently wrong. `tests/test_engine.py` holds both to account.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from buffer.records import Sample, VersionSpan
from cluster.config import ActorsConfig, ModelConfig
from cluster.errors import SnapshotError

# What this file uses of vLLM 0.32, checked by a contract test that names what is missing.
VLLM_SYMBOLS = (
    "vllm:EngineArgs",
    "vllm:LLMEngine",
    "vllm:SamplingParams",
    "vllm.inputs.engine:tokens_input",
    "vllm.sampling_params:RequestOutputKind",
    "vllm.model_executor.model_loader.reload:initialize_layerwise_reload",
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload",
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
)


def set_engine_environment(config: ActorsConfig) -> None:
    """Environment that vLLM reads when an engine is built; torch reads its part when vllm is first imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.num_gpus == 0:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # One small sampler function of vLLM would be compiled by a C++ compiler, for 2-6 s, at the first token.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class Engine:
    """One vLLM engine that speaks token ids in, Samples out."""

    def __init__(self, model: ModelConfig, config: ActorsConfig, *, max_model_len: int, seed: int = 0, version: int = 0) -> None:
        set_engine_environment(config)
        from vllm import EngineArgs, LLMEngine

        self._config = config
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(
                model=model.path,
                dtype=model.dtype,
                max_model_len=max_model_len,
                max_num_seqs=config.slots,
                seed=seed,
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                disable_log_stats=True,
                trust_remote_code=model.trust_remote_code,
                generation_config="vllm",
                **_device_arguments(config),
            )
        )
        # `_reload` checks itself what a snapshot leaves out; vLLM names layers that have nothing to load, at every update.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self._waiting: deque[tuple[str, list[int], Any]] = deque()
        self._num_updates = 0
        self.version = version
        self._engine.set_weight_version(str(version))

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._waiting) + self._engine.get_num_unfinished_requests()

    def submit(self, request_id: str, prompt_ids: tuple[int, ...], *, seed: int | None = None, temperature: float | None = None) -> None:
        """Queue one sample. `temperature` None: the configured one; 0: greedy. `seed` None: the engine's generator."""
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
            skip_clone=True,  # Made for this request alone; a deep copy of it is a tenth of a short generation's time.
        )
        self._waiting.append((request_id, list(prompt_ids), params))

    def step(self) -> list[tuple[str, Sample]]:
        """One forward pass of everything running; the samples that finished with it.

        A request waits here until it has a slot, so that it takes up the prefix cache of the weights it starts with.
        """
        from vllm.inputs.engine import tokens_input

        while self._waiting and self._engine.get_num_unfinished_requests() < self._config.slots:
            request_id, prompt_ids, params = self._waiting.popleft()
            self._engine.add_request(request_id, tokens_input(prompt_ids, cache_salt=f"update-{self._num_updates}"), params)
        return [(output.request_id, _sample(output.outputs[0])) for output in self._engine.step() if output.finished]

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests, started or not."""
        dropped = set(request_ids)
        self._waiting = deque(request for request in self._waiting if request[0] not in dropped)
        self._engine.abort_request(request_ids)

    def load_weights(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Swap in the weights of `version`; unfinished generations continue with them, on the old keys and values.

        Requests started later share no prefix with earlier ones. That is done by a salt in the cache's keys, since vLLM
        refuses to reset its prefix cache (returns False, no error) while anything is in flight. Raises SnapshotError
        when parameters of the model are missing from `weights`: the engine is then unusable.
        """
        tensors = list(weights)
        workers = self._engine.apply_model(lambda model: _reload(model, tensors, self._engine.vllm_config.model_config))
        if missing := sorted(set().union(*workers)):
            raise SnapshotError(f"weights of version {version} lack {len(missing)} parameters of the model: {', '.join(missing[:5])}")
        self._num_updates += 1
        self._engine.set_weight_version(str(version))
        self.version = version


def _device_arguments(config: ActorsConfig) -> dict[str, Any]:
    if config.num_gpus:
        return {"gpu_memory_utilization": config.gpu_memory_utilization, "tensor_parallel_size": max(1, int(config.num_gpus))}
    # More OpenMP threads than cores, with a learner beside it, made no progress at all on two cores.
    torch.set_num_threads(max(1, int(config.num_cpus)))
    # Blocks of 32 tokens, not vLLM's 128 for a CPU: only whole blocks of a prompt are shared by its group.
    return {"enforce_eager": True, "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30), "block_size": 32}


def _sample(output: Any) -> Sample:
    token_ids = tuple(output.token_ids)
    return Sample(
        token_ids=token_ids,
        logprobs=tuple(step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)),
        version_spans=tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions),
        finish_reason=output.finish_reason,
        text=output.text,
    )


def _reload(model: Any, tensors: list[tuple[str, torch.Tensor]], model_config: Any) -> list[str]:
    """Load `tensors` into `model`; the names, as vLLM has them, of parameters that got nothing."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    expected = {name for name, _ in model.named_parameters()}
    loaded = model.load_weights(tensors)
    finalize_layerwise_reload(model, model_config)
    head = getattr(model, "lm_head", None)
    if model_config.hf_text_config.tie_word_embeddings:
        expected.discard("lm_head.weight")
        _repack_head(head)
    return sorted(expected - loaded)


def _repack_head(head: Any) -> None:
    """Pack a tied `lm_head` anew: the reload brings back the matrix packed from the old weights (CPU only)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if getattr(head, "cpu_linear", None) is not None:
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
