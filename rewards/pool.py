"""Reward functions in processes that can be killed: whatever a reward does, its group gets an answer and the others go on.

    submit() --> queue --> one thread per worker --(request: pickle)--> worker process: score_group
                                     |          <--(reply: msgpack)---
                                     '-- no reply within timeout_s, or the process died: kill, mark the group, start a new one

Why not pebble's ProcessPool: its workers share one channel, and a worker that dies while idle, or before its
acknowledgement was read (1 of 20 immediate `os._exit` under load), breaks the whole pool for good. Here a worker shares
nothing with the others. Workers are fresh interpreters, never forks (the parent runs vLLM's threads), and do not
import the parent's main module (in an actor that would be Ray). A process with limits, not a sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from cluster.errors import RewardError
from rewards.registry import WeightedReward, load_reward
from rewards.scoring import Scored, score_group, shorten

if TYPE_CHECKING:  # pydantic stays out of the workers
    from cluster.config import RewardsConfig

STARTUP_LIMIT_S = 60.0
CLOSE_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 4 << 30
_READY = b""
_PR_SET_PDEATHSIG = 1


class _Task(NamedTuple):
    request: bytes
    num_completions: int
    future: Future[list[Scored]]


class RewardPool:
    """Scores groups in `workers` processes. Use it as a context manager or call `close`.

    num_scored, num_errors    samples with a reward, and without one
    num_timeouts, num_crashes groups whose worker was killed at `timeout_s`, and groups whose worker died or did not start

    Raises RewardError from the constructor when a function cannot be loaded.
    """

    def __init__(self, config: RewardsConfig, workers: int = 1) -> None:
        for function in config.functions:
            load_reward(function.name)
        self._names = ", ".join(function.name for function in config.functions)
        self._timeout_s = config.timeout_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self.num_scored = self.num_errors = self.num_timeouts = self.num_crashes = 0
        functions = msgspec.msgpack.encode([(function.name, function.weight) for function in config.functions])
        self._workers = [_Worker(functions, config.timeout_s) for _ in range(workers)]
        # A worker is started by the thread that serves it: the kernel ends it with that thread (PR_SET_PDEATHSIG).
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name=f"reward-{index}", daemon=True)
            for index, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: str, completions: Sequence[str], columns: Mapping[str, Any]) -> Future[list[Scored]]:
        """Score one group; the result, one Scored per completion in order, never raises.

        It is there at most `timeout_s` after a worker took the group up (plus at most STARTUP_LIMIT_S where a new worker
        had to start). columns: the dataset row, anything that pickles.
        """
        future: Future[list[Scored]] = Future()
        try:
            request = pickle.dumps((prompt, list(completions), dict(columns)))
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            self._finish(_Task(b"", len(completions), future), f"the row cannot be sent to a worker: {error}")
            return future
        task = _Task(request, len(completions), future)
        with self._lock:
            if not self._closed:
                self._tasks.put(task)
                return future
        self._finish(task, "the reward pool is closed")
        return future

    def close(self) -> None:
        """Kill the workers, within 2 s. Groups not scored yet get the error that the pool was closed. Safe to call twice."""
        with self._lock:
            self._closed = True
        for worker in self._workers:
            worker.close()
        for _ in self._threads:
            self._tasks.put(None)
        deadline_s = time.monotonic() + CLOSE_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _serve(self, worker: _Worker) -> None:
        """The life of one worker's thread: groups in, results out, a new process after each failure."""
        while True:
            with contextlib.suppress(OSError, EOFError):  # no process to be had: met again, and reported, at the next group
                worker.start()
            task = self._tasks.get()
            if task is None:
                worker.reap()
                return
            if task.future.set_running_or_notify_cancel():
                self._score(worker, task)

    def _score(self, worker: _Worker, task: _Task) -> None:
        try:
            self._finish(task, worker.score(task.request, task.num_completions))
        except (TimeoutError, BlockingIOError):
            worker.reap()
            self._finish(task, f"timed out after {self._timeout_s:g} s ({self._names})", timeouts=1)
        except (OSError, EOFError, RewardError, msgspec.MsgspecError) as error:
            status = worker.reap()
            if self._closed:
                self._finish(task, "the reward pool was closed before this group was scored")
                return
            if isinstance(error, RewardError):
                reason = str(error)
            else:
                reason = f"the worker died: {status}" if status else f"no worker could be started: {error}"
            self._finish(task, f"{reason} ({self._names})", crashes=1)

    def _finish(self, task: _Task, outcome: list[Scored] | str, timeouts: int = 0, crashes: int = 0) -> None:
        """Count, then resolve the future: with `outcome`, or with that reason as the error of every sample."""
        scored = [Scored(error=shorten(outcome))] * task.num_completions if isinstance(outcome, str) else outcome
        num_errors = sum(sample.error is not None for sample in scored)
        with self._lock:
            self.num_scored += len(scored) - num_errors
            self.num_errors += num_errors
            self.num_timeouts += timeouts
            self.num_crashes += crashes
        task.future.set_result(scored)


class _Worker:
    """One worker process at a time and the socket to it. Used by one thread; only `close` may come from another."""

    def __init__(self, functions: bytes, timeout_s: float) -> None:
        self._functions = functions
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the process unless it runs; does not wait for it. Raises OSError, or EOFError when closed."""
        with self._lock:
            if self._closed:
                raise EOFError
            if self._process is not None and self._process.poll() is None:
                return
        self.reap()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # Imports as in the parent (Ray and pytest extend sys.path); its main module is left alone.
            code = f"import sys; sys.path[:] = {sys.path!r}; from rewards.pool import serve; serve({theirs.fileno()}, {os.getpid()})"
            with self._lock:
                if self._closed:
                    raise EOFError
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            # A process stopped in the middle of a message must not block us either. (0, 0) would mean no limit.
            seconds, microseconds = divmod(max(1, round(self._timeout_s * 1e6)), 1_000_000)
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, microseconds))
            self._connection = Connection(ours.detach())
        self._is_ready = False
        self._connection.send_bytes(self._functions)

    def score(self, request: bytes, num_completions: int) -> list[Scored]:
        """The reply to `request`.

        Raises TimeoutError or BlockingIOError (no reply in time), OSError or EOFError (the process died or could not
        start), RewardError (it cannot load the functions) or msgspec.MsgspecError (something else wrote to the socket).
        """
        self.start()
        assert self._connection is not None
        if not self._is_ready:
            self._await_ready(self._connection)
        deadline_s = time.monotonic() + self._timeout_s
        self._connection.send_bytes(request)
        if not self._connection.poll(max(0.0, deadline_s - time.monotonic())):
            raise TimeoutError
        scored = msgspec.msgpack.decode(self._connection.recv_bytes(), type=list[Scored])
        if len(scored) != num_completions:
            raise msgspec.ValidationError
        return scored

    def _await_ready(self, connection: Connection) -> None:
        if not connection.poll(STARTUP_LIMIT_S):
            raise RewardError(f"a worker did not load its functions within {STARTUP_LIMIT_S:g} s")
        answer = connection.recv_bytes()
        if answer != _READY:
            raise RewardError(f"a worker could not load its functions: {answer.decode(errors='replace')}")
        self._is_ready = True

    def reap(self) -> str | None:
        """Kill what is left of the process and its children, free the socket; how it ended, in words, or None if there was none."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        _kill(process)
        try:
            return _describe_exit(process.wait(timeout=1.0))
        except subprocess.TimeoutExpired:  # stuck in the kernel; it dies when it comes back
            return f"process {process.pid} does not react to SIGKILL"

    def close(self) -> None:
        """Kill the process and start no other. The thread that uses it notices the end of its socket."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all it started. SIGTERM would wait for the next bytecode, which `9**9**9**9` never reaches."""
    if process.returncode is None:  # not reaped yet, so the group id is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _describe_exit(returncode: int) -> str:
    if returncode >= 0:
        return f"it exited with code {returncode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-returncode).name
        return f"{name} (out of memory?)" if name == "SIGKILL" else name
    return f"signal {-returncode}"


def serve(fd: int, parent_pid: int) -> None:
    """The worker process: load the functions named on socket `fd`, then score groups until the socket closes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before prctl took effect
        return
    os.set_inheritable(fd, False)
    with contextlib.suppress(EOFError, OSError):  # Of the socket: the actor is gone, perhaps in the middle of a message.
        _answer_requests(Connection(fd))


def _answer_requests(connection: Connection) -> None:
    names_and_weights = msgspec.msgpack.decode(connection.recv_bytes(), type=list[tuple[str, float]])
    try:
        functions = [WeightedReward(name, weight, load_reward(name)) for name, weight in names_and_weights]
    except RewardError as error:
        connection.send_bytes(str(error).encode())
        return
    _limit_memory()
    connection.send_bytes(_READY)
    while True:
        prompt, completions, columns = pickle.loads(connection.recv_bytes())
        connection.send_bytes(msgspec.msgpack.encode(score_group(functions, prompt, completions, columns)))


def _limit_memory() -> None:
    """Address space: what the imports took plus MEMORY_LIMIT_BYTES. A runaway allocation then raises MemoryError in the worker."""
    with open("/proc/self/statm", encoding="ascii") as file:
        baseline_bytes = int(file.read().split()[0]) * resource.getpagesize()
    limit_bytes = baseline_bytes + MEMORY_LIMIT_BYTES
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_AS)
    if hard_bytes != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
