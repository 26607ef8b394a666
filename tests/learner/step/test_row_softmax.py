"""liger's kernel behind the log-probs: interpreted on the CPU, in a process that is told so before
Triton is imported.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from learner.step import row_softmax
from learner.step.logprobs import linear_logprobs, selective_log_softmax

COMPARISONS = """
import logging, torch
from learner.step import row_softmax
from learner.step.logprobs import linear_logprobs, selective_log_softmax

logging.basicConfig()
cpu = torch.device("cpu")
assert row_softmax.kernel_for(torch.zeros(1, 8)) is row_softmax._liger
assert row_softmax.kernel_for(torch.zeros(1, 8, dtype=torch.float64)) is None
difference = row_softmax.compare(row_softmax._liger, cpu)
assert difference < row_softmax.TOLERANCE, difference

random = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(rows, 24, generator=random).requires_grad_() for rows in (50, 97))
targets, coefficients = torch.randint(97, (50,), generator=random), torch.randn(50, generator=random)
for temperature in (1.0, 0.7):
    for kept_tokens in (0, 20, 50):
        found = linear_logprobs(hidden, weight, targets, temperature, chunk_bytes=13 * 97 * 4, kept_bytes=kept_tokens * 97 * 4)
        wide = hidden.double(), weight.double()
        expected = ((wide[0] @ wide[1].T) / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

        def gradients(logprobs):
            return torch.autograd.grad((logprobs * coefficients).sum(), (hidden, weight), retain_graph=True)

        for one, other, second in zip(gradients(found), gradients(expected), gradients(found)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert torch.equal(one, second), "the first backward pass overwrote what the second needed"
    logits = (weight @ hidden.T).detach().T.requires_grad_()  # In another layout than the kernel wants.
    other = logits.detach().clone().requires_grad_()
    (selective_log_softmax(logits, targets, temperature) * coefficients).sum().backward()
    full = (other / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (full * coefficients).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, other)
print("compared", difference)
"""


def test_the_fused_kernel_gives_the_log_probs_and_gradients_of_torch() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", COMPARISONS],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("compared")


def test_without_a_gpu_torch_computes_them() -> None:
    assert row_softmax.kernel_for(torch.zeros(1, 8)) is None


def wrong(logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    return torch.zeros(len(logits))


def not_a_number(logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    loss = -row_softmax._torch_logprobs(logits, targets)[0]
    if with_gradient:
        logits.fill_(float("nan"))
    return loss


def broken(logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (wrong, "differs from torch by"),
        (not_a_number, "differs from torch by nan"),
        (broken, "does not work on cpu, .*: RuntimeError: no compiler"),
    ],
)
def test_a_kernel_that_fails_or_differs_is_said_and_not_used(
    kernel: row_softmax.Kernel, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_softmax, "_liger", kernel)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    row_softmax._checked_kernel.cache_clear()
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    with caplog.at_level(logging.WARNING):
        found = linear_logprobs(hidden, weight, targets, 1.0)
    row_softmax._checked_kernel.cache_clear()
    assert caplog.messages
    assert re.search(said, caplog.messages[0])
    torch.testing.assert_close(found, selective_log_softmax(hidden @ weight.T, targets, 1.0))
