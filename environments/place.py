"""The life of a process in which episodes are played, after its template has started it.

    play  one episode after another, of an environment that is not asynchronous; each has an object of its own
    host  several at once, on an event loop

Both answer Questions on their socket until it closes; `play` ends an episode behind the answer that is its
last. What an episode leaves behind, processes and threads, is told at its end, and then the pool lets this
process play no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import random
import select
import socket
import threading
import time

from core import children
from core.users.code import in_one_line
from environments import EnvironmentFailure
from environments.acting import Acting, at_once, sow
from environments.loading import UserEnvironment
from environments.wire import LENGTH_BYTES, MAX_BYTES, Question, Reply, length_of, packed, receive, send

CANCEL_LIMIT_S = 1.0
LINGER_LIMIT_S, LINGER_LOOK_S = 0.1, 0.002
"""Threads and processes that end so soon behind an episode are not left behind."""


def live(loaded: UserEnvironment, connection: socket.socket) -> None:
    """Answers questions until the pool closes the socket."""
    children.adopt_orphans()
    send(connection, Reply(0, "begun"))
    with contextlib.suppress(EOFError, OSError):
        if loaded.is_async:
            sow(random.SystemRandom().getrandbits(32))  # Forks of one template would all draw the same.
            asyncio.run(_Host(loaded, connection).run())
        else:
            _play(loaded, connection)


def _play(loaded: UserEnvironment, connection: socket.socket) -> None:
    acting = Acting(loaded)
    surroundings = _Surroundings()
    # A process that waits in `recv` is also woken when the pool has read what it answered.
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while True:
        poll.poll()
        question: Question = receive(connection)
        if question.what in ("reset", "run"):
            acting = Acting(loaded)
            sow(question.seed)
        is_over = question.what == "end"
        try:
            if not is_over:
                turn = at_once(acting.answer(question))
                connection.sendall(_written(Reply(question.episode, "turn", turn)))
                is_over = turn.done
        except EnvironmentFailure as failure:
            connection.sendall(packed(_failed(question, failure)))
        if is_over:  # Its reward is known, whatever comes of closing it.
            with contextlib.suppress(EnvironmentFailure):
                at_once(acting.close())
            acting = Acting(loaded)
            send(connection, surroundings.restored(question.episode))


def _failed(question: Question, failure: EnvironmentFailure) -> Reply:
    text = failure.text.encode("utf-8", errors="replace").decode("utf-8")
    return Reply(question.episode, "failure", None, failure.kind, text)


def _written(reply: Reply) -> bytes:
    """Returns a reply as it is sent. Raises EnvironmentFailure where what users' code answered cannot be."""
    try:
        message = packed(reply)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        why = in_one_line(error)
    else:
        if len(message) <= MAX_BYTES:
            return message
        why = f"it is {len(message):,} bytes long; at most {MAX_BYTES:,} can be"
    raise EnvironmentFailure("raised", f"what it returned cannot be sent: {why}")


class _Surroundings:
    """What an episode finds, and the next shall find as well."""

    def __init__(self) -> None:
        self._directory, self._variables = os.open(".", os.O_PATH | os.O_CLOEXEC), dict(os.environb)

    def restored(self, episode: int) -> Reply:
        """Puts back the working directory and the environment variables; says what else was left behind."""
        gc.collect()
        with contextlib.suppress(OSError):
            os.chdir(self._directory)
        if dict(os.environb) != self._variables:  # As bytes, in half the time.
            os.environb.clear()
            os.environb.update(self._variables)
        deadline_s = time.monotonic() + LINGER_LIMIT_S
        while (left := _left()) != (0, 0) and time.monotonic() < deadline_s:
            time.sleep(LINGER_LOOK_S)
        return Reply(episode, "left", processes=left[0], threads=left[1])


def _left() -> tuple[int, int]:
    """Returns how many processes and threads are here beside this process and its main thread."""
    return _num_children(), threading.active_count() - 1


def _num_children() -> int:
    """Returns how many processes live that this one has started, or that they have left to it."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return 0  # It adopts orphans: who has no child has no descendant, and /proc need not be read.
    return len(children.family(os.getpid())) - 1


class _Host:
    """Plays several episodes on one event loop. A question that is given up is cancelled; one that does not
    end then is told as a thread that was left behind, and the pool gives this process no more episodes.
    """

    def __init__(self, loaded: UserEnvironment, connection: socket.socket) -> None:
        self._loaded, self._socket = loaded, connection
        self._acting: dict[int, Acting] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Takes questions until the socket closes."""
        reader, writer = await asyncio.open_connection(sock=self._socket)
        cancelling = set()
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                length = length_of(await reader.readexactly(LENGTH_BYTES))
                question: Question = pickle.loads(await reader.readexactly(length))
                if question.what == "cancel":
                    cancelling.add(asyncio.create_task(self._cancel(question.episode, writer)))
                else:
                    self._tasks[question.episode] = asyncio.create_task(self._answer(question, writer))

    async def _answer(self, question: Question, writer: asyncio.StreamWriter) -> None:
        if question.what in ("reset", "run"):
            self._acting[question.episode] = Acting(self._loaded)
        acting = self._acting[question.episode]
        try:
            if question.what == "end":
                message = packed(await self._end(question.episode))
            else:
                message = _written(Reply(question.episode, "turn", await acting.answer(question)))
        except EnvironmentFailure as failure:
            message = packed(_failed(question, failure))
        writer.write(message)

    async def _end(self, episode: int) -> Reply:
        """Forgets an episode. What was left behind is known when there is no other."""
        with contextlib.suppress(EnvironmentFailure):  # Its episode is over, and its reward known.
            await self._acting.pop(episode).close()
        self._tasks.pop(episode, None)
        num_processes = 0 if self._acting else _num_children()
        return Reply(episode, "left", processes=num_processes)

    async def _cancel(self, episode: int, writer: asyncio.StreamWriter) -> None:
        """Cancels what an episode is asked, and forgets the episode."""
        task = self._tasks.pop(episode, None)
        self._acting.pop(episode, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_LIMIT_S)
        threads = int(task is not None and not task.done())
        writer.write(packed(Reply(episode, "cancelled", threads=threads)))
