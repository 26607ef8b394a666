"""Models that the actors would compute otherwise than the learner are refused by their config, in a
sentence that says what to set.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from cluster.preparation.model_checks import check_model
from core.config import Config
from core.errors import ConfigError
from tests.support.configs import make_config

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
}
LONGROPE = {
    "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    "original_max_position_embeddings": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 32}
SUM = "data.max_prompt_tokens + actors.max_new_tokens = 40"


def config_of(
    directory: Path, kind: str, settings: dict[str, Any], longest: int, attention: str = "sdpa"
) -> Config:
    """A run with sequences of up to `longest` tokens on a model of which there is nothing but the config."""
    getattr(transformers, f"{kind}Config")(**copy.deepcopy({**SMALL, **settings})).save_pretrained(directory)
    return make_config(
        model={"path": str(directory), "attention": attention},
        data={"max_prompt_tokens": 16},
        actors={"max_new_tokens": longest - 16},
    )


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("Llama", {"quantization_config": {"quant_method": "fp8"}}, ("is quantized (fp8)",)),
    ("Gemma2", {}, ("attn_logit_softcapping = 50", "Set model.attention=eager.")),
    (
        "GptOss",
        {"num_local_experts": 4},
        ("vLLM leaves the experts of this family as they were when new weights arrive",),
    ),
    ("Bloom", {}, ("vLLM's activation is another one",)),
    ("Apertus", {}, ("activation in bfloat16", "Set model.dtype=bfloat16")),
    ("Mamba", {}, ("layers that carry a state", "Set actors.num_gpus")),
    (
        "GraniteSWA",
        {},
        ("GraniteSWAForCausalLM", "cannot attend by model.attention = sdpa", "Set model.attention=eager"),
    ),
    ("Qwen2", {**SLIDING, "max_window_layers": 1}, ("max_window_layers = 1 of 2", "vLLM refuses")),
    ("Qwen3", {**SLIDING, "max_window_layers": 1}, ("max_window_layers = 1 of 2", "vLLM refuses")),
    ("Qwen2Moe", {**SLIDING, "max_window_layers": 2}, ("vLLM gives this family no window", SUM)),
    ("Cohere2", {"sliding_window": 32}, ("sliding_window = 32", SUM, "Keep it at 32 or below.")),
    ("Phi3", LONGROPE, ("rope_type = longrope", "= 24 tokens", SUM)),
    (
        "Llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
        ("rope_type = dynamic", SUM),
    ),
]


@pytest.mark.parametrize(("kind", "settings", "words"), REFUSED)
def test_a_model_that_the_actors_would_compute_otherwise_is_refused(
    kind: str, settings: Any, words: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        check_model(config_of(tmp_path, kind, settings, longest=40))
    text = str(error.value)
    assert [word for word in words if word not in text] == []
    assert str(tmp_path) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("parallel", "settings", "words"),
    [
        (
            3,
            {},
            "num_attention_heads = 4, intermediate_size = 64, num_key_value_heads = 2. Set it to one of 2, 4, or 1",
        ),
        (8, {}, "num_attention_heads = 4. Set it to one of 2, 4, or 1"),
        (2, {"intermediate_size": 63}, "intermediate_size = 63. Set it to 1."),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 384},
            "num_key_value_heads = 6. Set it to one of 2, or 1",
        ),
    ],
)
def test_a_model_is_divided_among_gpus_evenly_or_not_at_all(
    parallel: int, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = config_of(tmp_path, "Llama", {**heads, **settings}, longest=40)
    divided = config.actors.model_copy(update={"tensor_parallel": parallel})
    with pytest.raises(ConfigError) as refused:
        check_model(config.model_copy(update={"actors": divided}))
    assert f"actors.tensor_parallel = {parallel} does not divide" in str(refused.value)
    assert words in str(refused.value)


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_a_model_that_comes_out_even_is_divided(parallel: int, tmp_path: Path) -> None:
    """With more GPUs than key-value heads vLLM repeats those."""
    config = config_of(tmp_path, "Llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, longest=40)
    divided = config.actors.model_copy(update={"tensor_parallel": parallel})
    check_model(config.model_copy(update={"actors": divided}))


@pytest.mark.parametrize(("shared", "fits"), [(1, True), (2, True), (4, False), (3, False)])
def test_rows_are_shared_by_ranks_that_divide_the_heads(shared: int, fits: bool, tmp_path: Path) -> None:
    config = config_of(tmp_path, "Llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, longest=40)
    learner = config.learner.model_copy(update={"sequence_parallel": shared})
    config = config.model_copy(update={"learner": learner})
    if fits:
        check_model(config)
        return
    with pytest.raises(ConfigError, match=r"num_key_value_heads = 2\. Set it to one of 1, 2\."):
        check_model(config)


ACCEPTED: list[tuple[str, dict[str, Any], int, str]] = [
    ("Llama", {}, 40, "sdpa"),
    ("Gemma2", {}, 40, "eager"),
    ("Gemma2", {"attn_logit_softcapping": None}, 40, "sdpa"),
    ("Cohere2", {"sliding_window": 40}, 40, "sdpa"),
    ("GraniteSWA", {}, 40, "eager"),
    ("Qwen2", {**SLIDING, "use_sliding_window": False}, 40, "sdpa"),
    ("Qwen2", {**SLIDING, "max_window_layers": 0}, 40, "sdpa"),
    ("Qwen2Moe", {**SLIDING, "max_window_layers": 2}, 32, "sdpa"),
    ("Mistral", {"sliding_window": 32}, 40, "sdpa"),
    ("Phi3", LONGROPE, 24, "sdpa"),
    (
        "Llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40},
        40,
        "sdpa",
    ),
    (
        "Llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "max_position_embeddings": 32},
        40,
        "sdpa",
    ),
    ("Gemma3Text", {"sliding_window": 16}, 40, "sdpa"),
]


@pytest.mark.parametrize(("kind", "settings", "longest", "attention"), ACCEPTED)
def test_what_both_compute_alike_is_accepted(
    kind: str, settings: Any, longest: int, attention: str, tmp_path: Path
) -> None:
    check_model(config_of(tmp_path, kind, settings, longest, attention))


def test_a_directory_without_a_config_is_told_in_one_line(tmp_path: Path) -> None:
    config = config_of(tmp_path, "Llama", {}, 40)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"^model.path = {tmp_path}: no config of a model to be had: .*"):
        check_model(config)


def test_a_model_that_continues_no_text_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "Llama", {}, 40)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    with pytest.raises(ConfigError, match=r"t5.* is no causal language model"):
        check_model(config)
