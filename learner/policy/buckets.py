"""The places of a packed row's sequences in buckets of like length: how attention goes without a mask where a
kernel takes nothing but rectangles.

    packed [S, H, D] --unpack--> buckets [n, H, longest, D] --pack--> packed [S, H, D]

Buckets are padded on the right, where a causal attention never looks. Tensor letters as in attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BUCKET_RATIO = 0.8
"""The shortest sequence of a bucket, as a part of its longest."""
SHORT = 64
"""Sequences up to this length share a bucket whatever their lengths: a call costs more than their padding."""


class Buckets:
    """The way of a packed row's sequences into buckets of like length, and back.

        buckets = Buckets([5, 2, 9])          lengths of the sequences in the row
        buckets.pack([attend(bucket) for bucket in buckets.unpack(row)])

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
        another. A sequence whose tokens all belong to others takes no place.
        """
        lengths_N = np.array(lengths)
        starts_N = lengths_N.cumsum() - lengths_N
        if tokens is not None:
            asked_N = _asked(lengths_N, starts_N, tokens)
            lengths_N, starts_N = lengths_N[asked_N], starts_N[asked_N]
        lengths = lengths_N.tolist()
        buckets = _buckets(lengths)
        self.shapes = [(len(bucket), lengths[bucket[0]]) for bucket in buckets]
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
        places_PHD: Tensor = ToPlaces.apply(packed_SHD, self)
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


def _asked(
    lengths_N: npt.NDArray[np.int64], starts_N: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Returns which sequences have a token that no longer one has, nor an earlier one as long: what comes of
    the others nobody looks at. Ascending.
    """
    order_N = np.argsort(-lengths_N, kind="stable")
    counts_N = lengths_N[order_N]
    offset_P = np.arange(len(tokens)) - (counts_N.cumsum() - counts_N).repeat(counts_N)
    token_P = tokens[starts_N[order_N].repeat(counts_N) + offset_P]
    first = np.unique(token_P, return_index=True)[1]
    return np.unique(order_N.repeat(counts_N)[first])


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


class TokenPlaces(Protocol):
    """The places of a row's tokens; `Buckets` says more of each."""

    to_places_P: Any
    to_tokens_S: Tensor
    repeated: Tensor


class ToPlaces(torch.autograd.Function):
    """The gather rows[to_places]. Its gradient is a gather too, and an addition of what `repeated` places
    give: much faster than adding all by index.

    It is right where padding gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: TokenPlaces) -> Tensor:
        """Takes rows to their places."""
        ctx.places = places
        return rows.index_select(0, places.to_places_P)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Adds up what the places of each row give."""
        places: TokenPlaces = ctx.places
        found = gradient.index_select(0, places.to_tokens_S)
        if len(places.repeated):
            tokens = places.to_places_P[places.repeated]
            found.index_add_(0, tokens, gradient.index_select(0, places.repeated))
        return found, None


class _ToTokens(torch.autograd.Function):
    """places[to_tokens]. Its gradient is a gather too, zero at `padding`."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, buckets: Buckets) -> Tensor:
        ctx.buckets = buckets
        return places.index_select(0, buckets.to_tokens_S)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found = gradient.index_select(0, ctx.buckets.to_places_P)
        found.index_fill_(0, ctx.buckets.padding, 0.0)
        return found, None
