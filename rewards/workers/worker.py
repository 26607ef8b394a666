"""One worker process of the reward pool, seen from both sides: `Worker` starts, asks, watches and kills it;
`serve` is its life.

Worker                                                                   serve
  start   ----- functions (msgpack) ---------------------------------->  load them
  load    <---- Loaded: what each needs, or why not (msgpack) ----------
  ask     ----- Request: a function, completions (msgpack, pickle) ---->  call it
  receive <---- WorkerReply: values, or why there are none (msgpack) ---------
          <---- WorkerReply without a number: the event loop turns
  killed: no reply in time, or more memory than allowed

A process that was asked for a plain function calls one at a time, in its main thread (a function may set
signals and run event loops of its own). Asked for an `async def` one, it is an event loop from then on, which
calls many at once; the pool asks one process for functions of one kind only.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import subprocess
import threading
import time
from multiprocessing.connection import Connection

import msgspec

from core import children
from core.errors import RewardError
from core.own_warnings import OwnWarnings
from core.text import printable
from rewards.registry import WeightedReward, load_reward, read_name
from rewards.scoring import CallFailed, Completions, Value, call, describe, read_answers
from rewards.signature import is_asynchronous, takes_messages

STARTUP_LIMIT_S = 60.0
LOOK_EVERY_S = 0.1
FAMILY_EVERY_S = 0.5  # Finding descendants reads all of /proc.
BEAT = -1
"""The number of a reply that only says that the event loop turns."""


class FunctionSpec(msgspec.Struct, frozen=True):
    """A configured reward function, as the worker process is told of it."""

    name: str
    weight: float = 1.0


class LoadedFunction(msgspec.Struct, frozen=True):
    """What a function is.

    columns    the columns of the dataset that it cannot be called without
    own        what of the completions it cannot be called without (signature.OWN)
    is_async   whether it is written `async def`
    votes      whether it can tell a completion's answer
    timeout_s  its own limit for one call, where it has one (its attribute `timeout_s`)
    """

    columns: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    is_async: bool = False
    votes: bool = False
    timeout_s: float | None = None


class Loaded(msgspec.Struct, frozen=True):
    """A worker's first message: what its functions are, or an `error`."""

    functions: list[LoadedFunction] = []
    error: str | None = None


class Request(msgspec.Struct, frozen=True):
    """A call: the function by its place, the completions at `places` of the group in `payload` (pickled
    Completions), and the limit, which an event loop keeps by itself.
    """

    number: int
    function: int
    places: tuple[int, ...]
    limit_s: float
    votes: bool
    payload: bytes


class WorkerReply(msgspec.Struct, frozen=True):
    """What became of the request of this number: values and votes, or an `error`. `warnings` are what was
    logged meanwhile, whoever did.
    """

    number: int
    values: list[Value] = []
    votes: list[str | None] = []
    error: str | None = None
    timed_out: bool = False
    warnings: tuple[str, ...] = ()


_ENCODER, _REPLY = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(WorkerReply)


class MemoryExceeded(RewardError):
    """A worker and its children used more memory than they may."""


class Worker:
    """One worker process at a time, and the socket to it. One thread uses it; only `close` and `wake` may
    come from others.

    functions     a msgpack list of FunctionSpec that the process loads
    timeout_s     the limit for a message to pass
    memory_bytes  what the process and its children may use together

    `RewardPool` makes one per thread and calls `load`, then `ask` and `receive`, and `reap` after a failure.
    """

    def __init__(self, functions: bytes, timeout_s: float, memory_bytes: int) -> None:
        self._functions = functions
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._loaded: Loaded | None = None
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._pids: list[int] = []
        self._found_s = 0.0

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
            self._process, ours = children.start("rewards.workers.worker:serve")
        with ours:
            # A process stopped in the middle of a message must not block us either. (0, 0) would mean no
            # limit.
            seconds, microseconds = divmod(max(1, round(self._timeout_s * 1e6)), 1_000_000)
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, microseconds))
            self._connection = Connection(ours.detach())
        self._loaded = None
        self._pids, self._found_s = [self._process.pid], time.monotonic()
        self._connection.send_bytes(self._functions)

    @property
    def is_loaded(self) -> bool:
        """Returns whether the process is there and has loaded the functions."""
        return self._loaded is not None

    def load(self) -> list[LoadedFunction]:
        """Returns what the functions are, as soon as all of them are loaded.

        Raises RewardError when one cannot be loaded, or not within STARTUP_LIMIT_S, and OSError or EOFError
        when the process died.
        """
        if self._loaded is None:
            self.start()
            assert self._connection is not None
            deadline_s = time.monotonic() + STARTUP_LIMIT_S
            while not self._connection.poll(LOOK_EVERY_S):
                self.check_memory()
                if time.monotonic() >= deadline_s:
                    specs = msgspec.msgpack.decode(self._functions, type=list[FunctionSpec])
                    raise RewardError(
                        f"reward functions {', '.join(spec.name for spec in specs)}: importing them did not "
                        f"end within {STARTUP_LIMIT_S:g} s"
                    )
            loaded = msgspec.msgpack.decode(self._connection.recv_bytes(), type=Loaded)
            if loaded.error is not None:
                raise RewardError(loaded.error)
            self._loaded = loaded
        return self._loaded.functions

    def ask(self, request: Request) -> None:
        """Sends a request to the loaded process. Raises what `receive` does."""
        assert self._connection is not None
        self._connection.send_bytes(_ENCODER.encode(request))

    def receive(self, limit_s: float) -> list[WorkerReply]:
        """Returns the replies of a loaded process, after at most `limit_s` without any, or when `wake` was
        called.

        Raises OSError or EOFError (the process died; BlockingIOError: it stopped in the middle of a message)
        or msgspec.MsgspecError (something else wrote to the socket).
        """
        # A process that was not heard of yet may never have come up: whoever asks next meets that in `load`.
        connection = self._connection if self._loaded is not None else None
        poll = select.poll()  # A selector object would cost more than the rest of a cheap call.
        poll.register(self._bell, select.POLLIN)
        if connection is not None:
            poll.register(connection, select.POLLIN)
        ready = [file for file, _ in poll.poll(limit_s * 1000)]
        if self._bell.fileno() in ready:
            self._bell.recv(4096)
        replies = []
        while connection is not None and connection.fileno() in ready:
            replies.append(_REPLY.decode(connection.recv_bytes()))
            ready = [file for file, _ in poll.poll(0)]
        return replies

    def wake(self) -> None:
        """Lets `receive` return at once, from any thread."""
        with contextlib.suppress(OSError):  # Woken already, or closed.
            self._ring.send(b".")

    def check_memory(self) -> None:
        """Raises MemoryExceeded where the process and its children use more than they may."""
        assert self._process is not None
        if time.monotonic() - self._found_s >= FAMILY_EVERY_S:
            self._pids, self._found_s = children.family(self._process.pid), time.monotonic()
        used = children.used_bytes(self._pids, self._memory_bytes)
        if used > self._memory_bytes:
            raise MemoryExceeded(
                f"the worker used {children.shown_gib(used)} GiB of memory with its children, more than "
                f"rewards.memory_gib = {self._memory_bytes / 2**30:g}"
            )

    def reap(self) -> str | None:
        """Kills what is left of the process and its children, frees the socket, and says how the process
        ended; None if there was none.
        """
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._loaded = None
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
        self.wake()

    def free(self) -> None:
        """Frees what is left once no thread uses this worker any more."""
        self.reap()
        self._bell.close()
        self._ring.close()


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


def load_function(spec: FunctionSpec) -> WeightedReward:
    """Returns the function, prepared. Raises RewardError, in one line, when it cannot be loaded."""
    function = load_reward(spec.name)
    prepare = getattr(function, "prepare", None)
    if callable(prepare):
        try:
            prepare()
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RewardError(f"reward function {spec.name!r}: its prepare() raised {reason}") from error
    messages = read_name(spec.name).messages or takes_messages(function)
    return WeightedReward(spec.name, spec.weight, function, messages)


def described(reward: WeightedReward) -> LoadedFunction:
    """Returns what the function is."""
    signature = reward.signature
    timeout_s = getattr(reward.function, "timeout_s", None)
    return LoadedFunction(
        signature.columns,
        signature.own,
        is_asynchronous(reward.function),
        reward.answer is not None,
        float(timeout_s) if isinstance(timeout_s, int | float) else None,
    )


def _answer_requests(connection: Connection) -> None:
    specs = msgspec.msgpack.decode(connection.recv_bytes(), type=list[FunctionSpec])
    warnings = OwnWarnings(("rewards",))  # The actor logs them again, and so they become events.
    try:
        functions = [load_function(spec) for spec in specs]
        loaded = Loaded([described(reward) for reward in functions])
    except RewardError as error:
        connection.send_bytes(msgspec.msgpack.encode(Loaded(error=printable(str(error)))))
        return
    connection.send_bytes(msgspec.msgpack.encode(loaded))
    while True:
        request = msgspec.msgpack.decode(connection.recv_bytes(), type=Request)
        if loaded.functions[request.function].is_async:
            from rewards.workers.event_loop import (
                serve_calls,  # It imports asyncio, which most rewards do without.
            )

            serve_calls(connection, functions, warnings, request)
        reward = functions[request.function]
        try:
            completions = completions_of(request)
            values = call(reward, completions)
        except CallFailed as error:
            reply = WorkerReply(request.number, error=str(error))
        except Exception as error:  # noqa: BLE001 - what unpickles a row's values may be anybody's code
            reply = WorkerReply(request.number, error=describe(reward, error))
        else:
            reply = WorkerReply(request.number, values, votes_of(request, reward, completions))
        connection.send_bytes(encoded(reply, warnings))


def encoded(reply: WorkerReply, warnings: OwnWarnings) -> bytes:
    """Returns the reply in msgpack, with the warnings since the last; msgpack takes no text with half a
    surrogate pair: such are written out.
    """
    told = tuple(map(printable, warnings.take()))
    values = [printable(value) if isinstance(value, str) else value for value in reply.values]
    error = None if reply.error is None else printable(reply.error)
    return msgspec.msgpack.encode(msgspec.structs.replace(reply, values=values, error=error, warnings=told))


def completions_of(request: Request) -> Completions:
    """Returns the completions that a request is about."""
    group: Completions = pickle.loads(request.payload)
    return group.chosen(request.places)


def votes_of(request: Request, reward: WeightedReward, completions: Completions) -> list[str | None]:
    """Returns the completions' votes, where the request asks for them."""
    return read_answers(reward, completions) if request.votes else [None] * len(completions.texts)
