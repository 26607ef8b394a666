"""What our own code logs as a warning becomes an event: nobody looks into Ray's session folder for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

ROOMS = ("actors", "buffer", "cluster", "core", "environments", "learner", "rewards")


class OwnWarnings(logging.Handler):
    """Collects warnings and errors of the rooms' loggers in this process, each text once, until `connect`
    says where to tell them.

        warnings = OwnWarnings()                # at the start of the process
        warnings.connect(monitor.event)         # once there is somebody to tell
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._tell: Callable[[str], object] | None = None
        self._told: dict[str, None] = {}
        for room in ROOMS:
            logging.getLogger(room).addHandler(self)

    def connect(self, tell: Callable[[str], object]) -> None:
        """Tells `tell` of each warning from now on, and of those that came before."""
        self._tell = tell
        for text in self._told:
            tell(text)

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one more warning from the logging module."""
        text = record.getMessage()
        if getattr(record, "is_event", False):  # An event that the monitor did not take (core/calls.py).
            return
        if text not in self._told:
            self._told[text] = None
            if self._tell is not None:
                self._tell(text)

    def close(self) -> None:
        """Stops listening."""
        for room in ROOMS:
            logging.getLogger(room).removeHandler(self)
        super().close()
