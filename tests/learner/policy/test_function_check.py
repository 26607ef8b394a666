"""A model against itself before training: packed, alone, in training, ahead of time, and by its eager
attention. Real tiny models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from core.errors import ConfigError
from learner.policy.function_check import WINDOW, check_function
from learner.step.packing import TokenLogprobs, TokenSequence, collate
from tests.support.learning.rollouts import VOCABULARY, tiny_llama


def as_learner(model: Any, layout: Any, attention: str) -> Callable[..., torch.Tensor]:
    """What the learner makes of a model, before any rank: `check_function`'s first argument."""
    from learner.policy.zero import _still

    _still(model)
    forward = TokenLogprobs(model, layout, attention)

    def logprobs(inputs, *, training):
        with torch.no_grad():
            return forward(model.train(training), inputs, 1.0)

    return logprobs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_keeps_packed_sequences_apart_passes(attention):
    model = tiny_llama(torch.float32)
    model.set_attn_implementation(attention)
    check_function(as_learner(model, "packed", attention), model, "packed")


def made(kind: str, **settings: Any) -> Any:
    """A tiny random model, its weights large enough to show what it attends to."""
    small = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "init_std": 0.3,
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**small, **settings))


def test_a_model_whose_own_mask_lets_packed_sequences_see_each_other_is_found_out():
    model = made("OPTConfig", ffn_dim=32, word_embed_proj_dim=16, attn_implementation="eager")
    with pytest.raises(
        ConfigError,
        match=r"other log-probs behind another one than alone, by .* Use "
        r"learner\.layout = padded",
    ):
        check_function(as_learner(model, "packed", "eager"), model, "packed")
    check_function(as_learner(model, "padded", "eager"), model, "padded")


def test_dropout_under_whatever_name_is_turned_off_and_what_is_left_is_found_out():
    model = made("OPTConfig", ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5)
    logprobs = as_learner(model, "padded", "sdpa")
    check_function(logprobs, model, "padded")
    model.model.decoder.layers[0].dropout = 0.5
    with pytest.raises(ConfigError, match="in training than in evaluation"):
        check_function(logprobs, model, "padded")


# --- windows, caps, and what looks ahead ---

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "of all layers": ("Mistral", {}),
    "without types of layers": ("Phi3", {}),
    "of the layers after the second": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "of no layer": ("Qwen2", {"use_sliding_window": False}),
    "alternating": ("Gemma3Text", {"layer_types": ALTERNATING, "query_pre_attn_scalar": 32, "head_dim": 32}),
    "with layers without positions": ("Cohere2", {"layer_types": ALTERNATING}),
    "handed down by some layers only": ("Exaone4", {"layer_types": ALTERNATING}),
    "known to the mask only": (
        "Qwen2Moe",
        {
            "use_sliding_window": True,
            "max_window_layers": 4,
            "shared_expert_intermediate_size": 32,
            **MIXTURE,
        },
    ),
}


def sharp(kind: str, attention: str, **settings: Any) -> Any:
    """A tiny model whose attention shows in its log-probs."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **copy.deepcopy({**SMALL, "sliding_window": 16, **settings})
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    return model


@torch.no_grad()
def by_definition(model: Any, sequence: TokenSequence) -> torch.Tensor:
    ids = torch.from_numpy(sequence.tokens)[None]
    first = int(sequence.is_sampled.argmax())
    logits = model.eval()(ids).logits[0, first - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, first:, None])[:, 0]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("which", WINDOWS)
def test_windows_shorter_than_the_sequences_are_kept_in_training_and_evaluation(
    which: str, layout: Any
) -> None:
    kind, settings = WINDOWS[which]
    sequences = [
        TokenSequence.of_turn(
            [3 + (i * i + n) % 12 for i in range(n)], [3 + i * n % 13 for i in range(40 - n)]
        )
        for n in (3, 9, 30)
    ]
    expected = torch.cat(
        [by_definition(sharp(kind, "eager", **settings), sequence) for sequence in sequences]
    )
    model = sharp(kind, "sdpa", **settings)
    logprobs = as_learner(model, layout, "sdpa")
    check_function(logprobs, model, layout)
    for training in (False, True):
        found = logprobs(collate(sequences, layout, 0), training=training)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_windows_matter_so_that_keeping_them_means_something() -> None:
    for kind, settings in WINDOWS.values():
        wide, narrow = (
            by_definition(
                sharp(kind, "eager", **settings, sliding_window=w),
                TokenSequence.of_turn([3], [*range(3, 43)]),
            )
            for w in (99, 16)
        )
        assert (wide - narrow).abs().mean() > 0.01 or settings.get("use_sliding_window") is False


def test_a_window_that_an_attention_forgets_is_found_out_by_a_few_tokens() -> None:
    model = sharp("Mistral", "sdpa")
    logprobs = as_learner(model, "packed", "sdpa")
    forgetful = model.config.get_text_config()

    def without(inputs: Any, *, training: bool) -> torch.Tensor:
        """The packed way with a window too wide, the eager one as it is."""
        before = forgetful.sliding_window
        forgetful.sliding_window = before if forgetful._attn_implementation == "eager" else 10**6
        try:
            return logprobs(inputs, training=training)
        finally:
            forgetful.sliding_window = before

    with pytest.raises(
        ConfigError,
        match=r"other log-probs than by its eager attention, .* Set "
        r"model\.attention=eager",
    ):
        check_function(without, model, "packed")
    check_function(without, model, "packed", longest=WINDOW * 4)
    assert forgetful.sliding_window == 16
    assert forgetful._attn_implementation == "packed_sdpa"


def test_a_capped_attention_is_refused_packed_with_a_remedy_that_keeps_the_cap() -> None:
    model = sharp("Gemma2", "sdpa", query_pre_attn_scalar=32, head_dim=32)
    with pytest.raises(
        ConfigError,
        match=r"has a softcap in its attention, which model\.attention = sdpa leaves out.* Set "
        r"model\.attention=eager",
    ):
        check_function(as_learner(model, "packed", "sdpa"), model, "packed")
    model = sharp("Gemma2", "eager", query_pre_attn_scalar=32, head_dim=32)
    check_function(as_learner(model, "packed", "eager"), model, "packed")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_model_that_looks_ahead_is_found_out(layout: Any) -> None:
    model = sharp("Bert", "sdpa", is_decoder=False)
    with pytest.raises(
        ConfigError,
        match=r"BertLMHeadModel gives tokens other log-probs once others follow, "
        r".* looks ahead",
    ):
        check_function(as_learner(model, layout, "eager"), model, layout)
