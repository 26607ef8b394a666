"""Attention within packed sequences, as the learner runs it: without a mask, in buckets of sequences of
like length. A real tiny Llama.
"""

import re

import numpy as np
import pytest
import torch
import transformers

from core.errors import ConfigError
from learner.policy.attention import PACKED_SDPA, install_packed_sdpa
from learner.policy.buckets import Buckets
from learner.step.packing import TokenLogprobs, TokenSequence, collate
from tests.support.learning.rollouts import (
    TEMPERATURE,
    VOCABULARY,
    assert_same_gradient,
    flat,
    make_rollouts,
    plain_logprobs,
    tiny_llama,
    with_other_prompt,
)


def packed_by_bucket(**kwargs):
    """A model, and the way through it that the learner takes: no mask, buckets of sequences of like
    length.
    """
    model = tiny_llama(**kwargs)
    forward = TokenLogprobs(model, "packed", "sdpa")
    assert model.config._attn_implementation == PACKED_SDPA
    return model, forward


@pytest.fixture
def small_buckets(monkeypatch):
    """Several buckets, padded ones among them, also for short sequences."""
    monkeypatch.setattr("learner.policy.buckets.SHORT", 4)


@pytest.mark.parametrize("shares_beginnings", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_attention_gives_the_log_probs_and_gradients_of_each_sequence_alone(
    small_buckets, tied, checkpointing, shares_beginnings
):
    rollouts = make_rollouts()
    first = rollouts.sequences[0]
    begins_alike = first._replace(tokens=np.append(first.tokens[:-1], (first.tokens[-1] + 1) % 7))
    sequences = [*rollouts.sequences, first, begins_alike]
    plain = tiny_llama(tied=tied)
    expected = torch.cat([plain_logprobs(plain, sequence) for sequence in sequences])
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (expected * weights).sum().backward()
    model, forward = packed_by_bucket(tied=tied)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = collate(sequences, "packed", pad_id=0, shares_beginnings=shares_beginnings)
    found = forward(model, inputs, TEMPERATURE)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    exact = flat([parameter.grad for parameter in plain.parameters()])
    assert_same_gradient(flat([parameter.grad for parameter in model.parameters()]), exact)


def test_packed_attention_is_exact_to_1e_5_in_float32(small_buckets):
    rollouts = make_rollouts()
    model, forward = packed_by_bucket(dtype=torch.float32)
    expected = torch.cat(
        [plain_logprobs(tiny_llama(torch.float32), sequence) for sequence in rollouts.sequences]
    )
    torch.testing.assert_close(
        forward(model, collate(rollouts.sequences, "packed", pad_id=0), TEMPERATURE),
        expected,
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("changed", range(5))
def test_packed_attention_lets_no_sequence_see_another(small_buckets, changed):
    model, forward = packed_by_bucket(dtype=torch.float32)
    sequences = make_rollouts().sequences[3:8]
    other = sequences[changed]
    replaced = [*sequences]
    replaced[changed] = with_other_prompt(other)
    before, after = (forward(model, collate(case, "packed", pad_id=0), 1.0) for case in (sequences, replaced))
    others = collate(sequences, "packed", pad_id=0).sequence_T != changed
    assert torch.equal(before[others], after[others])
    if other.is_sampled.any():
        assert (before[~others] - after[~others]).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(10))
def test_buckets_hold_every_token_once_and_are_little_padded(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 1000, (40,), generator=random).tolist()
    places = Buckets(lengths)
    rows = torch.randn(sum(lengths), 2, 3, generator=random, dtype=torch.float64, requires_grad=True)
    buckets = places.unpack(rows)
    assert sum(bucket.shape[0] for bucket in buckets) == 40
    assert (
        sum(bucket.shape[0] * bucket.shape[2] for bucket in buckets if bucket.shape[2] > 64)
        <= sum(lengths) / 0.8
    )
    assert len(buckets) < 15
    packed = places.pack([bucket.transpose(1, 2) for bucket in buckets])
    assert torch.equal(packed, rows)
    weights = torch.randn(rows.shape, generator=random, dtype=torch.float64)
    (packed * weights).sum().backward()
    assert torch.equal(rows.grad, weights)


def test_a_sequence_whose_tokens_all_belong_to_others_takes_no_place():
    tokens = np.array([0, 1, 2, 0, 1, 0, 1, 3, 0, 1, 2, 4])
    places = Buckets([3, 2, 3, 3, 1], tokens=tokens)
    assert places.shapes == [(3, 3)]
    assert places.to_places_P.tolist() == [0, 1, 2, 0, 1, 3, 4, 4, 4]
    rows = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    packed = places.pack([bucket.transpose(1, 2) for bucket in places.unpack(rows)])
    assert torch.equal(packed, rows)
    packed.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("MambaConfig", {}, "carries a state from one token to the next"),
        ("BloomConfig", {}, "takes no position ids"),
        ("Lfm2Config", {"layer_types": ["conv"]}, "has layers of conv"),
        ("FalconConfig", {}, "does not let its attention be exchanged (model.attention = sdpa)"),
    ],
)
def test_a_model_whose_packed_sequences_would_see_each_other_is_refused(kind, settings, reason):
    config = getattr(transformers, kind)(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **settings
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=rf"{re.escape(reason)}: .* Use learner\.layout = padded\."):
        TokenLogprobs(model, "packed", "sdpa")
    assert TokenLogprobs(model, "padded", "sdpa") is not None


def test_a_model_that_cannot_attend_within_packed_sequences_is_refused_or_keeps_its_masks():
    model = tiny_llama()
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert not install_packed_sdpa(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(
        ConfigError, match="has layers of chunked_attention: packed sequences would see each other"
    ):
        TokenLogprobs(model, "packed", "sdpa")
    model, _ = packed_by_bucket()
    with pytest.raises(ConfigError, match=r"LlamaAttention cannot be trained with learner\.layout = packed"):
        model(**collate([TokenSequence.of_turn([1], [2])], "packed", 0).model_kwargs())
