"""What a model's config alone tells: its parts and their sizes, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core.config import ModelConfig
from core.errors import ConfigError

if TYPE_CHECKING:
    import torch


@contextmanager
def reads_config(model: ModelConfig) -> Iterator[None]:
    """Makes a ConfigError of whatever a broken config raises; an OSError, where there is none, stays one."""
    try:
        yield
    except (OSError, ConfigError):
        raise
    except Exception as error:  # noqa: BLE001 -- configs check themselves, and raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"model.path = {model.path}: no config of a model to be had: {reason[:300]}"
        ) from None


def empty_model(model: ModelConfig, *, local_files_only: bool = False) -> Any:
    """Returns the Hugging Face model on torch's meta device.

    Raises OSError where there is no config to be had, ConfigError where it is broken.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = model.trust_remote_code
    with reads_config(model), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            model.path, local_files_only=local_files_only, trust_remote_code=trust
        )
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def adapted_layers(module: Any) -> dict[str, torch.nn.Linear]:
    """Returns, by name, the layers that get a LoRA adapter: every linear layer of a Hugging Face causal LM
    except its LM head.

    Raises ConfigError when there are none.
    """
    import torch

    head = module.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    if not layers:
        raise ConfigError(
            f"learner.lora_rank: {type(module).__name__} has no linear layers (torch.nn.Linear) to adapt. "
            "Set learner.lora_rank=0."
        )
    return layers


def num_fused(module: Any) -> int:
    """Returns how many parameters of a mixture's experts lie together in one tensor.

    They are no linear layers, so that no adapter takes them.
    """
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if parameter.dim() == 3 and ".experts." in name
    )


def load_model_config(model: ModelConfig, *, local_files_only: bool = False) -> Any:
    """Returns the Hugging Face config of the model.

    Raises ConfigError where there is none to be had, or none that transformers understands.
    """
    from transformers import AutoConfig

    try:
        with reads_config(model):
            return AutoConfig.from_pretrained(
                model.path, local_files_only=local_files_only, trust_remote_code=model.trust_remote_code
            )
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path = {model.path}: no config of a model to be had: {reason}") from None


def model_class(found: Any) -> Any:
    """Returns the class that AutoModelForCausalLM makes of a Hugging Face config.

    Returns None where that is the model's own code, or where there is none.
    """
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(found), None)
    return kind[0] if isinstance(kind, tuple) else kind


def carries_state(found: Any) -> bool:
    """Returns whether some layers hand a state from token to token rather than attend: mamba, linear
    attention, convolutions.
    """
    kinds = {*(getattr(found.get_text_config(), "layer_types", None) or ())}
    return bool(
        getattr(model_class(found), "_is_stateful", False)
        or any("attention" not in kind or "linear" in kind for kind in kinds)
    )


def rope_parameters(found: Any) -> list[dict[str, Any]]:
    """Returns the rotary embeddings of a Hugging Face config: one, or one for each kind of layer."""
    parameters = getattr(found.get_text_config(), "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
