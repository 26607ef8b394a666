"""One worker process of the reward pool, seen from both sides: `Worker` starts, asks, watches and kills it;
`serve` is its life.

Worker                                                          serve
  start ----- functions (msgpack) --------------------------->  load them
  load  <---- Loaded: what they need, or why not (msgpack) ---
  score ----- prompt, completions, columns (pickle) --------->  score_group
        <---- one Scored per completion (msgpack) ------------
  killed: no reply in time, or more memory than allowed
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import subprocess
import threading
import time
from multiprocessing.connection import Connection

import msgspec

from core import children
from core.errors import RewardError
from rewards.registry import WeightedReward, load_reward, needed_columns, read_name
from rewards.scoring import Scored, score_group
from rewards.signature import takes_messages

STARTUP_LIMIT_S = 60.0
LOOK_EVERY_S = 0.1
FAMILY_EVERY_S = 0.5  # Finding descendants reads all of /proc.


class FunctionSpec(msgspec.Struct, frozen=True):
    """A configured reward function, as the worker process is told of it."""

    name: str
    weight: float = 1.0


class Loaded(msgspec.Struct, frozen=True):
    """A worker's first message: per function the columns it cannot be called without, or an `error`."""

    columns: list[tuple[str, ...]] = []
    error: str | None = None


class MemoryExceeded(RewardError):
    """A worker and its children used more memory than they may."""


class Worker:
    """One worker process at a time, and the socket to it. One thread uses it; only `close` may come from
    another.

    functions     a msgpack list of FunctionSpec that the process loads
    timeout_s     the limit for one group
    memory_bytes  what the process and its children may use together

    `RewardPool` makes one per thread and calls `load`, then `score` for each group, and `reap` after a
    failure.
    """

    def __init__(self, functions: bytes, timeout_s: float, memory_bytes: int) -> None:
        self._functions = functions
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._loaded: Loaded | None = None

    def start(self) -> None:
        """Starts the process unless it runs, and does not wait for it. Raises OSError, or EOFError when this
        worker is closed.
        """
        with self._lock:
            if self._closed:
                raise EOFError
            if self._process is not None and self._process.poll() is None:
                return
        self.reap()
        with self._lock:
            if self._closed:
                raise EOFError
            self._process, ours = children.start("rewards.worker:serve")
        with ours:
            # A process stopped in the middle of a message must not block us either. (0, 0) would mean no
            # limit.
            seconds, microseconds = divmod(max(1, round(self._timeout_s * 1e6)), 1_000_000)
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, microseconds))
            self._connection = Connection(ours.detach())
        self._loaded = None
        self._connection.send_bytes(self._functions)

    def load(self) -> list[tuple[str, ...]]:
        """Returns, per function, the columns it cannot be called without, as soon as all functions are
        loaded.

        Raises RewardError when one cannot be loaded, or not within STARTUP_LIMIT_S, and OSError or EOFError
        when the process died.
        """
        self.start()
        assert self._connection is not None
        if self._loaded is None:
            if not self._has_answer(self._connection, time.monotonic() + STARTUP_LIMIT_S):
                names = ", ".join(
                    spec.name for spec in msgspec.msgpack.decode(self._functions, type=list[FunctionSpec])
                )
                raise RewardError(
                    f"reward functions {names}: importing them did not end within {STARTUP_LIMIT_S:g} s"
                )
            loaded = msgspec.msgpack.decode(self._connection.recv_bytes(), type=Loaded)
            if loaded.error is not None:
                raise RewardError(loaded.error)
            self._loaded = loaded
        return self._loaded.columns

    def score(self, request: bytes, num_completions: int) -> list[Scored]:
        """Returns the reply to `request`.

        Raises TimeoutError or BlockingIOError (no reply in time), OSError or EOFError (the process died or
        could not start), MemoryExceeded, RewardError (it cannot load the functions), or msgspec.MsgspecError
        (something else wrote to the socket).
        """
        self.load()
        assert self._connection is not None
        deadline_s = time.monotonic() + self._timeout_s
        self._connection.send_bytes(request)
        if not self._has_answer(self._connection, deadline_s):
            raise TimeoutError
        scored = msgspec.msgpack.decode(self._connection.recv_bytes(), type=list[Scored])
        if len(scored) != num_completions:
            raise msgspec.ValidationError
        return scored

    def _has_answer(self, connection: Connection, deadline_s: float) -> bool:
        """Waits for a message until the deadline and returns whether there is one. Raises MemoryExceeded."""
        assert self._process is not None
        pids, found_s = [self._process.pid], time.monotonic()
        while not connection.poll(max(0.0, min(LOOK_EVERY_S, deadline_s - time.monotonic()))):
            now_s = time.monotonic()
            if now_s >= deadline_s:
                return False
            if now_s - found_s >= FAMILY_EVERY_S:
                pids, found_s = children.family(self._process.pid), now_s
            used = children.used_bytes(pids, self._memory_bytes)
            if used > self._memory_bytes:
                raise MemoryExceeded(
                    f"the worker used {children.shown_gib(used)} GiB of memory with its children, more than "
                    f"rewards.memory_gib = {self._memory_bytes / 2**30:g}"
                )
        return True

    def reap(self) -> str | None:
        """Kills what is left of the process and its children, frees the socket, and says how the process
        ended; None if there was none.
        """
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        children.kill(process)
        try:
            return children.describe_exit(process.wait(timeout=1.0))
        except subprocess.TimeoutExpired:  # stuck in the kernel; it dies when it comes back
            return f"process {process.pid} does not react to SIGKILL"

    def close(self) -> None:
        """Kills the process and lets no other start. The thread that uses this worker notices the end of its
        socket.
        """
        with self._lock:
            self._closed = True
            if self._process is not None:
                children.kill(self._process)


# --- The process ---


def serve(fd: int, parent_pid: int) -> None:
    """Lives the worker process: loads the functions named on socket `fd`, then scores groups until the socket
    closes.
    """
    children.die_with(parent_pid)
    os.set_inheritable(fd, False)
    # The socket ends when the actor is gone, perhaps in the middle of a message.
    with contextlib.suppress(EOFError, OSError):
        _answer_requests(Connection(fd))


def _load(spec: FunctionSpec) -> WeightedReward:
    function = load_reward(spec.name)
    if read_name(spec.name).is_builtin:
        getattr(function, "prepare", lambda: None)()
    messages = read_name(spec.name).messages or takes_messages(function)
    return WeightedReward(spec.name, spec.weight, function, messages)


def _answer_requests(connection: Connection) -> None:
    specs = msgspec.msgpack.decode(connection.recv_bytes(), type=list[FunctionSpec])
    try:
        functions = [_load(spec) for spec in specs]
    except RewardError as error:
        connection.send_bytes(msgspec.msgpack.encode(Loaded(error=str(error))))
        return
    loaded = Loaded([needed_columns(reward.name, reward.function) for reward in functions])
    connection.send_bytes(msgspec.msgpack.encode(loaded))
    while True:
        scored = score_group(functions, *pickle.loads(connection.recv_bytes()))
        connection.send_bytes(msgspec.msgpack.encode(scored))
