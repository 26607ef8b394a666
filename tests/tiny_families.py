"""Tiny random models of many families, with the quickstart's tokenizer: what the tests of families make and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recipes.arithmetic import make_tokenizer

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_LOCAL_EXPERTS, "head_dim": 32},
    "qwen3_moe": {**_EXPERTS, "head_dim": 32},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT},
    "gemma4_text": {
        "head_dim": 32,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 15,
        "sliding_window": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    },
}
"""By transformers' model_type: what differs from `_COMMON`."""


def make_family(name: str, directory: Path, **changes: Any) -> Path:
    """Write the tiny model of that family, random in its persistent buffers too, with a tokenizer; the directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**_COMMON, "vocab_size": len(tokenizer), **FAMILIES[name], **changes})
        model = AutoModelForCausalLM.from_config(config)
        stir(model, 0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def stir(model: Any, scale: float) -> None:
    """Change all parameters and all persistent floating-point buffers, by random numbers of about `scale`."""
    from learner.lora import persistent_buffers

    for parameter in model.parameters():
        parameter += scale * torch.randn_like(parameter)
    for _, buffer in persistent_buffers(model):
        if buffer.is_floating_point():
            buffer += scale * torch.rand_like(buffer)
