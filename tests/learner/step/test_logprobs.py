"""Log-probs without the logits: the full computation's values and gradients, in memory that does not
grow with tokens x vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.errors import ConfigError
from learner.step.logprobs import LogprobHead, install_logprob_head, linear_logprobs, selective_log_softmax
from learner.step.packing import TokenLogprobs, TokenSequence, collate, token_logprobs

VOCABULARY = 97
TEMPERATURE = 0.7


def head_inputs(
    dtype: torch.dtype, tokens: int = 211, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias, targets, and a coefficient for each token."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(vocabulary, (tokens,), generator=random)
    coefficients = torch.randn(tokens, generator=random, dtype=torch.float64)
    return normal(tokens, 24), normal(vocabulary, 24), normal(vocabulary), targets, coefficients


def whole(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(
        (found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm()
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk_tokens", [1, 37, 1000])
@pytest.mark.parametrize("kept_tokens", [0, 100, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_log_probs_are_the_full_ones_in_value_and_gradient(
    dtype: torch.dtype, tolerance: float, chunk_tokens: int, kept_tokens: int, with_bias: bool
) -> None:
    hidden, weight, bias, targets, coefficients = head_inputs(dtype)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    row_bytes = VOCABULARY * dtype.itemsize
    bytes_of = {"chunk_bytes": chunk_tokens * row_bytes, "kept_bytes": kept_tokens * row_bytes}
    found = linear_logprobs(hidden, weight, targets, TEMPERATURE, bias if with_bias else None, **bytes_of)
    expected = whole(hidden, weight, bias if with_bias else None, targets)
    assert found.dtype == dtype
    assert distance(found, expected) < tolerance
    gradients = zip(
        torch.autograd.grad((found * coefficients).sum(), leaves),
        torch.autograd.grad((expected * coefficients).sum(), leaves),
        strict=True,
    )
    assert all(distance(mine, full) < tolerance for mine, full in gradients)


def test_bfloat16_weights_give_float32_log_probs_and_sums_of_gradients() -> None:
    hidden, weight, bias, targets, coefficients = head_inputs(torch.bfloat16, tokens=4000)
    found = linear_logprobs(
        hidden, weight, targets, TEMPERATURE, bias, chunk_bytes=50 * VOCABULARY * 4, kept_bytes=0
    )
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad((found * coefficients).sum(), (hidden, weight, bias))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = whole(*wide, targets)
    # A logit of 20 is rounded by 0.06 in bfloat16, by the matrix product itself.
    assert (found - expected).abs().max() < 0.3
    for mine, full in zip(gradients, torch.autograd.grad((expected * coefficients).sum(), wide), strict=True):
        assert mine.dtype == torch.bfloat16
        assert distance(mine, full) < 0.02


def test_a_frozen_head_and_frozen_hidden_states_get_no_gradient() -> None:
    hidden, weight, _, targets, _ = head_inputs(torch.float32)
    linear_logprobs(hidden, weight.detach(), targets, 1.0).sum().backward()
    assert hidden.grad is not None
    linear_logprobs(hidden.detach(), weight, targets, 1.0).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets, 1.0).requires_grad


def test_no_token_gives_no_log_prob_and_a_zero_gradient() -> None:
    hidden, weight, _, targets, _ = head_inputs(torch.float32)
    found = linear_logprobs(hidden[:0], weight, targets[:0], 1.0)
    assert found.shape == (0,)
    found.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, _, targets, _ = head_inputs(torch.float32)
    with pytest.raises(ConfigError, match=r"temperature is 0\.0"):
        linear_logprobs(hidden, weight, targets, 0.0)
    with pytest.raises(
        ValueError,
        match=r"hidden \(211, 24\), weight \(97, 24\), targets \(210,\) do not "
        r"fit",
    ):
        linear_logprobs(hidden, weight, targets[1:], 1.0)


class LivePeak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made within; forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def peak_bytes(tokens: int, vocabulary: int, *, chunked: bool) -> int:
    """Forward and backward, beyond hidden states, head and their gradients."""
    hidden, weight, bias, targets, _ = head_inputs(torch.float32, tokens, vocabulary)
    with LivePeak() as memory:
        if chunked:
            linear_logprobs(
                hidden, weight, targets, TEMPERATURE, bias, chunk_bytes=1 << 18, kept_bytes=1 << 18
            ).sum().backward()
        else:
            whole(hidden, weight, bias, targets).sum().backward()
    return memory.peak - (hidden.nbytes + weight.nbytes)


def test_the_peak_of_chunked_log_probs_does_not_grow_with_tokens_times_vocabulary() -> None:
    sizes = [(1024, 256), (4096, 256), (1024, 2048), (4096, 2048)]
    chunked = [peak_bytes(*size, chunked=True) for size in sizes]
    full = [peak_bytes(*size, chunked=False) for size in sizes]
    logits = [tokens * vocabulary * 4 for tokens, vocabulary in sizes]
    # The instrument sees what is there.
    assert all(peak >= 2 * size for peak, size in zip(full, logits, strict=True))
    assert max(chunked) < 6 * (1 << 18) + 4096 * 32  # Chunks, kept logits and a few numbers a token.
    assert max(chunked) < full[-1] / 20


# --- in a model ---


def tiny(family: str, **more: Any) -> Any:
    """A random causal LM of two layers of this Hugging Face family."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def sequences() -> list[TokenSequence]:
    random = torch.Generator().manual_seed(1)
    return [
        TokenSequence.of_turn(
            torch.randint(3, 97, (p,), generator=random).tolist(),
            torch.randint(3, 97, (c,), generator=random).tolist(),
        )
        for p, c in ((3, 9), (11, 2), (1, 30), (5, 0), (8, 8))
    ]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("family", "more", "has_head"),
    [
        ("Llama", {"tie_word_embeddings": False}, True),
        ("Llama", {"tie_word_embeddings": True}, True),
        ("Qwen2", {}, True),
        ("Qwen3", {}, True),
        ("Mistral", {"sliding_window": 7}, True),
        ("Gemma2", {"attn_logit_softcapping": None, "sliding_window": 7}, False),
        ("Granite", {"logits_scaling": 4.0}, False),
        ("Granite", {}, True),
        ("Cohere", {}, False),
    ],
)
def test_models_give_the_log_probs_and_gradients_of_their_whole_logits(
    family: str, more: dict, has_head: bool, layout: str
) -> None:
    model = tiny(family, **more)
    names = [name for name, _ in model.named_parameters()]
    inputs = collate(sequences(), layout, pad_id=0)  # type: ignore[arg-type]
    found = {}
    # The second pass comes after the head and the attention were exchanged.
    for kind in ("whole", "chunked"):
        if kind == "whole":
            logprobs = token_logprobs(model(**inputs.model_kwargs()).logits, inputs, TEMPERATURE)
        else:
            logprobs = TokenLogprobs(model, layout, "sdpa")(model, inputs, TEMPERATURE)  # type: ignore[arg-type]
        model.zero_grad()
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found[kind] = (
            logprobs.detach(),
            torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
        )
    assert isinstance(model.get_output_embeddings(), LogprobHead) == has_head
    torch.testing.assert_close(found["chunked"][0], found["whole"][0], rtol=0, atol=1e-5)
    assert distance(found["chunked"][1], found["whole"][1]) < 1e-5
    assert [name for name, _ in model.named_parameters()] == names


def test_a_head_that_is_not_asked_returns_logits() -> None:
    model = tiny("Llama")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    head = install_logprob_head(model)
    assert head is not None
    with head.asked(torch.tensor([0]), torch.tensor([1]), torch.tensor([7]), 1.0):
        answer = model(input_ids=ids).logits
    assert answer.shape == (1,)
    torch.testing.assert_close(answer, selective_log_softmax(before[0, 1:2], torch.tensor([7]), 1.0))
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_that_rescales_its_logits_in_an_unknown_way_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("learner.step.logprobs.RESCALED_LOGITS", ())
    model = tiny("Granite", logits_scaling=4.0)
    forward = TokenLogprobs(model, "padded", "sdpa")
    with pytest.raises(ConfigError, match="changes what its LM head returns"):
        forward(model, collate(sequences(), "padded", pad_id=0), TEMPERATURE)
