"""The pulse of a process that owes an answer: it is judged by looks at it, not by the clock alone.

    look ... look ... look ...     every one finds the ping answered, or not yet
              |     `-- 6 of them and 3 s without an answer: hung, unless the process is seen working (30 s then)
              `-- 4 of them and 2 s, and the process is seen to be stopped: hung

A supervisor that was itself paused finds much time gone, but has not looked: it accuses nobody. A process of
another node cannot be seen working: it gets 10 s.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import psutil

LIMIT_S, MIN_LOOKS = 3.0, 6
STOPPED_LIMIT_S, STOPPED_MIN_LOOKS = 2.0, 4
ELSEWHERE_LIMIT_S = 10.0
BUSY_LIMIT_S = 30.0
_BUSY_SHARE = 0.05  # A Ray worker that does nothing still uses about a percent of a core.


@dataclass
class Sight:
    """A process of this node: CPU seconds used so far, whether it is stopped (SIGSTOP, or a debugger),
    or waits for a disk.
    """

    cpu_s: float
    is_stopped: bool = False
    is_in_io: bool = False


def look_at(pid: int | None) -> Sight | None:
    """The process, None when it is not to be seen: of another node, or gone."""
    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        times, status = process.cpu_times(), process.status()
        is_stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return Sight(times.user + times.system, is_stopped, status == psutil.STATUS_DISK_SLEEP)
    except psutil.Error:
        return None


def stopped_child(pid: int | None) -> str | None:
    """A child of the process that is stopped, in words: an engine may have workers of its own. None
    where there is none.
    """
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True) if pid is not None else ():
            if child.status() == psutil.STATUS_STOPPED:
                return f"its process {child.pid} ({child.name()}) is stopped (SIGSTOP)"
    return None


@dataclass
class Pulse:
    """The looks at one process since its last answer."""

    answered_s: float
    looks: int = 0
    _first: Sight | None = field(default=None, repr=False)

    def answered(self, now_s: float) -> None:
        """The newest ping came back."""
        self.answered_s, self.looks, self._first = now_s, 0, None

    def missed(self, now_s: float, sight: Sight | None) -> str | None:
        """Notes one more look without an answer; says why the process counts as hung, None while it does
        not.
        """
        self.looks += 1
        silent_s = now_s - self.answered_s
        if self._first is None:
            self._first = sight
        if (
            sight is not None
            and sight.is_stopped
            and silent_s >= STOPPED_LIMIT_S
            and self.looks >= STOPPED_MIN_LOOKS
        ):
            return f"no answer for {silent_s:.0f} s, its process is stopped (SIGSTOP)"
        if silent_s < LIMIT_S or self.looks < MIN_LOOKS:
            return None
        if sight is None or self._first is None:
            return f"no answer for {silent_s:.0f} s" if silent_s >= ELSEWHERE_LIMIT_S else None
        is_busy = sight.is_in_io or sight.cpu_s - self._first.cpu_s > _BUSY_SHARE * silent_s
        if is_busy and silent_s < BUSY_LIMIT_S:
            return None
        return f"no answer for {silent_s:.0f} s, its process {'works but does not come back' if is_busy else 'does nothing'}"
