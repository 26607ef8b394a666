"""Attention within packed sequences, by PyTorch's own fused causal attentions, without a mask.

    on a GPU   packed [1, H, S, D] --flash, which takes sequences of any lengths--> packed
    else       packed [1, H, S, D] --unpack--> buckets of sequences of like length --sdpa, causal--> --pack--> packed

With a mask, as transformers packs for "sdpa", a forward pass costs the square of the packed length, however
short the sequences in it. Here every sequence costs its own square.

A GPU takes the flash attention that torch brings along, one call a layer, wherever its kernel can. In buckets
every pass would bring shapes that were never seen before, for each of which cuDNN would make a plan, in
about a second (learner/policy/zero.py keeps cuDNN out), and a window would want a mask of longest x longest.

A token that several sequences begin with may lie in the row once: every one of them has a place for it, with
the same query, key and value, of which the first gives the token's output.

Tensor letters: N sequences, S tokens of the row, P places (a token's in each sequence that has it, and
padding), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import ConfigError
from learner.policy.buckets import Buckets
from learner.policy.ragged import Ragged, attend, has_kernel

PACKED_SDPA = "packed_sdpa"
"""Name of this attention for transformers; it wants `packing`, a Packing, among the model's keyword
arguments.
"""


class Packing:
    """The places of a packed row's sequences, for the kernel that will ask: made when it first does.

    shares_tokens  whether some token of the row is one of several sequences
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
        self._lengths, self._device, self._tokens = lengths, device, tokens
        self.shares_tokens = tokens is not None and len(tokens) > 0 and int(tokens.max()) + 1 < len(tokens)

    @cached_property
    def buckets(self) -> Buckets:
        """The sequences in rectangles."""
        return Buckets(self._lengths, self._device, self._tokens)

    @cached_property
    def ragged(self) -> Ragged:
        """The sequences one after another."""
        return Ragged(self._lengths, self._device, self._tokens if self.shares_tokens else None)


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
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if has_kernel(*rows) and not kwargs.get("dropout") and kwargs.get("position_bias") is None:
        q, k, v = rows
        return attend(q, k, v, packing.ragged, kwargs.get("scaling"), window)[None], None
    found, buckets = [], packing.buckets
    for q, k, v in zip(*map(buckets.unpack, rows), strict=True):
        mask = _window_mask(q, window) if window and q.shape[2] > window else None
        found.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return buckets.pack(found)[None], None


def _window_mask(query: Tensor, window: int) -> Tensor:
    """Returns bool [1, 1, longest, longest]: causal attention to the last `window` tokens, the own one
    included.
    """
    position = torch.arange(query.shape[2], device=query.device)
    distance = position[:, None] - position
    return ((distance >= 0) & (distance < window))[None, None]
