"""Compares two or more ways of doing one thing in one run: in turns, by medians of pairs, with their spread.

    found = interleave({"ours": timed(ours), "bare": timed(bare)}, rounds=5)
    compare(found["bare"], found["ours"])        # Ratio(median, least, most) of the rounds' own ratios

A machine that slows down for a while slows both halves of a pair, so that their ratio stays; what one round
says alone is in the spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """A ratio of two figures over some pairs: its median, and the least and the most that a pair gave."""

    median: float
    least: float
    most: float

    def fields(self, name: str) -> dict[str, float]:
        """Returns the columns of a row of results: `name`, `name`_least and `name`_most."""
        return {name: self.median, f"{name}_least": self.least, f"{name}_most": self.most}


def interleave(
    calls: Mapping[str, Callable[[], float]], rounds: int, *, warm_rounds: int = 0
) -> dict[str, list[float]]:
    """Returns the figures that each call gave in so many rounds.

    Every other round goes backwards, so that no call always has the same neighbour. Rounds that warm up come
    first and are forgotten.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_rounds + rounds):
        names = list(calls)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            figure = calls[name]()
            if number >= warm_rounds:
                found[name].append(figure)
    return found


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Returns a call that gives the seconds that `call` takes, by this clock.

    By `time.process_time`, other programs on the machine hardly count.
    """

    def seconds() -> float:
        start_s = clock()
        call()
        return clock() - start_s

    return seconds


def compare(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Returns `over` divided by `under`, round by round."""
    ratios = [mine / other for mine, other in zip(over, under, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
