"""Says which of several sources of prompts an ordinal of the prompt stream takes its prompt from. Pure.

    ordinal --locate--> (source, how many ordinals before it the source had)

The sources take turns in a pattern that repeats: after any number of ordinals each has had its share of them
to less than one. The pattern is that of R. Tijdeman, "The chairman assignment problem" (1980): of those whose
turn may come, the one whose turn must come first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A source of prompts: how many it has, and its share, a whole number, of the sum of all shares."""

    num_prompts: int
    share: int


def locate(ordinal: int, shares: tuple[int, ...]) -> tuple[int, int]:
    """Returns the number of the source that `ordinal` belongs to, and how many of the ordinals before it do.

    Shares are whole numbers of at least 1. Example: with shares (2, 1) the ordinals 0 to 5 belong to the
    sources 0, 1, 0, 0, 1, 0, and `locate(3, (2, 1))` is (0, 2).
    """
    sources, before = _pattern(shares)
    period, place = divmod(ordinal, len(sources))
    source = sources[place]
    return source, period * shares[source] + before[place]


@functools.lru_cache(maxsize=4)
def _pattern(shares: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns, for each place of one period, whose turn it is, and how often its turn came before."""
    total, slack = sum(shares), 2 * len(shares) - 2
    counts = [0] * len(shares)
    sources, before = [], []
    for place in range(1, total + 1):
        # Deficits and their bound 1/slack are multiplied by total * slack: all are whole numbers.
        deficits = [
            (place * share - total * count) * slack for share, count in zip(shares, counts, strict=True)
        ]
        ready = [source for source, deficit in enumerate(deficits) if deficit >= total]
        # The sooner the deficit would reach 1 - 1/slack, the more urgent; compared as (numerator / share).
        chosen = min(
            ready or [0],
            key=lambda source: ((total * (slack - 1) - deficits[source]) / shares[source], source),
        )
        sources.append(chosen)
        before.append(counts[chosen])
        counts[chosen] += 1
    return tuple(sources), tuple(before)


def stream_state(seed: int, num_prompts: int, parts: tuple[Part, ...], num_shards: int = 1) -> dict[str, Any]:
    """Returns what the prompt stream of a run depends on, as JSON keeps it: where it differs, ordinals mean
    other prompts.
    """
    state: dict[str, Any] = {"seed": seed, "num_prompts": num_prompts}
    state |= {"parts": [list(part) for part in parts]} if parts else {}
    return state | ({"prompts_of_shards": num_shards} if num_shards > 1 else {})
