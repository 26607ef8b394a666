"""Functions that may not end, called in a process that the kernel ends: `BoundedProcess`.

The process is a fork, with all that is imported; it starts in hundredths of a second. What is bounded is its
time on the CPU, so that a busy machine fails no honest call, by a timer of the kernel's, which also ends what
never returns to Python (`9**9**9`).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

MEMORY_BYTES = 1 << 30  # On top of what the process it is forked from has mapped.
WALL_FACTOR = 5.0
_PR_SET_PDEATHSIG = 1


class UnfinishedError(Exception):
    """A call did not end within its limits, or ended its process."""


class BoundedProcess:
    """A process that calls functions, made at the first call and again after each that did not end.

    prepare  called once, before the first fork: what it loads and caches, every process has
    """

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self._prepare: Callable[[], None] | None = prepare
        self._pid = self._parent_pid = 0
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Have the process ready for the first call."""
        with self._lock:
            # Another's, of whom this process is a fork.
            if self._connection is None or self._parent_pid != os.getpid():
                self._start()

    def call(self, limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns; function and arguments must pickle. Raises what it raises.

        Raises UnfinishedError where it takes longer than `limit_s` of CPU time, or needs more than
        MEMORY_BYTES.
        """
        with self._lock:
            return self._call(limit_s, function, arguments)

    def _call(self, limit_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            self._ask(limit_s, function, arguments)
        except OSError:  # It died while it was idle.
            self.close()
            self._ask(limit_s, function, arguments)
        assert self._connection is not None
        try:
            if self._connection.poll(1.0 + WALL_FACTOR * limit_s):
                result, error = self._connection.recv()
                if isinstance(error, MemoryError | RecursionError):
                    raise UnfinishedError
                if error is not None:
                    raise error
                return result
        except (EOFError, OSError):
            pass
        self.close()
        raise UnfinishedError

    def _ask(self, limit_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self._connection is None or self._parent_pid != os.getpid():
            self._start()
        assert self._connection is not None
        self._connection.send((limit_s, function, arguments))

    def _start(self) -> None:
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        ours, theirs = multiprocessing.Pipe()
        self._parent_pid = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                ours.close()
                _serve(theirs, self._parent_pid)
            os._exit(0)
        theirs.close()
        self._connection = ours

    def close(self) -> None:
        """End the process."""
        if self._connection is None or self._parent_pid != os.getpid():
            return
        self._connection.close()
        self._connection = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _serve(connection: Connection, parent_pid: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open("/proc/self/statm", encoding="ascii") as file:
        limit_bytes = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    while True:
        limit_s, function, arguments = connection.recv()
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:  # noqa: BLE001 - it is raised on the other side
            error = raised.with_traceback(None)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send((result, error))
