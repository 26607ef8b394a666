"""Warnings of this process, counted by their text: what the driver's monitor makes events of.

Nobody looks into Ray's session folder for a warning. One that is logged a thousand times a second is sent
once, with its count, and told as often as its count gains a digit (`Monitor.warn`).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence

ROOMS = ("actors", "buffer", "cluster", "core", "environments", "learner", "rewards")
LIBRARIES = ("vllm", "DeepSpeed")
"""Loggers that keep to themselves what they log, so that the root logger does not see it."""
MAX_TEXTS = 100
MAX_CHARS = 500
OTHERS = "further warnings are in its log only"


class OwnWarnings(logging.Handler):
    """Counts warnings of the rooms' loggers and errors of everybody's until they are taken. Safe from any
    thread. `warnings = OwnWarnings()` at the start of a process, `monitor.warn(name, warnings.take())` now
    and again, `warnings.end()`.

    `loggers` are those that it hears; None is the root logger, by which all others come.
    """

    def __init__(self, loggers: Sequence[str | None] = (*LIBRARIES, None)) -> None:
        super().__init__(logging.WARNING)
        self._lock_of_counts = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._known: set[str] = set()
        self._loggers = loggers
        self._listen()

    def _listen(self) -> None:
        for name in self._loggers:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """One record more, which comes here twice where its logger passes it on to the root logger."""
        if getattr(record, "is_event", False):  # An event that the monitor did not take (core/calls.py).
            return
        is_own = record.name.partition(".")[0] in ROOMS
        counted_by = record.__dict__.setdefault("counted_by", set())
        if id(self) in counted_by or not (is_own or record.levelno >= logging.ERROR):
            return
        counted_by.add(id(self))
        text = record.getMessage()[:MAX_CHARS]
        with self._lock_of_counts:
            if text not in self._known and len(self._known) >= MAX_TEXTS:
                text = OTHERS
            self._known.add(text)
            self._counts[text] += 1

    def take(self) -> dict[str, int]:
        """How often each text was logged since the last call."""
        self._listen()  # Again: a library that configures its logger (vLLM) throws out who is there.
        with self._lock_of_counts:
            taken, self._counts = self._counts, Counter()
        return dict(taken)

    def end(self) -> None:
        """Listens no more. Not `close`: logging.config.dictConfig, which vLLM and uvicorn call, closes every
        handler of the process.
        """
        for name in self._loggers:
            logging.getLogger(name).removeHandler(self)
        self._loggers = ()
        self.close()
