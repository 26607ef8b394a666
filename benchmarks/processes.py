"""Tells what the processes of a command use."""

from __future__ import annotations

import contextlib

import psutil


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
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s
