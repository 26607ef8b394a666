"""Engines of random weights, and transformers' models of the same, for the cases of benchmarks/gpu/."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch

from actors.engine_settings import Adapters
from benchmarks.learner.gpu import MODELS, Model, save_model

PROMPT = tuple(3 + place * place % 90 for place in range(40))
ADAPTERS = Adapters(rank=8, alpha=32)
NOISE = 0.1
"""Standard deviation of adapters that say something (a learner's begin with a B of zeros), and do not drive
attention to where bfloat16 decides.
"""


def shape_of(name: str, *, on_gpu: bool) -> Model:
    """Returns a model of `MODELS`; where a case is only tried on a CPU a tiny one, in float32."""
    return MODELS[name] if on_gpu else MODELS["tiny"]._replace(dtype="float32")


def make_engine(
    model: Model,
    directory: str,
    *,
    on_gpu: bool,
    slots: int,
    max_new_tokens: int,
    adapters: Adapters | None = None,
    parallel: int = 1,
) -> Any:
    """Makes an engine of random weights, whose tokenizer is that of the quickstart, divided among `parallel`
    GPUs. On a CPU a pass is under way between two steps, as on a GPU.
    """
    from actors.engine import Engine
    from core.config import ActorsConfig, ModelConfig
    from recipes.arithmetic import make_tokenizer

    save_model(model, directory)
    make_tokenizer().save_pretrained(directory)
    config = ActorsConfig(
        slots=slots,
        max_new_tokens=max_new_tokens,
        num_gpus=parallel * on_gpu,
        tensor_parallel=parallel,
        engine_memory=0.3,
    )
    engine = Engine(
        ModelConfig.model_validate({"path": directory, "dtype": model.dtype}),
        config,
        max_model_len=len(PROMPT) + max_new_tokens,
        adapters=adapters,
    )
    if not on_gpu:
        core = engine._engine.engine_core.engine_core
        core.batch_queue, core.batch_queue_size = collections.deque(), 2
        core.step_fn = core.step_with_batch_queue
    return engine


def tokens_under_way(engine: Any) -> int:
    """Returns of how many tokens the passes are that are under way between two steps."""
    passes = engine._engine.engine_core.engine_core.batch_queue or ()
    return sum(scheduled.total_num_scheduled_tokens for _, scheduled, *_ in passes)


def load_module(directory: str, dtype: str) -> Any:
    """Returns transformers' model of the directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))


def changed(module: Any) -> list[tuple[str, torch.Tensor]]:
    """Returns other weights for the module, as far from its own as those are from zero."""
    noise = torch.Generator().manual_seed(1)
    return [
        (name, (tensor + tensor.float().std() * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype))
        for name, tensor in module.state_dict().items()
    ]


def adapted(directory: str, dtype: str, version: int) -> Any:
    """Returns the model as a learner has it, with adapters that are a function of `version`."""
    from core.config import LearnerConfig
    from learner.policy.lora import add_adapters, is_adapter

    module = load_module(directory, dtype)
    add_adapters(module, LearnerConfig(lora_rank=ADAPTERS.rank), seed=0)
    noise = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                drawn = NOISE * torch.randn(parameter.shape, generator=noise)
                parameter.copy_(drawn)
    return module


def adapters_alone(module: Any) -> list[tuple[str, torch.Tensor]]:
    """Returns the module's adapters as they are published."""
    from learner.policy.lora import adapters_of

    return [(weight.name, weight.value()) for weight in adapters_of(module)]


def finished(engine: Any) -> Iterator[Any]:
    """Yields what the engine generates until it has nothing to do."""
    while engine.num_unfinished:
        yield from (generation for _, generation in engine.step())
