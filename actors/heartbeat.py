"""Answers what may be asked of a running actor from outside its loop: whether that still turns, and what it
is doing.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback


class Heartbeat:
    """The base of the actors. `ping` and `stacks` are safe from any thread while `run` runs in another."""

    _turned_s: float | None = None

    def ping(self) -> float:
        """Returns the seconds since the loop last turned, 0 before it runs.

        A hung engine lets it grow; a stopped process does not answer.
        """
        return 0.0 if self._turned_s is None else time.monotonic() - self._turned_s

    def stacks(self) -> str:
        """Returns where every thread of this process is, by its name, most recent call last."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames().items()
        return "\n".join(
            f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
        )

    def _beat(self) -> None:
        """Notes that the loop is alive; called once a turn."""
        self._turned_s = time.monotonic()
