"""Nothing of a local run outlives its driver, not even one that was killed with SIGKILL.

Ray's workers end within seconds of their driver; two of its agents stay for minutes. So a driver that starts its own Ray also
starts this module as a process: it notes every process below the driver while it lives, waits for the driver's end of a pipe
to close, and after a grace period kills those that are left. (Not by a mark in their environment: Ray's processes overwrite
theirs when they set their titles.)
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import psutil

LOOK_S = 2.0
GRACE_S = 4.0
_guardians: list[subprocess.Popen[bytes]] = []  # Referenced, or the pipe would close at once.


def guard() -> None:
    """Start the guardian of this process. Call before starting anything else; again does nothing."""
    if not _guardians:
        # The pipe closes with this process, however it ends: nobody else holds its writing end.
        command = [sys.executable, __file__, str(os.getpid())]
        _guardians.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


def main(driver_pid: int) -> None:
    """Watch the family of `driver_pid` until standard input ends, then end what is left of it."""
    driver = psutil.Process(driver_pid)
    family: set[psutil.Process] = set()  # By pid and start time: a number that is used again is another process.
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        try:
            alive = {process for process in family if process.is_running()}
            family = alive | {process for process in driver.children(recursive=True) if process.pid != os.getpid()}
        except psutil.NoSuchProcess:
            break
    time.sleep(GRACE_S)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    main(int(sys.argv[1]))
