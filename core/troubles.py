"""Failures that repeat, such as those of a full disk: a line when they begin, and a line with their count
when they are over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

QUIET_S = 5.0


class Troubles:
    """Tells what fails again and again only twice: when it begins, and, with its count, when it is over. Safe
    from any thread.

        troubles.note("samples.jsonl", error)      # told once, then counted
        troubles.well("samples.jsonl")             # "samples.jsonl: no more, after 214 failures in 30 s"

    A failure is over when it goes well `QUIET_S` after the last one: a disk that is nearly full takes one
    thing and refuses the next.
    """

    def __init__(self, tell: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._lock = threading.Lock()
        self._open: dict[
            str, tuple[int, float, float]
        ] = {}  # Count, time of the first failure, time of the last.

    def note(self, what: str, error: object) -> None:
        """Notes that `what` failed once more; `error` says why."""
        now_s = self._clock()
        with self._lock:
            count, first_s, _ = self._open.get(what, (0, now_s, now_s))
            self._open[what] = (count + 1, first_s, now_s)
        if not count:
            self._tell(f"{what}: {str(error).strip()}")

    def well(self, what: str) -> None:
        """Notes that `what` went well."""
        with self._lock:
            count, first_s, last_s = self._open.get(what, (0, 0.0, 0.0))
            if not count or self._clock() - last_s < QUIET_S:
                return
            del self._open[what]
        self._tell(
            f"{what}: no more, after {count} failure{'' if count == 1 else 's'} in {last_s - first_s:.0f} s"
        )
