"""Holds batch entries per stored group within `buffer.samples_per_insert`. Pure.

    low * stored - forgone <= taken <= high * stored

`stored` counts groups that came to be in the buffer, `taken` their uses in batches, and `forgone` the uses
that groups did not have when they left.
"""

from __future__ import annotations

import math


class Band:
    """Says which side has to wait. Example: `Band((1.0, 2.0)).exceeds(taken=3, num_groups=2, stored=2)` is
    True: five entries of two groups.
    """

    def __init__(self, band: tuple[float, float] | None) -> None:
        """Without a band nobody waits for it."""
        self._band = band

    def blocking(self, unconsumed: int, *, stored: int, taken: int, forgone: int) -> int:
        """Returns the groups that count against admission: those in no batch yet, or as many as the lower end
        still misses.
        """
        if self._band is None or not self._band[0]:
            return unconsumed
        low = self._band[0]
        return max(unconsumed, math.ceil((low * stored - taken - forgone) / low))

    def exceeds(self, *, taken: int, num_groups: int, stored: int) -> bool:
        """Returns whether a batch of `num_groups` more would be above the upper end."""
        return self._band is not None and taken + num_groups > self._band[1] * stored

    def forgone(self, uses: int) -> int:
        """Returns the uses that a group that leaves after `uses` of them is not going to have."""
        return 0 if self._band is None else max(0, math.ceil(self._band[0]) - uses)
