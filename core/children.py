"""Child processes that run users' code: started fresh, watched, and killed with all they started.

    start(code) --> Child: a new interpreter in a session of its own, and a socket to it
    family, used_bytes     its descendants, and the memory that they use together
    kill, describe_exit    the end of it, and how it came

Children are fresh interpreters, never forks (the parent runs vLLM's threads), and do not import the parent's
main module, which in an actor would be Ray. They end with the thread that started them. A child is a process
with limits, not a sandbox.

Memory is what was touched and is theirs, not what they have reserved: a reservation costs nothing and is
large (node, WebAssembly, CUDA and a mapped file take tens of GiB of address space). Pages of mapped files are
not counted either, since the kernel takes them back when it needs them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_OWN_PAGES = re.compile(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", re.MULTILINE)
_SHARED_OUT = re.compile(r"^(?:Pss_Anon|Pss_Shmem):\s+(\d+) kB", re.MULTILINE)


class Child(NamedTuple):
    """A process that was started, and the parent's end of the socket to it."""

    process: subprocess.Popen[bytes]
    socket: socket.socket


def start(function: str, environ: Mapping[str, str] | None = None) -> Child:
    """Starts a new interpreter that calls `function`, with a socket to it; see `run`."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return Child(run(function, theirs.fileno(), environ), ours)
        except BaseException:
            ours.close()
            raise


def run(function: str, fd: int, environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a new interpreter that calls `function`, "module:name", with the number of its socket and the
    parent's process id; the first thing that does is `die_with(parent_pid)`. `environ` is added to the
    environment variables that it inherits.

    Raises OSError when there is no process to be had.
    """
    module, _, name = function.partition(":")
    # The child imports what its parent would (Ray and pytest extend sys.path), but not the main module.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {name}; {name}({fd}, {os.getpid()})"
    options = ["-B"] if sys.dont_write_bytecode else []
    return subprocess.Popen(
        [sys.executable, *options, "-c", code],
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environ or {})},
        start_new_session=True,
    )


def die_with(parent_pid: int) -> None:
    """Lets the kernel end this process with the thread that started it; leaves at once where that is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # It died before prctl took effect.
        os._exit(0)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parents die, so that it finds and ends them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def parents() -> dict[int, int]:
    """Returns the parent of every process of this machine by its id. It reads all of /proc, 15 us each."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                # The command's name, in parentheses, may hold anything.
                found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGKILL to the process and all of its session. SIGTERM would wait for the next bytecode, which
    `9**9**9**9` never reaches.
    """
    if process.returncode is None:  # Not reaped yet, so the group id is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """Sends SIGKILL to every process that was started with the environment variable `mark`, "NAME=value",
    or by one that was, wherever it has gone; it looks again until there is none.
    """
    for _ in range(50):
        marked = [int(name) for name in os.listdir("/proc") if name.isdigit() and _has_mark(name, mark)]
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not marked:
            return
        time.sleep(0.002)


def _has_mark(pid: str, mark: str) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return mark.encode() in file.read().split(b"\0")
    return False


def describe_exit(returncode: int) -> str:
    """Returns how a process ended, in words: "SIGKILL (out of memory?)", "it exited with code 3"."""
    if returncode >= 0:
        return f"it exited with code {returncode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-returncode).name
        return f"{name} (out of memory?)" if name == "SIGKILL" else name
    return f"signal {-returncode}"


def family(pid: int) -> list[int]:
    """Returns the ids of the process and of its descendants; none when the process is gone."""
    with contextlib.suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def used_bytes(pids: Iterable[int], limit_bytes: int) -> int:
    """Returns the bytes that the processes use. Memory that several share counts once where the plain sum
    exceeds `limit_bytes`.
    """
    pids = list(pids)
    used = sum(_bytes_in(f"/proc/{pid}/status", _OWN_PAGES) for pid in pids)
    if used <= limit_bytes or len(pids) < 2:
        return used
    return sum(_bytes_in(f"/proc/{pid}/smaps_rollup", _SHARED_OUT) for pid in pids)  # Exact, and slow.


def shown_gib(num_bytes: int) -> str:
    """Returns GiB with three places, rounded up: what is more than a limit never looks like it."""
    return f"{-(-num_bytes * 1000 // 2**30) / 1000:.3f}"


def _bytes_in(path: str, pattern: re.Pattern[str]) -> int:
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        return 1024 * sum(int(kilobytes) for kilobytes in pattern.findall(file.read()))
    return 0
