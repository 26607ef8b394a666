"""The waits of the buffer's callers: how long they were, and whose turn it is when items are there."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


class WaitTimer:
    """Adds up the seconds that callers spent waiting; waits still going on count too.

    with timer.running(clock):
        await something
    """

    def __init__(self) -> None:
        self._finished_s = 0.0
        self._started_s: dict[object, float] = {}

    @contextlib.contextmanager
    def running(self, clock: Callable[[], float]) -> Iterator[None]:
        """Counts the time inside the `with` block as waiting."""
        wait, start_s = object(), clock()
        self._started_s[wait] = start_s
        try:
            yield
        finally:
            del self._started_s[wait]
            self._finished_s += clock() - start_s

    def add(self, seconds: float) -> None:
        """Adds a wait that somebody else has measured."""
        self._finished_s += seconds

    def total_s(self, now_s: float) -> float:
        """Returns the seconds waited so far; `now_s` is on the clock given to `running`."""
        return self._finished_s + sum(now_s - start_s for start_s in self._started_s.values())


@dataclass(eq=False)
class Waiter:
    """A caller: `actor` wants up to `num_items` items, which policy `version` is to generate."""

    actor: str
    num_items: int
    version: int | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Line:
    """Callers that wait for items. Those that came first are woken first, and no more of them than there
    are items for: what happens costs the same however many wait.

        waiter = Waiter("actor-0", num_items=4)
        with line.waiting(waiter):
            await waiter.woken.wait()             # until wake(...)
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Waiter, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextlib.contextmanager
    def waiting(self, waiter: Waiter) -> Iterator[None]:
        """Lets the waiter wait inside the `with` block; one that was woken for nothing is the first again."""
        self._waiting[waiter] = None
        if waiter.woken.is_set():
            waiter.woken.clear()
            self._waiting.move_to_end(waiter, last=False)
        try:
            yield
        finally:
            del self._waiting[waiter]

    def wake(self, num_items: int) -> None:
        """Wakes the first callers that want so many items together; one that was woken and has not come yet
        counts.
        """
        for waiter in self._waiting:
            if num_items <= 0:
                return
            waiter.woken.set()
            num_items -= waiter.num_items

    def wake_those(self, are_meant: Callable[[Waiter], bool]) -> None:
        """Wakes all callers that are meant. It looks at all that wait."""
        for waiter in self._waiting:
            if are_meant(waiter):
                waiter.woken.set()
