"""Attention on a GPU, by a kernel that takes sequences of any lengths: what is asked of it, with a plain one
in its place.
"""

import inspect

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen

from core.errors import ConfigError
from learner.policy.function_check import check_function
from learner.policy.ragged import Ragged, has_kernel
from learner.step.packing import TokenLogprobs, TokenSequence, collate
from tests.support.learning.plain_varlen import plain_varlen_attn
from tests.support.learning.rollouts import (
    TEMPERATURE,
    assert_same_gradient,
    flat,
    make_rollouts,
    plain_logprobs,
    tiny_llama,
)


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors seem to lie on a GPU; counts the kernel's calls."""
    calls = []

    def attn(*arguments, **options):
        calls.append(options)
        return plain_varlen_attn(*arguments, **options)

    monkeypatch.setattr("learner.policy.attention.has_kernel", lambda *rows: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attn)
    return calls


def gradients(model, forward, inputs, weights):
    found = forward(model, inputs, TEMPERATURE)
    (found * weights).sum().backward()
    return found, flat([parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("shares_beginnings", [False, True])
def test_the_kernel_gives_the_log_probs_and_gradients_of_each_sequence_alone(on_gpu, shares_beginnings):
    rollouts, plain, model = make_rollouts(), tiny_llama(), tiny_llama()
    expected = torch.cat([plain_logprobs(plain, sequence) for sequence in rollouts.sequences])
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (expected * weights).sum().backward()
    inputs = collate(rollouts.sequences, "packed", pad_id=0, shares_beginnings=shares_beginnings)
    found, gradient = gradients(model, TokenLogprobs(model, "packed", "sdpa"), inputs, weights)
    assert len(on_gpu) == 2  # One call a layer.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert_same_gradient(gradient, flat([parameter.grad for parameter in plain.parameters()]))


@pytest.mark.parametrize("window", [2, 5, 1000])
@pytest.mark.parametrize("shares_beginnings", [False, True])
def test_a_window_reaches_as_far_as_in_buckets(monkeypatch, on_gpu, window, shares_beginnings):
    model = tiny_llama()
    forward = TokenLogprobs(model, "packed", "sdpa")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    inputs = collate(make_rollouts().sequences, "packed", pad_id=0, shares_beginnings=shares_beginnings)
    weights = torch.linspace(-1, 1, len(inputs.targets_T), dtype=torch.float64)
    found, gradient = gradients(model, forward, inputs, weights)
    assert {options["window_size"] for options in on_gpu} == {(window - 1 if window < 1000 else -1, 0)}
    model.zero_grad()
    monkeypatch.setattr("learner.policy.attention.has_kernel", lambda *rows: False)
    expected, exact = gradients(model, forward, inputs, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert_same_gradient(gradient, exact)


def test_the_check_of_a_start_finds_a_kernel_that_counts_from_the_beginning(monkeypatch, on_gpu):
    model = tiny_llama(torch.float32)
    forward = TokenLogprobs(model, "packed", "sdpa")

    def check():
        with torch.no_grad():
            check_function(
                lambda inputs, training: forward(model, inputs, 1.0), model, "packed", shares_beginnings=True
            )

    check()

    def from_the_beginning(query, key, value, cu_seq_q, cu_seq_k, *lengths, **options):
        first = [tensor[:0] for tensor in (key, value)]
        for q, k in zip(cu_seq_q.diff().tolist(), cu_seq_k[:-1].tolist(), strict=True):
            first = [torch.cat([f, t[k : k + q]]) for f, t in zip(first, (key, value), strict=True)]
        return plain_varlen_attn(query, *first, cu_seq_q, cu_seq_q, *lengths, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", from_the_beginning)
    with pytest.raises(ConfigError, match=r"packed sequences would see each other|by its eager attention"):
        check()


def test_a_sequence_without_a_token_of_its_own_asks_nothing():
    sequences = [TokenSequence.of_turn([5], []), TokenSequence.of_turn([5], [6, 7])]
    ragged = collate(sequences[::-1], "packed", 0, shares_beginnings=True).packing.ragged
    assert ragged.query_starts.tolist() == ragged.key_starts.tolist() == [0, 2]
    ragged = collate([*sequences, TokenSequence.of_turn([5, 8], [6])], "packed", 0, shares_beginnings=True)
    assert ragged.packing.ragged.query_starts.tolist() == [0, 1, 2, 3]
    assert ragged.packing.ragged.key_starts.tolist() == [0, 1, 3, 5]


def test_a_row_in_another_order_is_refused():
    with pytest.raises(ValueError, match="in order, those they share first"):
        Ragged([2, 2], tokens=np.array([0, 1, 2, 1]))  # Its own token before the shared one.
    with pytest.raises(ValueError, match="in order, those they share first"):
        Ragged([2, 2], tokens=np.array([1, 0, 1, 2]))


def test_what_the_kernel_cannot_take_goes_in_buckets():
    """A CPU, other widths, heads of latent attention: nothing of them is asked of the kernel."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def row(heads=2, head=64, dtype=torch.bfloat16):
        return torch.zeros(3, heads, head, dtype=dtype).as_subclass(OnGpu)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learner.policy.ragged._capability", lambda device: (9, 0))
        assert has_kernel(row(4), row(), row())
        assert not has_kernel(*[torch.zeros(3, 2, 64, dtype=torch.bfloat16)] * 3)
        assert not has_kernel(*[row(dtype=torch.float32)] * 3)
        assert not has_kernel(*[row(head=264)] * 3)
        assert not has_kernel(*[row(head=20)] * 3)
        assert not has_kernel(row(), row(), row(head=32))
        patch.setattr("learner.policy.ragged._capability", lambda device: (7, 5))
        assert not has_kernel(row(), row(), row())


def test_torch_has_the_kernel_with_what_is_asked_of_it():
    named = inspect.signature(plain_varlen_attn).parameters
    assert [*named] == [name for name in inspect.signature(varlen.varlen_attn).parameters if name in named]
