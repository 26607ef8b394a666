"""What the processes of a measurement spend: CPU time, and time in which a thread of theirs could have run
and had no core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

SERVED = "ray", "others"
"""What is counted together: Ray's control process and raylet; its agents, idle workers and whoever else."""


class Usage(NamedTuple):
    """CPU seconds, and seconds in which threads waited for a core."""

    cpu_s: float = 0.0
    delayed_s: float = 0.0

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu_s - other.cpu_s, self.delayed_s - other.delayed_s)

    def plus(self, other: Usage) -> Usage:
        """Returns the sum."""
        return Usage(self.cpu_s + other.cpu_s, self.delayed_s + other.delayed_s)


class Processes:
    """The processes of a measurement: those that have a name here, this one (`driver`), and what Ray has
    beside them.
    """

    def __init__(self, named: Mapping[str, int]) -> None:
        """Takes process ids by name."""
        self._names = {**{pid: name for name, pid in named.items()}, psutil.Process().pid: "driver"}

    def spent(self) -> dict[str, Usage]:
        """Returns what each name has spent so far."""
        found = dict.fromkeys((*self._names.values(), *SERVED), Usage())
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                found[self._name(process)] = found[self._name(process)].plus(_spent(process))
        return found

    def _name(self, process: psutil.Process) -> str:
        served = SERVED[0] if process.name() in ("gcs_server", "raylet") else SERVED[1]
        return self._names.get(process.pid, served)


def _spent(process: psutil.Process) -> Usage:
    times = process.cpu_times()
    return Usage(times.user + times.system, _delayed_s(process.pid))


def _delayed_s(pid: int) -> float:
    """Returns the second number of the kernel's schedstat, summed over the threads; 0 where there is none."""
    total_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):
            total_ns += int(path.read_text().split()[1])
    return total_ns / 1e9
