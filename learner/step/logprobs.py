"""Log-probabilities of given tokens: from logits, or from hidden states without ever holding the logits.

    hidden [T, d] --LM head, a chunk of tokens at a time--> logits [chunk, V]
                  --log-softmax, one entry each--> log-probs [T]

The full logits of a batch are the largest tensor of a training step by far: 8,192 tokens of a 128k vocabulary
are 4 GiB in float32, and their gradient as much again. `linear_logprobs` makes them piece by piece, in the
backward pass once more, so that its memory is a constant besides [T, d] and the head itself. `LogprobHead`
puts it where ZeRO-3 wants it: into the model. What is done with a piece is in learner/step/row_softmax.py, on
a GPU by a fused kernel.

Tensor letters: T tokens, d hidden size, V vocabulary, R rows of logits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.errors import ConfigError
from learner.step.row_softmax import into_gradient, row_logprobs

CHUNK_ELEMENTS = 1 << 24
"""Logits upcast at a time: 64 MiB in float32, however long the batch."""
CHUNK_BYTES = 1 << 27
"""Float32 logits that `linear_logprobs` works on at a time; it holds about three times as much at its
peak.
"""
GPU_CHUNK_BYTES = 1 << 29
"""The same on a GPU: each chunk reads the LM head, and reads and writes the sum of its gradient, whatever its
rows are; a chunk of 128 MiB has 261 of them at 128,000 tokens.
"""
KEPT_BYTES = 1 << 28
"""Logits it keeps for the backward pass, which saves one of four matrix products; those of later chunks
are made again.
"""

RESCALED_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Config fields by which models change what their LM head returns (transformers 5.19)."""

_log = logging.getLogger(__name__)


def selective_log_softmax(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Returns log softmax(logits / temperature) at `targets`, nats: [..., V], int64 [...] -> [...].

    It accumulates in float32 (float64 for float64 logits) and returns that dtype. Forward and backward upcast
    chunks of rows only; between them nothing of size V is kept but the logits themselves. Differentiable
    once, in `logits`.

    Raises ConfigError for a temperature that is not above 0, ValueError when the shapes do not fit.
    """
    _check_temperature(temperature)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, logits {tuple(logits.shape)}; expected "
            "logits [..., V], targets [...]"
        )
    flat: Tensor = _SelectiveLogSoftmax.apply(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), temperature
    )
    return flat.view(targets.shape)


def linear_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    bias_V: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
    kept_bytes: int = KEPT_BYTES,
) -> Tensor:
    """Returns log softmax((hidden @ weight.T + bias) / temperature) at `targets_T`: [T] nats, without logits
    [T, V] in memory.

    Softmax and the sum of the weight's gradient over chunks accumulate in float32 (float64 for float64
    weights), and float32 (float64) is returned; the products with the weight are in its dtype. Extra memory:
    about three chunks of `chunk_bytes` (None: `chunk_bytes_on` the device), logits of at most `kept_bytes`
    between forward and backward, and the weight's gradient. Differentiable once, in hidden, weight and bias.

    Raises ConfigError for a temperature that is not above 0, ValueError when the shapes do not fit.
    """
    _check_temperature(temperature)
    if (
        hidden_TD.dim() != 2
        or hidden_TD.shape[:1] != targets_T.shape
        or hidden_TD.shape[1:] != weight_VD.shape[1:]
    ):
        given = {"hidden": hidden_TD, "weight": weight_VD, "targets": targets_T}
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(f"{shapes} do not fit; expected hidden [T, d], weight [V, d], targets [T]")
    chunk_bytes = chunk_bytes_on(is_gpu=weight_VD.is_cuda) if chunk_bytes is None else chunk_bytes
    chunks = _Chunks.plan(hidden_TD, weight_VD, chunk_bytes, kept_bytes if torch.is_grad_enabled() else 0)
    logprobs: Tensor = _LinearLogprobs.apply(hidden_TD, weight_VD, bias_V, targets_T, temperature, chunks)
    return logprobs


def chunk_bytes_on(*, is_gpu: bool) -> int:
    """Returns the float32 logits that `linear_logprobs` works on at a time, in bytes."""
    return GPU_CHUNK_BYTES if is_gpu else CHUNK_BYTES


class LogprobHead(torch.nn.Module):
    """A model's LM head that returns, while it is `asked` to, the log-probs of given tokens in place of
    logits.

        with head.asked(rows_T, columns_T, targets_T, temperature):
            logprobs_T = model(**kwargs).logits

    It owns the very parameters of the head it replaces, under the same names. Thus a model keeps the names of
    its weights, and ZeRO-3 gathers the head, tied or not, for its forward and again for its backward pass,
    and reduces its gradient, as for any module.
    """

    class _Question(NamedTuple):
        rows_T: Tensor
        columns_T: Tensor
        targets_T: Tensor
        temperature: float

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._question: LogprobHead._Question | None = None
        self._answer: Tensor | None = None

    @contextlib.contextmanager
    def asked(
        self, rows_T: Tensor, columns_T: Tensor, targets_T: Tensor, temperature: float
    ) -> Iterator[None]:
        """Lets `forward` answer for the tokens predicted by hidden[rows_T, columns_T], for the time of the
        block.
        """
        self._question = self._Question(rows_T, columns_T, targets_T, temperature)
        try:
            yield
        finally:
            self._question = self._answer = None

    def forward(self, hidden_BKD: Tensor) -> Tensor:
        """Returns logits [B, K, V]; when asked, log-probs [T]."""
        if self._question is None:
            return torch.nn.functional.linear(hidden_BKD, self.weight, self.bias)
        rows_T, columns_T, targets_T, temperature = self._question
        answer = linear_logprobs(
            hidden_BKD[rows_T, columns_T], self.weight, targets_T, temperature, self.bias
        )
        self._answer = answer.detach()
        return answer

    def check_unchanged(self, returned: Tensor) -> None:
        """Raises ConfigError when `returned`, the model's "logits" to a question, are not this
        head's answer.
        """
        answer = self._answer
        if answer is None or (returned.data_ptr() != answer.data_ptr() and not torch.equal(returned, answer)):
            raise ConfigError(
                "the model changes what its LM head returns, by a field that AGRO does not know: its "
                "log-probs would be wrong. "
                "Name it in RESCALED_LOGITS of learner/step/logprobs.py; such models are trained with "
                "whole logits."
            )


def install_logprob_head(module: Any) -> LogprobHead | None:
    """Replaces the LM head of a Hugging Face causal LM by a LogprobHead and returns it; None, logged, for
    models that need whole logits.

    These are the models that rescale or cap their logits after the head, and those whose head is no plain
    linear layer.
    """
    head, config = module.get_output_embeddings(), module.config.get_text_config()
    rescaling = [name for name in RESCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
    if rescaling or type(head) is not torch.nn.Linear:
        reason = (
            f"config.{rescaling[0]} = {getattr(config, rescaling[0])}"
            if rescaling
            else f"its LM head is a {type(head).__name__}"
        )
        _log.warning(
            "%s: %s: log-probs are taken from whole logits, which costs memory.",
            type(module).__name__,
            reason,
        )
        return None
    replacement = LogprobHead(head)
    module.set_output_embeddings(replacement)
    return replacement


class _Chunks(NamedTuple):
    """The rows of each chunk, and for how many of them, the first ones, logits are kept between forward and
    backward.
    """

    rows: tuple[slice, ...]
    num_kept: int

    @classmethod
    def plan(cls, hidden_TD: Tensor, weight_VD: Tensor, chunk_bytes: int, kept_bytes: int) -> _Chunks:
        num_rows, vocabulary = len(hidden_TD), len(weight_VD)
        most = max(1, chunk_bytes // (_accumulation_dtype(weight_VD).itemsize * vocabulary))
        # Chunks of one size, rather than a small last one.
        size = -(-num_rows // max(1, -(-num_rows // most)))
        rows = (
            tuple(slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
            if num_rows
            else ()
        )
        kept_rows = kept_bytes // (weight_VD.element_size() * vocabulary)
        return cls(rows, sum(chunk.stop <= kept_rows for chunk in rows))


class _LinearLogprobs(torch.autograd.Function):
    """hidden [T, d], weight [V, d], bias [V], targets [T] -> [T]; d/dlogits = (one_hot(target) - softmax) /
    temperature.

    The weight is saved as the parameter that it is: under ZeRO-3 it is empty between the passes and whole
    again in the second.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        chunks: _Chunks,
    ) -> Tensor:
        logprobs_T = hidden_TD.new_empty(len(targets_T), dtype=_accumulation_dtype(weight_VD))
        log_norm_T = torch.empty_like(logprobs_T)
        kept = []
        for number, rows in enumerate(chunks.rows):
            logits = _logits(hidden_TD[rows], weight_VD, bias_V)
            if number < chunks.num_kept and any(ctx.needs_input_grad):
                kept.append(logits)
            scaled = _scaled(logits, logprobs_T.dtype, temperature)
            del logits
            logprobs_T[rows], log_norm_T[rows] = row_logprobs(scaled, targets_T[rows])
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, log_norm_T, *kept)
        ctx.temperature, ctx.chunks = temperature, chunks
        return logprobs_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, targets_T, log_norm_T, *kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_TD) if wants_hidden else None
        # Over several chunks, sums of a bfloat16 gradient are taken in float32.
        sums = log_norm_T.dtype if len(ctx.chunks.rows) > 1 else weight_VD.dtype
        grad_weight = torch.zeros_like(weight_VD, dtype=sums) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=sums) if wants_bias else None
        for number, rows in enumerate(ctx.chunks.rows):
            is_kept = number < len(kept)
            logits = kept[number] if is_kept else _logits(hidden_TD[rows], weight_VD, bias_V)
            scaled = _scaled(logits, log_norm_T.dtype, ctx.temperature, copy=is_kept)
            del logits
            chunk_RV = into_gradient(
                scaled, targets_T[rows], log_norm_T[rows], grad_T[rows] / ctx.temperature
            ).to(weight_VD.dtype)
            del scaled
            if grad_hidden is not None:
                torch.mm(chunk_RV, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, chunk_RV.T, hidden_TD[rows])
            if grad_bias is not None:
                grad_bias += chunk_RV.sum(0, dtype=sums)
        return (grad_hidden, _cast(grad_weight, weight_VD), _cast(grad_bias, weight_VD), None, None, None)


class _SelectiveLogSoftmax(torch.autograd.Function):
    """logits [R, V], targets [R] -> [R]; d/dlogits = (one_hot(target) - softmax) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets_R: Tensor, temperature: float) -> Tensor:
        logprobs_R = logits_RV.new_empty(len(targets_R), dtype=_accumulation_dtype(logits_RV))
        log_norm_R = torch.empty_like(logprobs_R)
        for rows in _chunks(logits_RV):
            logprobs_R[rows], log_norm_R[rows] = row_logprobs(
                _scaled(logits_RV[rows], logprobs_R.dtype, temperature), targets_R[rows]
            )
        ctx.save_for_backward(logits_RV, targets_R, log_norm_R)
        ctx.temperature = temperature
        return logprobs_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        logits_RV, targets_R, log_norm_R = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        for rows in _chunks(logits_RV):
            scaled = _scaled(logits_RV[rows], log_norm_R.dtype, ctx.temperature, copy=True)
            grad_RV[rows] = into_gradient(
                scaled, targets_R[rows], log_norm_R[rows], grad_R[rows] / ctx.temperature
            )
        return grad_RV, None, None


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; log-probs need one above 0 (actors.temperature)")


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(logits_RV: Tensor) -> list[slice]:
    num_rows, vocabulary = logits_RV.shape
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _logits(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return hidden_RD @ weight_VD.T if bias_V is None else torch.addmm(bias_V, hidden_RD, weight_VD.T)


def _scaled(logits_RV: Tensor, dtype: torch.dtype, temperature: float, *, copy: bool = False) -> Tensor:
    """Returns logits / temperature in `dtype`: the logits themselves when that changes nothing, unless they
    may not be overwritten (`copy`).
    """
    return logits_RV.to(dtype, copy=copy) if temperature == 1 else logits_RV.to(dtype) / temperature


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`, in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
