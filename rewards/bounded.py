"""`BoundedProcess` calls functions that may never return, in a process that the kernel ends.

The process is a fork that has everything imported already, so it starts in hundredths of a second. Its time
on the CPU is bounded, not the time on the clock, so that a busy machine fails no honest call. A timer of the
kernel does that; it also ends a call that never returns to Python (`9**9**9`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

MEMORY_BYTES = 1 << 30  # In addition to what the parent had mapped at the fork.
WALL_FACTOR = 5.0
_PR_SET_PDEATHSIG = 1


class UnfinishedError(Exception):
    """A call did not end within its limits, or it ended its process."""


class BoundedProcess:
    """A process that calls functions; it is forked at the first call, and again after each call that did not
    end.

        process = BoundedProcess(prepare=load_tables)
        process.call(0.3, sympy.simplify, text)      # raises UnfinishedError after 0.3 s of CPU time

    `prepare` is called once, before the first fork: every later process has what it loads and caches.
    """

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self._prepare: Callable[[], None] | None = prepare
        self._pid = self._parent_pid = 0
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Forks the process ahead of the first call, so that the first call does not pay for it."""
        with self._lock:
            # This process is itself a fork, and the child belongs to its parent.
            if self._connection is None or self._parent_pid != os.getpid():
                self._start()

    def call(self, limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what `function(*arguments)` returns, and raises what it raises; function and arguments must
        pickle.

        Raises UnfinishedError when the call takes more than `limit_s` seconds of CPU time or needs more than
        MEMORY_BYTES.
        """
        with self._lock:
            return self._call(limit_s, function, arguments)

    def _call(self, limit_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            self._ask(limit_s, function, arguments)
        except OSError:  # The process died while it was idle: a new one is asked once.
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
        """Kills the process; a later call forks a new one."""
        if self._connection is None or self._parent_pid != os.getpid():
            return
        self._connection.close()
        self._connection = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _serve(connection: Connection, parent_pid: int) -> None:
    # A full collection would visit, and so copy, all that the parent had: more than an honest call's time.
    gc.freeze()
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
