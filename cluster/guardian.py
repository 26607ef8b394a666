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
import subprocess
import sys
import time

import psutil

LOOK_S = 2.0
GRACE_S = 4.0
_guardians: list[subprocess.Popen[bytes]] = []  # Without a reference the pipe would close at once.


def guard() -> None:
    """Starts the guardian of this process, before anything else starts; a second call does nothing."""
    if not _guardians:
        # The pipe closes with this process, however it ends: nobody else holds its writing end.
        command = [sys.executable, __file__, str(os.getpid())]
        _guardians.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


def main(driver_pid: int) -> None:
    """Watches the family of `driver_pid` until standard input ends, then ends what is left of it."""
    try:
        family = {psutil.Process(driver_pid)}
    except psutil.NoSuchProcess:
        return
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        family = _with_descendants(family)
    time.sleep(GRACE_S)
    for process in family | _of_ray_session(driver_pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _of_ray_session(driver_pid: int) -> set[psutil.Process]:
    """Returns the workers that the raylet started since the last look, which are orphans by now.

    Their command lines name the session, and that name ends in the driver's pid.
    """
    session = re.compile(rf"/session_[\d_-]+_{driver_pid}/")
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if session.search(" ".join(process.info["cmdline"] or []))
    }


def _with_descendants(family: set[psutil.Process]) -> set[psutil.Process]:
    """Returns those of the family that still run, and every process below them, but not this one."""
    # Processes compare by pid and start time: a pid that is used again is another process.
    found = {process for process in family if process.is_running()}
    known = {process.pid for process in found} - {os.getpid()}
    children: dict[int, list[psutil.Process]] = {}
    # One pass over all processes; `children()` would make one for each member of the family.
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process)
    waiting = list(known)
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child.pid not in known and child.pid != os.getpid():
                known.add(child.pid)
                found.add(child)
                waiting.append(child.pid)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]))
