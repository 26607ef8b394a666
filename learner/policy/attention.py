"""Attention within packed sequences, by PyTorch's own fused causal attention, without a mask.

    packed [1, H, S, D] --unpack--> buckets [n, H, longest, D] of sequences of like length
    buckets --sdpa, causal--> buckets --pack--> packed

With a mask, as transformers packs for "sdpa", a forward pass costs the square of the packed length, however
short the sequences in it. Here every sequence costs its own square, and a pass a call for each length, not
for each sequence. Buckets are padded on the right, where a causal attention never looks; the rest of the
model sees no padding.

Tensor letters: N sequences, S tokens of all of them, P places in the buckets (S and padding), H heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError

PACKED_SDPA = "packed_sdpa"
"""Name of this attention for transformers; it wants `packing`, a Packing, among the model's keyword
arguments.
"""
BUCKET_RATIO = 0.8
"""The shortest sequence of a bucket, as a part of its longest."""
SHORT = 64
"""Sequences up to this length share a bucket whatever their lengths: a call costs more than their padding."""


class Packing:
    """The way of a packed row's sequences into buckets of like length, and back.

        packing = Packing([5, 2, 9])          lengths of the sequences in the row
        packing.pack([attend(bucket) for bucket in packing.unpack(row)])

    to_places_P     int64 [P], the token of each place; padding repeats a sequence's last token
    to_tokens_S     int64 [S], of each token its place
    padding         int64, the places that are padding; their gradient is none
    shapes          (sequences, longest) of each bucket, in the order of the places
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        buckets = _buckets(lengths)
        self.shapes = [(len(bucket), lengths[bucket[0]]) for bucket in buckets]
        lengths_N = torch.tensor(lengths)
        starts_N = lengths_N.cumsum(0) - lengths_N
        order_N = torch.tensor([index for bucket in buckets for index in bucket])
        widths_N = torch.tensor([longest for num, longest in self.shapes for _ in range(num)])
        sequence_P = order_N.repeat_interleave(widths_N)
        places_P = torch.arange(len(sequence_P))
        offset_P = places_P - (widths_N.cumsum(0) - widths_N).repeat_interleave(widths_N)
        last_P = lengths_N[sequence_P] - 1
        is_token_P = offset_P <= last_P
        to_places_P = starts_N[sequence_P] + torch.minimum(offset_P, last_P)
        to_tokens_S = torch.empty(int(lengths_N.sum()), dtype=torch.int64)
        to_tokens_S[to_places_P[is_token_P]] = places_P[is_token_P]
        self.to_places_P, self.to_tokens_S = to_places_P.to(device), to_tokens_S.to(device)
        self.padding = places_P[~is_token_P].to(device)

    def unpack(self, packed_SHD: Tensor) -> list[Tensor]:
        """Takes tokens [S, H, D] to their places: a tensor [n, H, longest, D] for each bucket."""
        places_PHD: Tensor = _Gather.apply(packed_SHD, self.to_places_P, self.to_tokens_S, None)
        pieces = places_PHD.split([num * longest for num, longest in self.shapes])
        return [
            piece.unflatten(0, shape).transpose(1, 2)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def pack(self, buckets: list[Tensor]) -> Tensor:
        """Takes a tensor [n, longest, H, D] for each bucket back to the tokens: [S, H, D]."""
        places_PHD = torch.cat([bucket.flatten(0, 1) for bucket in buckets])
        packed: Tensor = _Gather.apply(places_PHD, self.to_tokens_S, self.to_places_P, self.padding)
        return packed


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Groups the indices of sequences of like length, the longest first."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[buckets[-1][0]] if buckets else 0
        if buckets and (lengths[index] >= BUCKET_RATIO * longest or longest <= SHORT):
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


class _Gather(torch.autograd.Function):
    """rows[there]. Its gradient is a gather too, by the inverse `back`, zero at `padding`: much faster than
    adding by index.

    It is right where rows taken more than once get no gradient from their repetitions.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.back, ctx.padding = back, padding
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        found = gradient.index_select(0, ctx.back)
        if ctx.padding is not None:
            found.index_fill_(0, ctx.padding, 0.0)
        return found, None, None, None


def install_packed_sdpa(module: Any) -> bool:
    """Lets a Hugging Face model attend by `packed_sdpa`, and says whether it is written for exchangeable
    attentions.

    A model that is not keeps transformers' masks, as do those whose layers are more than full or sliding
    attention.
    """
    from transformers import AttentionInterface

    layer_types = getattr(module.config.get_text_config(), "layer_types", None) or ()
    if not {*layer_types} <= {"full_attention", "sliding_attention"}:
        return False
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    module.set_attn_implementation(PACKED_SDPA)
    return bool(module.config._attn_implementation == PACKED_SDPA)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends as transformers asks for it: query [1, H, S, D], key and value [1, H', S, D] -> [1, S, H, D].

    Raises ConfigError for models that do not hand `packing` down to their attention, or that attend in
    another way.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    packing: Packing | None = kwargs.pop("packing", None)
    if left_out := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise ConfigError(
            f"{type(module).__name__} has a {left_out[0]} in its attention, which model.attention = sdpa "
            "leaves out, with learner.layout = "
            "padded too. Set model.attention=eager."
        )
    if packing is None or attention_mask is not None or kwargs.get("is_causal") is False:
        raise ConfigError(
            f"{type(module).__name__} cannot be trained with learner.layout = packed and model.attention = "
            "sdpa: its attention is not "
            "plain causal attention, or does not learn where sequences begin. Use learner.layout = padded, "
            "or model.attention = eager."
        )
    # Some do not hand their window down, but leave it to the mask, of which there is none here.
    window = (
        kwargs.pop("sliding_window")
        if "sliding_window" in kwargs
        else getattr(module, "sliding_window", None)
    )
    buckets = []
    for q, k, v in zip(
        *(packing.unpack(tensor[0].transpose(0, 1)) for tensor in (query, key, value)), strict=True
    ):
        mask = _window_mask(q, window) if window and q.shape[2] > window else None
        buckets.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return packing.pack(buckets)[None], None


def _window_mask(query: Tensor, window: int) -> Tensor:
    """Returns bool [1, 1, longest, longest]: causal attention to the last `window` tokens, the own one
    included.
    """
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    return ((distance >= 0) & (distance < window))[None, None]
