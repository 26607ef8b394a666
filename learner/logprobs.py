"""Log-probabilities of given tokens from logits, without a float32 copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cluster.errors import ConfigError

# Upcast so many logits at a time: 64 MiB in float32, however long the batch.
CHUNK_ELEMENTS = 1 << 24


def selective_log_softmax(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at `targets`: [..., V], int64 [...] -> [...], nats.

    Accumulates in float32 (float64 for float64 logits) and returns that dtype. Forward and backward upcast chunks of rows
    only; between them nothing of size V is kept but the logits themselves. Differentiable once, in `logits`.

    Raises ConfigError for a temperature that is not above 0, ValueError when the shapes do not fit.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; log-probs need one above 0 (actors.temperature)")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, logits {tuple(logits.shape)}; expected logits [..., V], targets [...]")
    flat: Tensor = _SelectiveLogSoftmax.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), temperature)
    return flat.view(targets.shape)


class _SelectiveLogSoftmax(torch.autograd.Function):
    """logits [R, V], targets [R] -> [R]; d/dlogits = (one_hot(target) - softmax) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets_R: Tensor, temperature: float) -> Tensor:
        log_norm_R = logits_RV.new_empty(len(targets_R), dtype=_accumulation_dtype(logits_RV))
        target_R = torch.empty_like(log_norm_R)
        for rows in _chunks(logits_RV):
            scaled = logits_RV[rows].to(log_norm_R.dtype) / temperature
            log_norm_R[rows] = scaled.logsumexp(-1)
            target_R[rows] = scaled.gather(-1, targets_R[rows, None])[:, 0]
        ctx.save_for_backward(logits_RV, targets_R, log_norm_R)
        ctx.temperature = temperature
        return target_R - log_norm_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        logits_RV, targets_R, log_norm_R = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        for rows in _chunks(logits_RV):
            grad = grad_R[rows, None] / ctx.temperature
            scaled = logits_RV[rows].to(log_norm_R.dtype) / ctx.temperature
            chunk = (scaled - log_norm_R[rows, None]).exp_().mul_(-grad)
            grad_RV[rows] = chunk.scatter_add_(-1, targets_R[rows, None], grad).to(grad_RV.dtype)
        return grad_RV, None, None


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits_RV: Tensor) -> list[slice]:
    num_rows, vocabulary = logits_RV.shape
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_rows, size)]
