"""A clock for what must be done soon, which runs as fast as the machine works."""

from __future__ import annotations

import contextlib
import os
import threading
import time

LOOK_S = 0.02
LONGEST_LOOK_S = 0.1
"""More between two looks is a machine that stood still."""


class MachineClock:
    """Counts the seconds in which a process could work: a third where six want to run on two cores."""

    def __init__(self) -> None:
        self._counted_s, self._last_s = 0.0, time.monotonic()
        self._lock = threading.Lock()
        # Opened once: a test that counts its files would count one that is open for a moment, now and then.
        self._stat: int | None = None
        with contextlib.suppress(OSError):
            self._stat = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        threading.Thread(target=self._run, name="machine clock", daemon=True).start()

    def now_s(self) -> float:
        """Returns the seconds so far."""
        with self._lock:
            before_s, self._last_s = self._last_s, time.monotonic()
            self._counted_s += min(self._last_s - before_s, LONGEST_LOOK_S) / self._crowd()
            return self._counted_s

    def _run(self) -> None:
        while True:
            self.now_s()
            time.sleep(LOOK_S)

    def _crowd(self) -> float:
        """Returns how many want to run on each core; 1.0 where a core is free, or nobody tells."""
        if self._stat is None:
            return 1.0
        with contextlib.suppress(OSError, ValueError):
            for line in os.pread(self._stat, 2**20, 0).splitlines():
                if line.startswith(b"procs_running "):
                    return max(1.0, int(line.split()[1]) / (os.cpu_count() or 1))
        return 1.0


_clocks: list[MachineClock] = []


def machine_s() -> float:
    """In place of `time.monotonic()` on both sides of what a bound of seconds is asserted of."""
    if not _clocks:
        _clocks.append(MachineClock())
    return _clocks[0].now_s()
