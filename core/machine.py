"""Says what of the machine a process may have, of its cores and its memory, within a container's limits; and
how often it collects garbage, which takes a core's time too: seldom while it loads its libraries.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_THRESHOLDS = gc.get_threshold()
LOADING_THRESHOLDS = (100_000, 20, 100)
ENGINE_THREAD = "engine"
"""What the thread of a rollout actor that makes its engine's steps is called, at most 15 letters."""


def available_cpus() -> float:
    """Returns the CPUs of this process's affinity, or the container's quota if that is less."""
    count = float(len(os.sched_getaffinity(0)))
    limits = _cgroup_numbers("cpu.max")
    return min(count, limits[0] / limits[1]) if len(limits) == 2 else count


def idle_cpu_seconds() -> float:
    """Returns a clock of what the CPUs that this process may have did not do: its growth over a time is the
    CPU seconds that were free. In a container with a quota it is the quota's, whatever the machine's others
    do.
    """
    limits, cores = _cgroup_numbers("cpu.max"), os.sched_getaffinity(0)
    if len(limits) == 2 and limits[0] / limits[1] < len(cores):
        return time.monotonic() * limits[0] / limits[1] - _cgroup_usage_s()
    rows = psutil.cpu_times(percpu=True)
    # Where some cores are hidden or offline, a row is no core's number: all are looked at.
    mine = [rows[core] for core in cores] if max(cores) < len(rows) else rows
    return sum(row.idle + row.iowait for row in mine)  # A core that waits for a disk is free too.


def call_thread(name: str) -> None:
    """Gives the calling thread a name that the kernel shows, as in `top -H`."""
    with contextlib.suppress(OSError):  # There is no /proc.
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name, encoding="ascii")


def shm_bytes() -> float:
    """Returns how much /dev/shm can hold; 0 where there is none."""
    folder = Path("/dev/shm")
    return float(shutil.disk_usage(folder).total) if folder.is_dir() else 0.0


@functools.cache
def pid_space() -> str:
    """Returns what all processes have in common that see one another by their process ids: the start of this
    machine's kernel, and the namespace of process ids. A host's name does not tell: containers may share it.
    It is taken where a sandbox hides the others.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def available_memory_bytes() -> float:
    """Returns the machine's memory, or the container's limit if that is less."""
    return min([float(psutil.virtual_memory().total), *_cgroup_numbers("memory.max")])


def _cgroup_usage_s() -> float:
    """Returns the CPU seconds that this container has used."""
    for line in (_CGROUP / "cpu.stat").read_text().splitlines():
        if line.startswith("usage_usec "):
            return int(line.split()[1]) / 1e6
    return 0.0


def _cgroup_numbers(name: str) -> list[float]:
    """Returns the numbers in a cgroup-v2 file; empty when there is no such file or no limit (`max`)."""
    try:
        words = (_CGROUP / name).read_text().split()
    except OSError:
        return []
    return [float(word) for word in words] if all(word.isdigit() for word in words) else []


def collect_seldom() -> None:
    """Makes the garbage collector rest while a process loads its libraries; Ray calls it in each new worker.

    Hundreds of thousands of objects come and none goes. At the usual thresholds all of them are visited again
    and again: a fifth of the CPU time that the imports of an actor take.
    """
    gc.set_threshold(*LOADING_THRESHOLDS)


def collect_as_usual(*, leave_out: bool = True) -> None:
    """Ends what `collect_seldom` began; what is there by now is left out of all later collections.

    The driver leaves nothing out: at its end libraries tell the user of what is not collected as of leaks.
    """
    if leave_out:
        gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
