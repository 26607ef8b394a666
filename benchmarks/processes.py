"""Tells what the processes of a command use, and ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil

from core.children import kill_marked


def tree_of(pid: int) -> list[psutil.Process]:
    """Returns the process and all that it has started, directly or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def tree_cpu_s(pid: int) -> float:
    """Returns the CPU seconds, of user and system, of these processes and of those of them that are gone."""
    total_s = 0.0
    for process in tree_of(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total_s += cpu_s_with_gone(process)
    return total_s


def cpu_s_with_gone(process: psutil.Process) -> float:
    """Returns the CPU seconds, of user and system, of the process and of those it started that are gone.
    Raises psutil.NoSuchProcess where it is gone itself.
    """
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def end_session(process: subprocess.Popen[str], mark: str, grace_s: float) -> None:
    """Ends a command that was started with `start_new_session` and the environment variable `mark`,
    "NAME=value", and all that it has started: its group gets SIGTERM, and who is there after `grace_s`, or
    has a session of its own, SIGKILL. Nothing happens where nobody is left.
    """
    deadline_s = time.monotonic() + grace_s
    if process.poll() is None:  # Not reaped, so the group is still its own.
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline_s:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    kill_marked(mark)
    process.wait()
