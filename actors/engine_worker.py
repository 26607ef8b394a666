"""What an engine has done where its model is: in this process, or in a worker for each of its GPUs.

`EngineWorker` is mixed into vLLM's Worker (`worker_extension_cls`), and what it does is asked for by name
(`collective_rpc`): what goes to a worker of another process can hold no closure over the engine.

Surprises handled here: on a CPU vLLM packs the linear layers and drops the originals, so a bare
`load_weights` fails; and after a reload a tied `lm_head` and all mixtures of experts keep what was packed of
the OLD weights, silently wrong. `tests/actors/test_engine.py` and `tests/system/test_families.py` hold them
to account.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from actors.engine_cpu import mend
from core.children import die_with
from core.weights.snapshots import checksum
from core.weights.staging import Staging


class EngineWorker:
    """Has what vLLM's Worker lacks; the other attributes that are read here are the Worker's."""

    device: Any
    model_runner: Any
    rank: int
    vllm_config: Any
    weight_transfer_engine: Any
    agro_staging: Staging | None = None
    get_model: Callable[[], Any]

    def agro_prepare(self, actor_pid: int, on_cpu: bool) -> None:
        """Does, once, what is to be done before the first request: a worker in a process of its own is to end
        with the actor's, and a CPU engine is mended.
        """
        if os.getpid() != actor_pid:  # vLLM's own way needs a worker that is not stopped.
            die_with(actor_pid)
        # `_reload` checks itself what a snapshot leaves out; vLLM names layers that have nothing to load, at
        # every update.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        if on_cpu:
            mend(self.model_runner)

    def agro_load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """Swaps in `weights`; returns the names, as vLLM has them, of parameters that got nothing."""
        from vllm.config import set_current_vllm_config

        tensors: Iterable[tuple[str, torch.Tensor]] = list(weights)
        # Where an engine is divided, each worker takes but its part of each tensor.
        if self.device.type == "cuda" and self.vllm_config.parallel_config.tensor_parallel_size == 1:
            self.agro_staging = self.agro_staging or Staging(self.device)
            tensors = self.agro_staging.staged(tensors)
        with set_current_vllm_config(self.vllm_config):  # Attention and experts of some GPUs ask for it.
            return _reload(self.get_model(), tensors, self.vllm_config.model_config)

    def agro_unused_adapters(self) -> set[str]:
        """Returns the layers of vLLM's one adapter that are none of the layers it applies adapters to."""
        manager = self.get_model().lora_manager
        return set(manager.get_adapter(1).loras) - set(manager.modules)

    def agro_connect(self, init_info: dict[str, Any]) -> Any:
        """Meets the learner and the group's other actors; returns a copy of vLLM's engine that is connected.

        A copy: a meeting that comes about after it was given up cannot take the place of a newer one.
        """
        engine = copy.copy(self.weight_transfer_engine)
        # A stream of its own: generation does not wait for the others, as it would on the default one.
        on_gpu = self.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self.device)) if on_gpu else contextlib.nullcontext():
            engine.init_transfer_engine(engine.parse_init_info(init_info))
        return engine

    def agro_use(self, connection: list[Any]) -> None:
        """Puts the engine of this worker that was connected in the place of the one before."""
        self.weight_transfer_engine = connection[self.rank]

    def agro_abort_transfer(self) -> None:
        """Ends a broadcast that nobody sends any more."""
        self.weight_transfer_engine.shutdown()

    def agro_finalize(self) -> None:
        """Ends a reload that vLLM's transfer engine has left open."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            _finalize(self.get_model(), self.vllm_config.model_config)

    def agro_mend_update(self, probes: Mapping[str, str]) -> dict[str, str]:
        """Does what vLLM leaves to do after a reload; returns the checksums of those `probes` that are
        parameters of the model.
        """
        return _mended(self.get_model(), self.vllm_config.model_config, probes)


def _reload(model: Any, tensors: Iterable[tuple[str, torch.Tensor]], model_config: Any) -> list[str]:
    """Loads `tensors` into `model` and returns the names, as vLLM has them, of parameters that got nothing.

    Among them are those that a model's own loader wrote past the reload (gpt-oss its experts): loaded, it
    says, but they would be the old ones.
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    # Of each parameter: a router's gate, for example, is part of two modules.
    names = collections.defaultdict[int, set[str]](set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    initialize_layerwise_reload(model)
    loaded = model.load_weights(tensors)
    for prefix, layer in model.named_modules():
        if (info := get_layerwise_info(layer)).can_load() and info.load_numel <= 0:
            loaded -= {f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)}
    _finalize(model, model_config)
    _mended(model, model_config, {})
    loaded |= {"lm_head.weight"} if model_config.hf_text_config.tie_word_embeddings else set()
    return sorted(min(aliases) for aliases in names.values() if not aliases & loaded)


def _finalize(model: Any, model_config: Any) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def _mended(model: Any, model_config: Any, probes: Mapping[str, str]) -> dict[str, str]:
    """Does what vLLM leaves to do after a reload; returns the checksums of those `probes` that are parameters
    of the model.
    """
    if model_config.hf_text_config.tie_word_embeddings:
        _repack_head(getattr(model, "lm_head", None))
    for layer in model.modules():
        _repack_experts(layer)
    return {name: checksum(parameter) for name, parameter in model.named_parameters() if name in probes}


def _repack_experts(layer: Any) -> None:
    """Lets a layer's experts be prepared anew (CPU only): vLLM does so once, and would go on with those of
    the first weights.
    """
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    if kernel is not None and layer.w13_weight.device.type == "cpu":
        kernel.fused_experts.process_weights_after_loading(layer)


def _repack_head(head: Any) -> None:
    """Packs a tied `lm_head` anew (CPU only): a reload brings back the matrix packed of the old weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if getattr(head, "cpu_linear", None) is not None:
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
