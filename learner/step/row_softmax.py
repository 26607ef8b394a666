"""What log-probs need of a chunk of logits [R, V], in passes over it: by torch, or on a GPU by liger-kernel's
fused cross entropy.

torch reads and writes a chunk once for each of maximum, exponential, sum and so on; the kernel reads it once
for the log-probs, and twice, writing it once, for the gradient. Only liger's cross entropy over rows fits:
its `fused linear` one makes the gradient in the forward pass and scales it by ONE number afterwards, while an
objective's gradient has a coefficient per token.

The kernel is compared with torch before its first use; where it is missing, fails or differs, a warning says
so and torch is used. With TRITON_INTERPRET=1 in the environment it runs on a CPU too, slowly: that is how
tests compare them.

Tensor letters: R rows, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Between kernel and torch, of log-probs in nats and of their gradients, in float32."""

Kernel: TypeAlias = Callable[[Tensor, Tensor, bool], Tensor]
"""(logits, targets, whether to turn the logits into d/dlogits of the result) -> cross entropy of each row."""

_log = logging.getLogger(__name__)


def row_logprobs(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log softmax(logits) at `targets_R`, and the log of the softmax's sum: [R, V], int64 [R] -> [R],
    [R] nats.

    Both are in the dtype of the logits, float32 or float64.
    """
    kernel = kernel_for(logits_RV)
    if kernel is None:
        return _torch_logprobs(logits_RV, targets_R)
    loss_R = kernel(logits_RV, targets_R, False)
    return -loss_R, _targets(logits_RV, targets_R) + loss_R


def into_gradient(logits_RV: Tensor, targets_R: Tensor, log_norm_R: Tensor, grad_R: Tensor) -> Tensor:
    """Overwrites the logits by grad (one_hot(target) - softmax), the gradient of `row_logprobs`, which had
    given `log_norm_R`.
    """
    kernel = kernel_for(logits_RV)
    if kernel is None:
        return _torch_gradient(logits_RV, targets_R, log_norm_R, grad_R)
    kernel(logits_RV, targets_R, True)
    return logits_RV.mul_(-grad_R[:, None])


def kernel_for(logits_RV: Tensor) -> Kernel | None:
    """Returns the fused kernel, where one works on such logits."""
    is_at_home = logits_RV.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    # liger would make a copy of logits in another layout, and leave the gradient there.
    fits = logits_RV.dtype == torch.float32 and logits_RV.stride(-1) == 1 and len(logits_RV)
    return _checked_kernel(logits_RV.device) if is_at_home and fits else None


def _targets(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    return logits_RV.gather(-1, targets_R[:, None])[:, 0]


def _torch_logprobs(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    log_norm_R = logits_RV.logsumexp(-1)
    return _targets(logits_RV, targets_R) - log_norm_R, log_norm_R


def _torch_gradient(logits_RV: Tensor, targets_R: Tensor, log_norm_R: Tensor, grad_R: Tensor) -> Tensor:
    softmax_RV = logits_RV.sub_(log_norm_R[:, None]).exp_()
    return softmax_RV.mul_(-grad_R[:, None]).scatter_add_(-1, targets_R[:, None], grad_R[:, None])


def _liger(logits_RV: Tensor, targets_R: Tensor, with_gradient: bool) -> Tensor:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    # Shares its memory; by this flag liger knows whether to overwrite it.
    rows = logits_RV.detach().requires_grad_(with_gradient)
    loss: Tensor = cross_entropy_forward(rows, targets_R, None, -100, 0.0, 0.0, "none", None, False)[0]
    return loss.detach()


@functools.cache
def _checked_kernel(device: torch.device) -> Kernel | None:
    """Returns liger's kernel, if it computes on this device what torch does."""
    try:
        difference = compare(_liger, device)
    except Exception as error:  # noqa: BLE001 -- import, compiler or driver: torch can do the same
        _log.warning(
            "liger-kernel does not work on %s, torch computes the log-probs: %s: %s",
            device,
            type(error).__name__,
            error,
        )
        return None
    if not difference <= TOLERANCE:
        _log.warning(
            "liger-kernel differs from torch by %.3g on %s: torch computes the log-probs", difference, device
        )
        return None
    return _liger


def compare(kernel: Kernel, device: torch.device, vocabulary: int = 40_000) -> float:
    """Returns the largest difference between the kernel's and torch's log-probs and gradients, of rows sharp
    and flat.
    """
    random = torch.Generator().manual_seed(0)
    sharpness_R = torch.tensor([0.0, 1.0, 8.0, 30.0])
    logits_RV = (torch.randn(len(sharpness_R), vocabulary, generator=random) * sharpness_R[:, None]).to(
        device
    )
    targets_R = torch.randint(vocabulary, (len(sharpness_R),), generator=random).to(device)
    expected, log_norm_R = _torch_logprobs(logits_RV, targets_R)
    found = -kernel(logits_RV, targets_R, False)
    gradient = _torch_gradient(logits_RV.clone(), targets_R, log_norm_R, torch.ones_like(expected))
    kernel(logits_RV, targets_R, True)
    # Of NaN: NaN.
    return float(torch.stack([(found - expected).abs().max(), (-logits_RV - gradient).abs().max()]).max())
