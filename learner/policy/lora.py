"""Low-rank adapters (LoRA, arXiv 2106.09685; by peft) instead of all weights: what is trained, and the
weights that come of it.

    y = W x + (alpha / rank) B A x        W [out, in] frozen; A [rank, in] random, B [out, rank] zero at first

so that version 0 is the base.

Every linear layer but the LM head gets an adapter. Outside the learner nobody knows of them: actors,
snapshots and exports get merged weights, W + (alpha / rank) B A, under the names that the base model has;
only with `weights.transport` = adapters the actors get A and B, by peft's names, and vLLM adds
(alpha / rank) B A x as the learner does. The reference is the policy with its adapters off.

Off means scaled by 0, not skipped: ZeRO-3 learns the order in which submodules run, and would start anew each
time it changes.

A merged weight is rounded to the model's dtype. In bfloat16 this loses what is small beside W, so that what
actors sample from is further from the learner's policy than with all weights trained; the behaviour
log-probs, which are those of the actors, say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.config import LORA_ALPHA, LearnerConfig
from core.model_shape import adapted_layers

ADAPTER = "default"
_OF_BASE = ".base_layer."
_PEFT_PREFIX = "base_model.model."
_A, _B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(module: Any, learner: LearnerConfig, seed: int) -> None:
    """Freezes the module and puts trainable adapters into it, in its dtype; A is a function of `seed`. Not
    collective.

    It works on parameters that ZeRO-3 has partitioned already, since it needs none of their values.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(adapted_layers(module))
    config = LoraConfig(r=learner.lora_rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, module, ADAPTER)
    for parameter in module.parameters():
        if parameter.requires_grad:
            # peft makes float32 of bfloat16, which ZeRO-3 does not mix.
            parameter.data = parameter.data.to(module.dtype)


@contextlib.contextmanager
def adapters_off(module: Any) -> Iterator[None]:
    """Lets the module compute what its base computes, for the time of the block."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    try:
        for layer in layers:
            layer.set_scale(ADAPTER, 0.0)
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


class Weight(NamedTuple):
    """A weight as others see it: a parameter under its name in the base model, with the adapter that is to be
    added to it.

    A persistent buffer is one, too, without adapter. `adapter` holds the parameters A and B, `scale` is alpha
    / rank.
    """

    name: str
    parameter: Any
    adapter: tuple[Any, Any] | None = None
    """The parameters A and B."""
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole shape, also of a parameter that ZeRO-3 has partitioned."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))

    @property
    def parameters(self) -> tuple[Any, ...]:
        """The parameters that must be gathered before `value`; none for a buffer, which ZeRO-3
        leaves whole.
        """
        return (
            (self.parameter, *(self.adapter or ())) if isinstance(self.parameter, torch.nn.Parameter) else ()
        )

    def value(self) -> Tensor:
        """Returns the parameter's own tensor, or a new one where an adapter is added."""
        if self.adapter is None:
            return self.parameter.data
        a, b = self.adapter
        return merged(self.parameter.data, a.data, b.data, self.scale)


def adapters_of(module: Any) -> Iterator[Weight]:
    """Yields the adapters alone, as weights by the names that peft's files have."""
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            yield Weight(_PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."), parameter)


def name_in_memory(name: str) -> str:
    """Returns the name that an adapter's parameter has in the module, of the one that peft's files have."""
    return f"{name.removeprefix(_PEFT_PREFIX).removesuffix('.weight')}.{ADAPTER}.weight"


def weights_of(module: Any) -> Iterator[Weight]:
    """Yields all weights of a module by the names of the base model: parameters, tied ones once, then
    buffers.

    The module may have adapters: they are part of the weights that they belong to.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(f"{_OF_BASE}weight")
        if layer == name:
            yield Weight(name.replace(_OF_BASE, "."), parameter)
        else:
            scale = module.get_submodule(layer).scaling[ADAPTER]
            yield Weight(
                f"{layer}.weight", parameter, (parameters[layer + _A], parameters[layer + _B]), scale
            )
    yield from (Weight(name.replace(_OF_BASE, "."), buffer) for name, buffer in persistent_buffers(module))


def persistent_buffers(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, buffer) of what belongs to the module's state without being trained, such as a router's
    correction of its scores.
    """
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), buffer


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns a new tensor, weight [out, in] + scale b [out, rank] a [rank, in], taken in float32, rounded to
    the weight's dtype.
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def is_adapter(name: str) -> bool:
    """Says whether a parameter of this name is part of an adapter."""
    return name.endswith((_A, _B))


def adapters_by_weight(names: list[str]) -> dict[str, tuple[str, str]]:
    """Maps the name of each adapted weight of the base to the names of its A and B, found among `names` of
    parameters.
    """
    layers = [name.removesuffix(_A) for name in names if name.endswith(_A)]
    return {f"{layer}.weight": (layer + _A, layer + _B) for layer in layers}
