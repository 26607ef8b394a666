"""What a model's config alone tells against a run: where actors and learner would compute different functions of the same weights.

    check_model(config)     one function for each kind, each with its sentence: which field, which value, what to set

The learner computes by transformers, the actors by vLLM. What is not known from the config is found out later: by the learner as it starts
(learner/function_check.py) and on the first fresh samples (learner/mismatch.py).
"""

from __future__ import annotations

from typing import Any

from cluster.config import Config, ModelConfig
from cluster.errors import ConfigError
from cluster.model_shape import rope_parameters


def load_model_config(model: ModelConfig) -> Any:
    """The Hugging Face config of the model. Raises ConfigError where there is none to be had, or none that transformers understands."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # noqa: BLE001 -- configs are checked by their own classes, which raise whatever they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path = {model.path}: no config of a model to be had: {reason}") from None


def check_model(config: Config) -> None:
    """Raises ConfigError, in one sentence with a remedy, for a model that this run would train on another function than it samples from."""
    found = load_model_config(config.model)
    for check in (_check_quantized, _check_attention, _check_windows, _check_rope):
        check(config, found)


def _name(config: Config, found: Any) -> str:
    return f"model.path = {config.model.path} ({found.model_type})"


def _check_quantized(config: Config, found: Any) -> None:
    quantization = getattr(found, "quantization_config", None) or getattr(found.get_text_config(), "quantization_config", None)
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", None)
    raise ConfigError(
        f"{_name(config, found)} is quantized ({method or 'quantization_config'}): the learner trains weights of model.dtype, the actors "
        "would round them. Give the model in float32, bfloat16 or float16, such as the one it was made of."
    )


def _check_attention(config: Config, found: Any) -> None:
    """What PyTorch's fused attention leaves out in silence."""
    text = found.get_text_config()
    if config.model.attention != "sdpa":
        return
    if cap := getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(
            f"{_name(config, found)} caps its attention (attn_logit_softcapping = {cap:g}), which model.attention = sdpa leaves out. "
            "Set model.attention=eager."
        )


def _check_windows(config: Config, found: Any) -> None:
    text = found.get_text_config()
    window, longest = getattr(text, "sliding_window", None), config.max_sequence_tokens
    if not window or longest <= window:
        return
    if found.model_type == "cohere2":
        raise ConfigError(
            f"{_name(config, found)}: vLLM's layers with a window see one token more than transformers' (sliding_window = {window}), "
            f"and data.max_prompt_tokens + actors.max_new_tokens = {longest}. Keep the sum at {window} or below."
        )


def _check_rope(config: Config, found: Any) -> None:
    """Frequencies that change with the length: transformers looks at the longest sequence of a micro-batch, vLLM at none."""
    longest = config.max_sequence_tokens
    for rope in rope_parameters(found):
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        field = "max_position_embeddings" if kind == "dynamic" else "original_max_position_embeddings"
        limit = rope.get(field) or getattr(found.get_text_config(), field, None)
        if limit and longest > limit:
            raise ConfigError(
                f"{_name(config, found)} has rope_type = {kind}: beyond {field} = {limit} tokens its frequencies depend on what else is in "
                f"a micro-batch, and data.max_prompt_tokens + actors.max_new_tokens = {longest}. Keep the sum at {limit} or below."
            )
