"""Says what of the machine a process may have: of its cores and its memory, within a container's limits."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def available_cpus() -> float:
    """Returns the CPUs of this process's affinity, or the container's quota if that is less."""
    count = float(len(os.sched_getaffinity(0)))
    limits = _cgroup_numbers("cpu.max")
    return min(count, limits[0] / limits[1]) if len(limits) == 2 else count


def available_memory_bytes() -> float:
    """Returns the machine's memory, or the container's limit if that is less."""
    return min([float(psutil.virtual_memory().total), *_cgroup_numbers("memory.max")])


def _cgroup_numbers(name: str) -> list[float]:
    """Returns the numbers in a cgroup-v2 file; empty when there is no such file or no limit (`max`)."""
    try:
        words = (Path("/sys/fs/cgroup") / name).read_text().split()
    except OSError:
        return []
    return [float(word) for word in words] if all(word.isdigit() for word in words) else []
