"""A packed row divided among ranks: each has a part of the tokens, and in attention all of them with a part
of the heads (Ulysses: Jacobs et al., 2023, arXiv 2309.14509).

    row [1, S] --cut--> [1, L] on each of s ranks --model--> ... --joined--> log-probs [T] on each of them
    in attention:  q, k, v [1, H, L, D] --to heads--> [1, H/s, S, D] --attend--> --to tokens--> [1, L, H, D]

Everything but attention is done token by token, so that a rank holds the activations and logits of its part
alone. Every rank of the s has all log-probs and makes the same loss of them; the gradient that goes back is
that of its own tokens. The sum over ranks, which ZeRO-3 takes anyway, is the gradient of the whole row.

DeepSpeed has the same as a class for transformers (UlyssesSPAttentionHF of 0.19.8, ulysses_sp.py). That one
wants position ids in every call of an attention and gathers them from all ranks in every layer, for kernels
that find packed sequences by them; ours are found by `packing`.

Tensor letters: S tokens of the row, L of a rank's part, H heads, D head size, T sampled tokens, s ranks.
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from learner.step.packing import ModelInputs

ROW_SHARDS = "row_shards"
"""Name of this attention for transformers."""


@dataclasses.dataclass(frozen=True)
class RowPart:
    """What a rank does of a pass: `inputs` are those of its tokens, `tokens` of each rank the places in the
    pass's T that it answers for. The whole row has `num_tokens`.
    """

    inputs: ModelInputs
    tokens: tuple[Tensor, ...]
    num_tokens: int

    def model_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for the model, from which they reach its attention."""
        return self.inputs.model_kwargs() | {
            "packing": self.inputs.packing,
            "num_row_tokens": self.num_tokens,
        }


class RowShards:
    """This rank among the `count` that share their rows: `number` of them, connected by `group`."""

    def __init__(self, count: int, timeout: datetime.timedelta) -> None:
        """Connects ranks that follow one another. Collective, over all of them."""
        self.count, self.number = count, dist.get_rank() % count
        firsts = range(0, dist.get_world_size(), count)
        groups = [dist.new_group(range(first, first + count), timeout=timeout) for first in firsts]
        self.group = groups[dist.get_rank() // count]

    def cut(self, inputs: ModelInputs) -> RowPart:
        """Returns this rank's part of a packed row, in which all parts are equally long: what the row lacks
        for that is filled with tokens that nobody looks at.
        """
        num_tokens = inputs.input_ids.shape[1]
        length = -(-num_tokens // self.count)
        owner_T = inputs.logits_to_keep_K // length  # In a packed row K is T.
        tokens = tuple((owner_T == number).nonzero()[:, 0] for number in range(self.count))
        mine, start = tokens[self.number], self.number * length

        def part(row: Tensor) -> Tensor:
            filled = torch.nn.functional.pad(row, (0, length * self.count - num_tokens))
            return filled[:, start : start + length]

        cut = dataclasses.replace(
            inputs,
            input_ids=part(inputs.input_ids),
            position_ids=part(inputs.position_ids),
            logits_to_keep_K=inputs.logits_to_keep_K[mine] - start,
            rows_T=inputs.rows_T[mine],
            columns_T=torch.arange(len(mine), device=mine.device),
            targets_T=inputs.targets_T[mine],
            sequence_T=inputs.sequence_T[mine],
        )
        return RowPart(cut, tokens, num_tokens)

    def joined(self, logprobs: Tensor, part: RowPart) -> Tensor:
        """Returns the log-probs [T] of all parts on every rank; a gradient goes back to this rank's."""
        joined: Tensor = _Joined.apply(logprobs, part, self)
        return joined

    def to_heads(self, local: Tensor) -> Tensor:
        """Takes [1, H, L, D], this rank's tokens, to [1, H/s, S, D], its heads."""
        _, heads, length, size = local.shape
        sent = local[0].reshape(self.count, heads // self.count, length, size)
        return self._exchanged(sent).transpose(0, 1).reshape(1, heads // self.count, -1, size)

    def to_tokens(self, local: Tensor) -> Tensor:
        """Takes [1, S, H/s, D] back to [1, L, H, D]."""
        _, num_tokens, heads, size = local.shape
        sent = local[0].reshape(self.count, num_tokens // self.count, heads, size)
        return self._exchanged(sent).transpose(0, 1).reshape(1, num_tokens // self.count, -1, size)

    def _exchanged(self, parts: Tensor) -> Tensor:
        exchanged: Tensor = _Exchanged.apply(parts, self.group)
        return exchanged


_connected: list[RowShards] = []  # Of this process, as torch's own groups are.


def connect(count: int, timeout: datetime.timedelta) -> None:
    """Connects ranks that share their rows, once for all models of this process; with a `count` of 1 none do.
    Collective.
    """
    _connected[:] = [RowShards(count, timeout)] if count > 1 else []


def connected() -> RowShards | None:
    """Returns what `connect` made."""
    return _connected[0] if _connected else None


def install_row_shards(module: Any, shards: RowShards) -> None:
    """Lets a Hugging Face model that attends by `packing` attend to whole rows while it computes parts."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]

    def attend_to_row(
        layer: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        num_tokens = kwargs.pop("num_row_tokens")
        row = (shards.to_heads(local)[:, :, :num_tokens] for local in (query, key, value))
        found = attend(layer, *row, mask, **kwargs)[0]
        fill = query.shape[2] * shards.count - num_tokens
        return shards.to_tokens(torch.nn.functional.pad(found, (0, 0, 0, 0, 0, fill))), None

    AttentionInterface.register(ROW_SHARDS, attend_to_row)
    module.set_attn_implementation(ROW_SHARDS)


class _Exchanged(torch.autograd.Function):
    """parts[j] goes to rank j, and what rank j sent lies at j; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(parts: Tensor, group: Any) -> Tensor:
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, parts.contiguous(), group=group)
    return found


class _Joined(torch.autograd.Function):
    """Every rank's log-probs at their places; the gradient is that of this rank's."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, part: RowPart, shards: RowShards) -> Tensor:
        ctx.mine = part.tokens[shards.number]
        longest = max(map(len, part.tokens))
        sent = logprobs.new_zeros(longest)
        sent[: len(logprobs)] = logprobs
        received = logprobs.new_empty(shards.count * longest)
        dist.all_gather_into_tensor(received, sent, group=shards.group)
        joined = logprobs.new_empty(sum(map(len, part.tokens)))
        for row, tokens in zip(received.view(shards.count, longest), part.tokens, strict=True):
            joined[tokens] = row[: len(tokens)]
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.mine], None, None
