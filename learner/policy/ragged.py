"""Flash attention over sequences of any lengths, one after another, in one call (torch's `varlen_attn`).

Its queries are the tokens of the row. Its keys are those of each sequence, so that a prompt that several
sequences begin with is there for each of them. Flash counts both from the end: the queries of a sequence,
fewer than its keys, are its last tokens, which is what a row has of it.

On a CPU, which has no such kernel, tests put a plain one in its place; the case `attention` of
`make test-gpu` compares the kernel with attention in buckets.

Tensor letters: N sequences, S tokens of the row, P keys, H heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from learner.policy.buckets import ToPlaces

LARGEST_HEAD = 256
"""Of the kernel; heads are of multiples of 8."""


class Ragged:
    """The beginnings of a row's sequences, among its tokens and among the keys.

    query_starts, key_starts  int32 [N + 1]; a sequence whose tokens are all another's has no queries, and is
                              left out
    longest_query, longest_key
    to_places_P               int64 [P], the token of each key; None where tokens and keys are the same
    to_tokens_S, repeated     int64, the first key of each token, and the others
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        tokens: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """`tokens` are as for `Packing`. Raises ValueError where a sequence has a token of its own before one
        that it shares, or where the row has its tokens in another order.
        """
        keys_N = queries_N = np.array(lengths)
        self.to_places_P: Tensor | None = None
        if tokens is not None:
            is_own_P = np.zeros(len(tokens), dtype=bool)
            is_own_P[np.unique(tokens, return_index=True)[1]] = True
            ends_N = keys_N.cumsum()
            queries_N = np.add.reduceat(is_own_P, ends_N - keys_N, dtype=np.int64)
            left_P = (ends_N - queries_N).repeat(keys_N) - np.arange(len(tokens))
            if ((left_P <= 0) != is_own_P).any() or (np.diff(tokens[is_own_P]) != 1).any():
                raise ValueError("a row has the tokens of its sequences in order, those they share first")
            is_asked_N = queries_N > 0
            is_key_P = is_asked_N.repeat(keys_N)
            tokens, is_own_P = tokens[is_key_P], is_own_P[is_key_P]
            keys_N, queries_N = keys_N[is_asked_N], queries_N[is_asked_N]
            self.to_places_P, self.to_tokens_S, self.repeated = (
                torch.from_numpy(indices).to(device)
                for indices in (tokens, is_own_P.nonzero()[0], (~is_own_P).nonzero()[0])
            )
        self.longest_query, self.longest_key = int(queries_N.max()), int(keys_N.max())
        self.query_starts, self.key_starts = (
            torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)).to(device)
            for counts in (queries_N, keys_N)
        )

    def keys(self, row_SHD: Tensor) -> Tensor:
        """Takes tokens [S, H, D] to the keys that they are: [P, H, D]."""
        if self.to_places_P is None:
            return row_SHD
        keys_PHD: Tensor = ToPlaces.apply(row_SHD, self)
        return keys_PHD


def has_kernel(query_SHD: Tensor, key_SHD: Tensor, value_SHD: Tensor) -> bool:
    """Says whether flash attention takes such tensors: 16 bits wide, on an Ampere GPU or newer."""
    head = query_SHD.shape[-1]
    return (
        query_SHD.is_cuda
        and query_SHD.dtype in (torch.bfloat16, torch.float16)
        and key_SHD.shape == value_SHD.shape
        and head <= LARGEST_HEAD
        and head % 8 == 0
        and _capability(query_SHD.device) >= (8, 0)
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend(
    query_SHD: Tensor,
    key_SHD: Tensor,
    value_SHD: Tensor,
    ragged: Ragged,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Returns [S, H, D], causal attention within each sequence; with `window` to so many tokens, the own one
    included.
    """
    from torch.nn.attention import varlen

    attended = varlen.varlen_attn(
        query_SHD,
        ragged.keys(key_SHD),
        ragged.keys(value_SHD),
        ragged.query_starts,
        ragged.key_starts,
        ragged.longest_query,
        ragged.longest_key,
        scale=scale,
        window_size=(window - 1 if window and window < ragged.longest_key else -1, 0),
        enable_gqa=query_SHD.shape[1] != key_SHD.shape[1],
    )
    assert isinstance(attended, Tensor)  # Nothing else was asked for.
    return attended
