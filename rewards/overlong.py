"""A punishment for answers that come close to the limit of tokens, and for those beyond it."""

from __future__ import annotations

from typing import Any

import msgspec


class Overlong(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13), as
    `overlong?from=192&to=256`; the value is between -1 and 0, to be added to a task's own reward.

    start  sampled tokens up to which an answer costs nothing (`from`; the paper's L_max - L_cache)
    end    sampled tokens from which on it costs 1 (`to`; the paper's L_max)
    """

    start: int = msgspec.field(name="from")
    end: int = msgspec.field(name="to")

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"from={self.start} and to={self.end}: expected 0 <= from < to, in tokens")

    def __call__(self, completions: list[Any], num_tokens: list[int]) -> list[float | None]:
        """Returns 0.0 up to `from` sampled tokens, -1.0 from `to` on, and a straight line between."""
        span = self.end - self.start
        return [min(0.0, max(-1.0, (self.start - count) / span)) for count in num_tokens]
