"""Tiny random models of the families that transformers and vLLM share, with the quickstart's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from recipes.arithmetic import make_tokenizer

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "use_routing_bias": True}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_ARCHITECTURES = {"phimoe": "PhiMoEForCausalLM"}
"""As the files on the hub have it, where transformers writes another name."""
_FEW_LOCAL = {"num_local_experts": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_dense_layers": 1,
        "sliding_window": 8,
    },
    "apertus": {},
    "arcee": {},
    "bloom": {"tie_word_embeddings": True},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
    },
    "cwm": {"bos_token_id": 2},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_SIGMOID, **_LATENT},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": _SLIDING,
    "exaone_moe": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "is_moe_layer": [False, True],
    },
    "falcon": {"multi_query": True, "num_kv_heads": 1, "tie_word_embeddings": True},
    "flex_olmo": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {**_SLIDING, "tie_word_embeddings": True, "query_pre_attn_scalar": 32},
    "gemma3_text": {**_SLIDING, "tie_word_embeddings": True, "query_pre_attn_scalar": 32},
    "gemma4_text": {
        **_SLIDING,
        "sliding_window": 64,
        "num_experts": None,
        "moe_intermediate_size": None,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 15,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"head_dim": 32, **_ROUTED, **_SIGMOID},
    "glm4_moe_lite": {**_ROUTED, **_SIGMOID, **_LATENT},
    "gpt2": {},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neox": {},
    "gpt_oss": {**_FEW_LOCAL, **_SLIDING},
    "gptj": {"rotary_dim": 16},
    "granite": {},
    "granite_swa": _SLIDING,
    "granitemoe": _FEW_LOCAL,
    "granitemoe_swa": {**_FEW_LOCAL, **_SLIDING},
    "granitemoeshared": {**_FEW_LOCAL, "shared_intermediate_size": 64},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hyperclovax": {},
    "jais2": {},
    "laguna": {},
    "llama": {},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention", "full_attention"],
    },
    "mellum": {},
    "minicpm3": _LATENT,
    "minimax_m2": {**_FEW_LOCAL, "rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "ministral3": {},
    "mistral": {"sliding_window": 8},
    "mixtral": _FEW_LOCAL,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {"sliding_window": 8},
    "phimoe": {**_FEW_LOCAL, "attention_bias": True, "lm_head_bias": True},
    "qwen2": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 8},
    "vaultgemma": {**_SLIDING, "query_pre_attn_scalar": 32},
    # Layers that carry a state, or look at chosen tokens only.
    "deepseek_v32": {**_ROUTED, **_SIGMOID, **_LATENT},
    "falcon_h1": {},
    "falcon_mamba": {},
    "jamba": {},
    "lfm2": {"conv_dim": 64, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"conv_dim": 64, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {},
    "olmo_hybrid": {},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}
"""By transformers' model_type: what differs from `_COMMON`, of which a family gets what it knows."""

NOT_TRIED = (
    *(
        "axk1",
        "cohere2_moe",
        "dbrx",
        "deepseek_v4",
        "gemma3",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_unified",
        "glm_moe_dsa",
        "gpt-sw3",
    ),
    *(
        "granitemoehybrid",
        "hy_v3",
        "hy_v4",
        "inkling_text",
        "kimi_linear",
        "llama4",
        "longcat_flash",
        "mamba2",
        "mimo_v2_flash",
        "nemotron_h",
    ),
    *("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text", "zamba2"),
)
"""Shared families of which no tiny model is made here: parts of larger models, or layers that make tiny
ones large or slow.
"""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "cohere untied": ("cohere", {"tie_word_embeddings": False}),
    "llama padded vocabulary": ("llama", {"vocab_size": 64}),
    "llama one key-value head": ("llama", {"num_key_value_heads": 1}),
    "qwen2 window in the upper layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma2 no softcap": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0}),
    "llama rope linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama rope dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama rope yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama rope llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "phi3 rope longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * index for index in range(16)],
                "long_factor": [2.0 + 0.1 * index for index in range(16)],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "deepseek_v3 rope yarn": (
        "deepseek_v3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "stablelm partial rotary": ("stablelm", {"partial_rotary_factor": 0.5}),
}
"""What else differs within a family: name -> (family, changes)."""


def config_of(name: str) -> Any:
    """The Hugging Face config of that family, or of that variant of one."""
    from transformers import AutoConfig

    family, changes = VARIANTS.get(name, (name, {}))
    default = AutoConfig.for_model(family)
    known = {*default.to_dict(), *type(default).attribute_map, "num_key_value_heads"}
    common = {key: value for key, value in _COMMON.items() if key in known}
    return AutoConfig.for_model(
        family, **{**common, "vocab_size": len(make_tokenizer()), **FAMILIES[family], **changes}
    )


def make_family(name: str, directory: Path) -> Path:
    """Write the tiny model of that family or variant, random in its persistent buffers too, with a
    tokenizer; the directory.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name))
        stir(model, 0.05)
    model.save_pretrained(directory)
    if name in _ARCHITECTURES:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(
            json.dumps({**config, "architectures": [_ARCHITECTURES[name]]}), encoding="utf-8"
        )
    make_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def stir(model: Any, scale: float) -> None:
    """Change all parameters and all persistent floating-point buffers, by random numbers of about `scale`."""
    from learner.policy.lora import persistent_buffers

    for parameter in model.parameters():
        parameter += scale * torch.randn_like(parameter)
    for _, buffer in persistent_buffers(model):
        if buffer.is_floating_point():
            buffer += scale * torch.rand_like(buffer)
