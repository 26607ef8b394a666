"""Measures how long callers have waited."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class WaitTimer:
    """Adds up the seconds that callers spent waiting; waits still going on count too.

    with timer.running(clock):
        await something
    """

    def __init__(self) -> None:
        self._finished_s = 0.0
        self._started_s: list[float] = []

    @contextlib.contextmanager
    def running(self, clock: Callable[[], float]) -> Iterator[None]:
        """Counts the time inside the `with` block as waiting."""
        start_s = clock()
        self._started_s.append(start_s)
        try:
            yield
        finally:
            self._started_s.remove(start_s)
            self._finished_s += clock() - start_s

    def add(self, seconds: float) -> None:
        """Adds a wait that somebody else has measured."""
        self._finished_s += seconds

    def total_s(self, now_s: float) -> float:
        """Returns the seconds waited so far; `now_s` is on the clock given to `running`."""
        return self._finished_s + sum(now_s - start_s for start_s in self._started_s)
