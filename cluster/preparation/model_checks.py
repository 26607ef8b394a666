"""Finds, by a model's config alone, where actors and learner would compute different functions of the same
weights.

`check_model` calls one function for each kind, each with its sentence: which field, which value, what to set.
The learner computes by transformers, the actors by vLLM. What is not known from the config is found out
later: by the learner as it starts (learner/policy/function_check.py) and on the first fresh samples
(learner/step/mismatch.py).
"""

from __future__ import annotations

from typing import Any

from core.config import Config, LearnerConfig, ModelConfig
from core.config.checks import longest_sequence
from core.errors import ConfigError
from core.model_shape import (
    carries_state,
    empty_model,
    load_model_config,
    model_class,
    num_fused,
    rope_parameters,
)


def check_model(config: Config, found: Any = None) -> None:
    """Raises ConfigError, in one sentence with a remedy, for a model that a run would train on another
    function than it samples from. `found` is its Hugging Face config; None: it is loaded.
    """
    found = found or load_model_config(config.model)
    for check in (
        _check_whole,
        _check_tied,
        _check_precision,
        _check_quantized,
        _check_attention,
        _check_windows,
        _check_rope,
        _check_divided,
        _check_shared,
    ):
        check(config, found)


def lora_notes(model: ModelConfig, learner: LearnerConfig) -> tuple[str, ...]:
    """Returns what learner.lora_rank leaves as it is in this model, to be told; nothing where all matrices
    are adapted.
    """
    if not learner.lora_rank:
        return ()
    module = empty_model(model)
    fused, total = num_fused(module), sum(parameter.numel() for parameter in module.parameters())
    if not fused:
        return ()
    return (
        f"learner.lora_rank: the experts of {type(module).__name__}, {fused / total:.0%} of its parameters, "
        "get no adapters and stay as "
        "they are: only linear layers get some. learner.lora_rank=0 trains all.",
    )


def _check_whole(config: Config, found: Any) -> None:
    """Refuses a model that continues no text, or one of which a part is trained alone while the actors serve
    the whole.
    """
    kind, stated = model_class(found), [*(getattr(found, "architectures", None) or ())]
    if kind is None and not config.model.trust_remote_code:
        raise ConfigError(
            f"{_name(config.model, found)} is no causal language model of transformers'. Give one "
            "that continues a text."
        )
    if (
        kind is not None
        and stated
        and kind.__name__ not in stated
        and stated[0].endswith("ForConditionalGeneration")
    ):
        raise ConfigError(
            f"{_name(config.model, found)} is a {stated[0]}, of which transformers would train the language model "
            f"alone ({kind.__name__}), and "
            "vLLM serve the whole. Save the language model by itself, and give that."
        )


def _check_tied(config: Config, found: Any) -> None:
    """Refuses families of which vLLM knows models with a tied LM head only."""
    text = found.get_text_config()
    if (
        text.model_type in ("cohere", "cohere2", "cohere2_moe", "gemma2", "gemma3n_text")
        and not text.tie_word_embeddings
    ):
        raise ConfigError(
            f"{_name(config.model, found)} has an LM head of its own (tie_word_embeddings = false), for which vLLM "
            "takes the embedding in this "
            "family. Give a model whose LM head is its embedding."
        )


def _check_precision(config: Config, found: Any) -> None:
    """Refuses families that vLLM computes otherwise, in float32, or on a CPU."""
    text, dtype = found.get_text_config(), config.model.dtype
    vllm_differs = {
        "bloom": "vLLM's activation is another one (GELU by erf, not by tanh)",
        "gpt_oss": "vLLM leaves the experts of this family as they were when new weights arrive",
        **dict.fromkeys(
            ("afmoe", "laguna"),
            "vLLM does not find the corrections of its router's scores when new weights arrive",
        ),
        "minimax_m2": "vLLM cannot load new weights into a running model of this family",
        "phimoe": "transformers' router draws experts at random in training, and without that it is another "
        "than vLLM's",
        "hrm_text": "vLLM computes other log-probs than transformers for this family",
    }
    if text.model_type in vllm_differs:
        raise ConfigError(
            f"{_name(config.model, found)}: {vllm_differs[text.model_type]}. Give another model."
        )
    if text.model_type == "apertus" and dtype == "float32":
        raise ConfigError(
            f"{_name(config.model, found)}: vLLM keeps the parameters of this family's activation in bfloat16. Set "
            "model.dtype=bfloat16."
        )
    if config.actors.num_gpus == 0 and "indexed_attention" in (getattr(text, "layer_types", None) or ()):
        raise ConfigError(
            f"{_name(config.model, found)} attends to tokens that it chooses (indexed_attention), which vLLM does "
            "on a GPU only. "
            "Set actors.num_gpus, or give another model."
        )
    if config.actors.num_gpus or not carries_state(found) or text.model_type == "falcon_h1":
        return
    if not text.model_type.startswith(("qwen3_next", "qwen3_5")):
        raise ConfigError(
            f"{_name(config.model, found)} has layers that carry a state, which vLLM computes on a GPU only in "
            "this family. "
            "Set actors.num_gpus, or give a model that attends."
        )
    if dtype != "bfloat16":
        raise ConfigError(
            f"{_name(config.model, found)} has layers of linear attention, which vLLM computes in bfloat16 alone "
            "on a CPU. "
            "Set model.dtype=bfloat16, or actors.num_gpus."
        )


def _name(model: ModelConfig, found: Any) -> str:
    return f"model.path = {model.path} ({found.model_type})"


def _check_quantized(config: Config, found: Any) -> None:
    quantization = getattr(found, "quantization_config", None) or getattr(
        found.get_text_config(), "quantization_config", None
    )
    if not quantization:
        return
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", None)
    )
    raise ConfigError(
        f"{_name(config.model, found)} is quantized ({method or 'quantization_config'}): the learner trains "
        "weights of model.dtype, the actors "
        "would round them. Give the model in float32, bfloat16 or float16, such as the one it was made of."
    )


def _check_attention(config: Config, found: Any) -> None:
    """Refuses what PyTorch's fused attention leaves out in silence, and classes that have none."""
    attention = config.model.attention
    if attention == "eager":
        return
    cap = getattr(found.get_text_config(), "attn_logit_softcapping", None)
    if cap and attention == "sdpa":
        raise ConfigError(
            f"{_name(config.model, found)} caps its attention (attn_logit_softcapping = {cap:g}), which "
            "model.attention = sdpa leaves out. "
            "Set model.attention=eager."
        )
    kind = model_class(found)
    if kind is not None and not getattr(
        kind, {"sdpa": "_supports_sdpa"}.get(attention, "_supports_flash_attn"), True
    ):
        raise ConfigError(
            f"{_name(config.model, found)}: {kind.__name__} of transformers cannot attend by model.attention = "
            f"{attention}. "
            "Set model.attention=eager; if the learner then says that packed sequences see each other, "
            "learner.layout=padded too."
        )


def _check_windows(config: Config, found: Any) -> None:
    """Refuses sliding windows of which vLLM makes something else than transformers does, or nothing."""
    text, longest = found.get_text_config(), config.max_sequence_tokens
    window = getattr(text, "sliding_window", None)
    layers = [*(getattr(text, "layer_types", None) or ())]
    if not window or "sliding_attention" not in layers:
        return
    if text.model_type in ("qwen2", "qwen3") and len({*layers}) > 1 and text.max_window_layers != len(layers):
        raise ConfigError(
            f"{_name(config.model, found)} has a sliding window of {window} tokens in some of its layers "
            "(max_window_layers = "
            f"{text.max_window_layers} of {len(layers)}), which vLLM refuses for this family. Set "
            "use_sliding_window to false in its "
            "config.json, which makes it another function, or give another model."
        )
    vllm_differs = {
        "qwen2_moe": "vLLM gives this family no window",
        "cohere2": "vLLM's windows hold one token more than transformers'",
        "cohere2_moe": "vLLM's windows hold one token more than transformers'",
    }
    if longest > window and text.model_type in vllm_differs:
        raise ConfigError(
            f"{_name(config.model, found)}: {vllm_differs[text.model_type]} (sliding_window = {window}), and "
            f"{longest_sequence(config)} = {longest}. Keep it at {window} or below."
        )


def _check_rope(config: Config, found: Any) -> None:
    """Refuses frequencies that change with the length: transformers looks at a micro-batch's longest
    sequence, vLLM at none.
    """
    longest = config.max_sequence_tokens
    for rope in rope_parameters(found):
        kind = rope.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        field = "max_position_embeddings" if kind == "dynamic" else "original_max_position_embeddings"
        limit = rope.get(field) or getattr(found.get_text_config(), field, None)
        if limit and longest > limit:
            raise ConfigError(
                f"{_name(config.model, found)} has rope_type = {kind}: beyond {field} = {limit} tokens its "
                "frequencies depend on what else is in "
                f"a micro-batch, and {longest_sequence(config)} = {longest}. Keep "
                f"it at {limit} or below."
            )


def _check_divided(config: Config, found: Any) -> None:
    """Refuses to divide a model whose heads or MLP do not come out even: vLLM divides both."""
    parallel, text = config.actors.tensor_parallel, found.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    sizes = {
        "num_attention_heads": heads,
        "intermediate_size": getattr(text, "intermediate_size", None),
        "moe_intermediate_size": getattr(text, "moe_intermediate_size", None),
    }
    odd = {name: size for name, size in sizes.items() if isinstance(size, int) and size % parallel}
    if kv_heads % parallel and parallel % kv_heads:  # Fewer than GPUs are repeated.
        odd["num_key_value_heads"] = kv_heads
    if not odd:
        return
    fits = [
        number for number in range(2, heads + 1) if not any(size % number for size in sizes.values() if size)
    ]
    fits = [number for number in fits if not (kv_heads % number and number % kv_heads)]
    remedy = f"one of {', '.join(map(str, fits))}, or 1" if fits else "1"
    raise ConfigError(
        f"actors.tensor_parallel = {parallel} does not divide {_name(config.model, found)}: "
        f"{', '.join(f'{name} = {size}' for name, size in odd.items())}. Set it to {remedy}."
    )


def _check_shared(config: Config, found: Any) -> None:
    """Refuses to share rows among ranks where the heads do not come out even: in attention each has some."""
    shared, text = config.learner.sequence_parallel, found.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % shared == 0 and kv_heads % shared == 0:
        return
    fits = [number for number in range(1, kv_heads + 1) if not heads % number and not kv_heads % number]
    raise ConfigError(
        f"learner.sequence_parallel = {shared} does not divide the heads of {_name(config.model, found)}: "
        f"num_attention_heads = {heads}, num_key_value_heads = {kv_heads}. Set it to one of {', '.join(map(str, fits))}."
    )
