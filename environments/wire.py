"""What passes between an actor's pool and the processes of its environments, and how.

    pool --Question (pickle)--> place's process     --Reply (msgpack)--> pool
    pool --PlaceOrder (pickle)-----> template            --TemplateReport (msgpack)-> pool

Nothing that comes from a process in which users' code runs is ever unpickled in an actor. A message is its
length and its bytes; what a user's code prints goes elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from environments import FailureKind, ToolCall, Turn

MAX_BYTES = 2**25
"""A message that is longer was not written by us."""
_LENGTH = struct.Struct("!I")
LENGTH_BYTES = _LENGTH.size
_READ_BYTES = 2**18
What: TypeAlias = Literal["reset", "act", "finish", "run", "end", "cancel"]


class Question(NamedTuple):
    """What a place's process is asked for one of its episodes.

    reset   begin it, with `row` and `seed`         run     run a harness, with these and the rest
    act     `text` and `calls`                      end     forget it, and say what it left behind
    finish  say its reward as it stands             cancel  give up what it is asked
    """

    episode: int
    what: What
    row: dict[str, Any] | None = None
    seed: int = 0
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    base_url: str = ""
    api_key: str = ""
    model: str = ""


class Reply(msgspec.Struct, array_like=True):
    """What a place's process says. `begun` comes once, from the process itself; `left` answers to `end`,
    or comes behind a turn that is done, where episodes share no event loop.

    processes, threads  what the episode left behind
    """

    episode: int
    what: Literal["begun", "turn", "failure", "left", "cancelled"]
    turn: Turn | None = None
    kind: FailureKind = "raised"
    text: str = ""
    processes: int = 0
    threads: int = 0


class PlaceOrder(NamedTuple):
    """What a template is told: to start a place's process, whose socket comes with it, or to kill one."""

    what: Literal["start", "kill"]
    number: int


class TemplateReport(msgspec.Struct, array_like=True):
    """What a template says. `ready` or `broken` comes once; `ended` once for each process.

    how        how the process ended, in words; what is broken
    leftovers  how many processes it left behind, which were killed
    used       the memory that it used with its children, where it was killed for that, else 0
    """

    what: Literal["ready", "broken", "ended"]
    number: int = 0
    how: str = ""
    leftovers: int = 0
    used: int = 0


def framed(message: bytes) -> bytes:
    """Returns the message with its length before it."""
    return _LENGTH.pack(len(message)) + message


def packed(message: Reply | TemplateReport) -> bytes:
    """Returns a message to the pool as it is sent."""
    return framed(msgspec.msgpack.encode(message))


def length_of(start: bytes | bytearray) -> int:
    """Returns the length that the first LENGTH_BYTES of a message say."""
    length: int = _LENGTH.unpack(start)[0]
    return length


def receive(connection: socket.socket, fds: list[int] | None = None) -> Any:
    """Waits for a message of the pool's and returns it, unpickled; file descriptors that came with it are
    appended to `fds`. Raises EOFError when the pool is gone.
    """
    length = length_of(_exactly(connection, LENGTH_BYTES, fds))
    return pickle.loads(_exactly(connection, length, fds))


def send(connection: socket.socket, message: Reply | TemplateReport) -> None:
    """Sends a message to the pool and waits until it is taken. Raises OSError when the pool is gone."""
    connection.sendall(packed(message))


def _exactly(connection: socket.socket, length: int, fds: list[int] | None) -> bytes:
    parts = []
    while length > 0:
        if fds is None:
            part = connection.recv(length)
        else:
            part, came, _, _ = socket.recv_fds(connection, length, 8)
            fds += came
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


class Channel:
    """The pool's end of a socket, which never blocks: what cannot be sent now waits for `flush`.

    `send` and `flush` return silently where the other side is gone, since `receive` tells it.
    """

    def __init__(self, connection: socket.socket, kind: type[Reply] | type[TemplateReport]) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(kind)
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._came = bytearray()

    @property
    def is_waiting(self) -> bool:
        """Returns whether something is to be sent as soon as the socket takes it."""
        return bool(self._waiting)

    @property
    def is_amid(self) -> bool:
        """Returns whether a part of a message has come, or was sent, and the rest has not."""
        return self.is_waiting or bool(self._came)

    def send(self, message: object, fd: int | None = None) -> None:
        """Sends a message, with a file descriptor that is closed here once it is sent."""
        frame = framed(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))
        self._waiting.append((frame, [] if fd is None else [fd]))
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes."""
        while self._waiting:
            frame, fds = self._waiting[0]
            try:
                sent = socket.send_fds(self.socket, [frame], fds) if fds else self.socket.send(frame)
            except BlockingIOError:
                return
            except OSError:
                self._drop()
                return
            _close(fds)
            if sent < len(frame):
                self._waiting[0] = frame[sent:], []
            else:
                self._waiting.popleft()

    def receive(self) -> list[Any]:
        """Returns the messages that have come.

        Raises EOFError when the other side is gone, or has written something that is no message.
        """
        is_gone = False
        try:
            while part := self.socket.recv(_READ_BYTES):
                self._came += part
            is_gone = True
        except BlockingIOError:
            pass
        except OSError:
            is_gone = True
        try:
            messages = list(self._messages())
        except (msgspec.MsgspecError, ValueError):
            raise EOFError from None
        if is_gone and not messages:  # The next call finds it gone again.
            raise EOFError
        return messages

    def _messages(self) -> Iterator[Any]:
        while len(self._came) >= LENGTH_BYTES:
            length = length_of(self._came[:LENGTH_BYTES])
            if length > MAX_BYTES:
                raise ValueError
            end = LENGTH_BYTES + length
            if len(self._came) < end:
                return
            message = bytes(self._came[LENGTH_BYTES:end])
            del self._came[:end]
            yield self._decoder.decode(message)

    def close(self) -> None:
        """Closes the socket, and drops what was not sent."""
        self._drop()
        with contextlib.suppress(OSError):
            self.socket.close()

    def _drop(self) -> None:
        while self._waiting:
            _close(self._waiting.popleft()[1])


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
