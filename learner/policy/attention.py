"""Attention within packed sequences, by PyTorch's own fused causal attention, without a mask.

    packed [1, H, S, D] --unpack--> buckets [n, H, longest, D] of sequences of like length
    buckets --sdpa, causal--> buckets --pack--> packed

With a mask, as transformers packs for "sdpa", a forward pass costs the square of the packed length, however
short the sequences in it. Here every sequence costs its own square, and a pass a call for each length, not
for each sequence. Buckets are padded on the right, where a causal attention never looks; the rest of the
model sees no padding.

A token that several sequences begin with may lie in the row once: every one of them has a place for it, with
the same query, key and value, of which the first gives the token's output.

Tensor letters: N sequences, S tokens of the row, P places in the buckets (a token's in each sequence that has
it, and padding), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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
    to_tokens_S     int64 [S], of each token its place, the first that it has
    padding         int64, the places that are padding, and those of tokens that have an earlier one: nobody
                    looks at what comes of them
    repeated        int64, those places among them that are no padding: where tokens are looked at once more
    shapes          (sequences, longest) of each bucket, in the order of the places
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        tokens: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """`tokens` are the places in the row of each sequence's tokens, by sequence; None: one after
        another.
        """
        buckets = _buckets(lengths)
        self.shapes = [(len(bucket), lengths[bucket[0]]) for bucket in buckets]
        lengths_N = np.array(lengths)
        starts_N = lengths_N.cumsum() - lengths_N
        order_N = np.array([index for bucket in buckets for index in bucket])
        widths_N = np.array([longest for num, longest in self.shapes for _ in range(num)])
        sequence_P = order_N.repeat(widths_N)
        offset_P = np.arange(len(sequence_P)) - (widths_N.cumsum() - widths_N).repeat(widths_N)
        last_P = lengths_N[sequence_P] - 1
        to_places_P = starts_N[sequence_P] + np.minimum(offset_P, last_P)
        if tokens is not None:
            to_places_P = tokens[to_places_P]
        places = (offset_P <= last_P).nonzero()[0]
        _, first = np.unique(to_places_P[places], return_index=True)
        to_tokens_S = places[first]
        is_output_P = np.zeros(len(to_places_P), dtype=bool)
        is_output_P[to_tokens_S] = True
        self.to_places_P, self.to_tokens_S, self.padding, self.repeated = (
            torch.from_numpy(indices).to(device)
            for indices in (
                to_places_P,
                to_tokens_S,
                (~is_output_P).nonzero()[0],
                places[~is_output_P[places]],
            )
        )

    def unpack(self, packed_SHD: Tensor) -> list[Tensor]:
        """Takes tokens [S, H, D] to their places: a tensor [n, H, longest, D] for each bucket."""
        places_PHD: Tensor = _ToPlaces.apply(packed_SHD, self)
        pieces = places_PHD.split([num * longest for num, longest in self.shapes])
        return [
            piece.unflatten(0, shape).transpose(1, 2)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def pack(self, buckets: list[Tensor]) -> Tensor:
        """Takes a tensor [n, longest, H, D] for each bucket back to the tokens: [S, H, D]."""
        places_PHD = torch.cat([bucket.flatten(0, 1) for bucket in buckets])
        packed: Tensor = _ToTokens.apply(places_PHD, self)
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


class _ToPlaces(torch.autograd.Function):
    """rows[to_places]. Its gradient is a gather too, and an addition of what `repeated` places give: much
    faster than adding all by index.

    It is right where padding gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return rows.index_select(0, packing.to_places_P)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        found = gradient.index_select(0, packing.to_tokens_S)
        if len(packing.repeated):
            tokens = packing.to_places_P[packing.repeated]
            found.index_add_(0, tokens, gradient.index_select(0, packing.repeated))
        return found, None


class _ToTokens(torch.autograd.Function):
    """places[to_tokens]. Its gradient is a gather too, zero at `padding`."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return places.index_select(0, packing.to_tokens_S)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found = gradient.index_select(0, ctx.packing.to_places_P)
        found.index_fill_(0, ctx.packing.padding, 0.0)
        return found, None


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
