"""Nothing of a local run outlives its driver, not even one that was killed with SIGKILL.

Ray's workers end within seconds of their driver; two of its agents stay for minutes. So a driver that starts its own Ray
marks its environment, which everything below it inherits, and starts this module as a process that waits for the driver's
end of a pipe to close. After a grace period it kills whatever still carries the mark.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid

import psutil

MARK = "AGRO_DRIVER"
GRACE_S = 4.0


def guard() -> None:
    """Mark this process's environment and start the guardian. Call before starting anything else; again does nothing."""
    if MARK in os.environ:
        return
    os.environ[MARK] = uuid.uuid4().hex
    # The pipe closes with this process, however it ends: nobody else holds its writing end.
    guardian = subprocess.Popen([sys.executable, __file__, os.environ[MARK]], stdin=subprocess.PIPE, start_new_session=True)
    _guardians.append(guardian)


_guardians: list[subprocess.Popen[bytes]] = []  # Referenced, or the pipe would close at once.


def marked(mark: str) -> list[psutil.Process]:
    """Processes whose environment carries `mark`, this one excepted."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue  # Gone, a zombie, or someone else's.
    return found


def main(mark: str) -> None:
    """Wait for the end of standard input, then end what is left."""
    sys.stdin.buffer.read()
    time.sleep(GRACE_S)
    for process in marked(mark):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    main(sys.argv[1])
