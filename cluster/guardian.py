"""Nothing of a local run outlives its driver, not even one that was killed with SIGKILL.

Ray's workers end within seconds of their driver; two of its agents stay for minutes. So a driver that starts
its own Ray also starts this module as a process: it notes every process below the driver while it lives,
waits for the driver's end of a pipe to close, and after a grace period kills those that are left. (Not by a
mark in their environment: Ray's processes overwrite theirs when they set their titles.)
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

LOOK_S = 2.0
GRACE_S = 4.0
_guardians: list[subprocess.Popen[bytes]] = []  # Without a reference the pipe would close at once.


def guard() -> None:
    """Starts the guardian of this process, before anything else starts; a second call does nothing."""
    if not _guardians:
        # The pipe closes with this process, however it ends: nobody else holds its writing end.
        command = [sys.executable, __file__, str(os.getpid())]
        _guardians.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


class Relative(NamedTuple):
    """A process by its id and the moment of its start, in the kernel's ticks: an id that is used again is
    another process.
    """

    pid: int
    started: int


def main(driver_pid: int) -> None:
    """Watches the family of `driver_pid` until standard input ends, then ends what is left of it."""
    family = {process for process in _parents() if process.pid == driver_pid}
    if not family:
        return
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        family = _with_descendants(family)
    time.sleep(GRACE_S)
    for process in family.intersection(_parents()) | _of_ray_session(driver_pid):
        with contextlib.suppress(OSError):  # It has ended, or is another user's.
            os.kill(process.pid, signal.SIGKILL)


def _of_ray_session(driver_pid: int) -> set[Relative]:
    """Returns the workers that the raylet started since the last look, which are orphans by now.

    Their command lines name the session, and that name ends in the driver's pid.
    """
    session = re.compile(rf"/session_[\d_-]+_{driver_pid}/".encode())
    found = set()
    for process in _parents():
        with contextlib.suppress(OSError):  # It has ended.
            found |= {process} if session.search(Path(f"/proc/{process.pid}/cmdline").read_bytes()) else set()
    return found


def _with_descendants(family: set[Relative]) -> set[Relative]:
    """Returns those of the family that still run, and every process below them, but not this one."""
    children: dict[int, list[Relative]] = {}
    parents = _parents()
    for process, parent_pid in parents.items():
        children.setdefault(parent_pid, []).append(process)
    found = {process for process in family if process in parents}
    waiting = [*found]
    while waiting:
        for child in children.get(waiting.pop().pid, []):
            if child not in found and child.pid != os.getpid():
                found.add(child)
                waiting.append(child)
    return found


def _parents() -> dict[Relative, int]:
    """Returns the processes of this machine, and the id of the parent of each.

    A run with environments has hundreds of processes: psutil takes ten times as long.
    """
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # It has ended.
                # Behind the name, which may hold anything: state, parent, ... and as the 20th the start.
                fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                found[Relative(int(entry), int(fields[19]))] = int(fields[1])
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]))
