"""An event loop whose time is virtual: what takes a run hours passes in seconds.

    run_virtually(coroutine)

Waits cost nothing: where every task waits, the clock jumps to the next timer. The real buffer, board and
monitor run on it unchanged, since they take their time from the loop.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from core.calls import Calls

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Jumps the clock to the next timer instead of waiting for it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("deadlock: every task waits and no timer is running")
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` passes only where every task waits."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Returns virtual seconds since the loop was made."""
        return self._jumping.now_s

    def call_at(self, when: float, *arguments: Any, **named: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        """Calls a little late: a loop runs a timer up to 1e-9 s early, and what then still waits for that
        moment would be set anew for ever, as no time passes.
        """
        return super().call_at(math.floor(when * 1e8 + 2) / 1e8, *arguments, **named)


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs the coroutine to its end on virtual time. Raises AssertionError where all wait for ever."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)


class VirtualCalls(Calls):
    """Calls made on the running event loop, in place of one in a thread of its own."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self._loop = asyncio.get_running_loop()

    def watch(self, future: Future[Any], who: str, what: str) -> None:
        """Looks at what is dropped, but for what the end of the loop drops."""
        if not self._loop.is_closed():
            super().watch(future, who, what)
