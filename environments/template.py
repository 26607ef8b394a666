"""The process that has loaded an environment and starts its places: starting an interpreter for each episode
would take a second, forking one that has loaded everything takes milliseconds.

It runs one thread, so that a fork is safe; where loading the user's module started others, places are started
as interpreters of their own. It is the parent of all places and of what they leave behind: it looks at their
memory, says how each ended, and ends what is left of a place's family. When the actor is gone, it ends all
and itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NoReturn

import msgspec

from core import children
from core.errors import ConfigError
from environments import place
from environments.loading import UserEnvironment, load
from environments.wire import PlaceOrder, TemplateReport, receive, send

LOOK_EVERY_S = 0.1
FAMILY_EVERY_S = 0.5  # Finding descendants reads all of /proc.
LOOK_SHARE = 0.02
"""Looks take at most this share of a core: with 500 places one takes 25 ms, and the next is a second away."""
END_TIMEOUT_S = 2.0
LAST_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_PATTERN = "AGRO_PATTERN"


class Pattern(msgspec.Struct, frozen=True):
    """What a template is of: an environment by its name and path, and the memory that a place may use."""

    name: str
    path: str
    memory_bytes: int

    def written(self) -> str:
        """Returns it as text, for an environment variable."""
        return msgspec.json.encode(self).decode()


def serve(fd: int, parent_pid: int) -> None:
    """Lives a template: loads the environment named on socket `fd`, then starts and kills places until the
    socket closes.
    """
    # Not `die_with`: what this process has started is to be ended first.
    signal.signal(signal.SIGTERM, _leave)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        os._exit(0)
    os.set_inheritable(fd, False)
    children.adopt_orphans()
    connection = socket.socket(fileno=fd)
    with contextlib.suppress(_Leave):  # The signal comes just after the socket's end, until it is ignored.
        _serve(connection)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_strangers((), LAST_TIMEOUT_S)


def _serve(connection: socket.socket) -> None:
    with contextlib.suppress(EOFError, OSError, _Leave):
        pattern: Pattern = receive(connection)
        try:
            loaded = _prepared(pattern)
        except ConfigError as error:
            send(connection, TemplateReport("broken", how=str(error)))
            return
        _Template(pattern, loaded, connection).run()


def live_alone(fd: int, parent_pid: int) -> None:
    """Lives a place in an interpreter of its own, where a template must not fork."""
    children.die_with(parent_pid)
    os.set_inheritable(fd, False)
    connection = socket.socket(fileno=fd)
    pattern = msgspec.json.decode(os.environ.pop(_PATTERN), type=Pattern)
    place.live(_prepared(pattern), connection)


class _Leave(BaseException):
    """The actor's thread that started this process is gone, or somebody ends this process."""


def _leave(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Leave


def _prepared(pattern: Pattern) -> UserEnvironment:
    loaded = load(pattern.name, pattern.path)
    with contextlib.suppress(ImportError):
        import numpy.random  # noqa: F401 - so that the generator of every place is there to be seeded
    if loaded.kind == "harness":
        import openai  # noqa: F401 - half a second, once
    return loaded


class _Template:
    """The places by process id, each with the number that the pool knows it by, and the loop that looks after
    them.
    """

    def __init__(self, pattern: Pattern, loaded: UserEnvironment, connection: socket.socket) -> None:
        self._pattern, self._loaded, self._connection = pattern, loaded, connection
        self._numbers: dict[int, int] = {}
        self._used: dict[int, int] = {}  # By process id, of those killed for the memory that they used.
        self._families: dict[int, list[int]] = {}
        self._look_at_s = self._found_s = 0.0
        self._is_alone = len(os.listdir("/proc/self/task")) == 1
        self._wake, self._woken = os.pipe()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Obeys the pool until it is gone. Raises EOFError or OSError then."""
        for fd in (self._wake, self._woken):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _do_nothing)
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        gc.collect()
        gc.freeze()  # Pages that no collection touches stay shared with the places.
        send(self._connection, TemplateReport("ready"))
        while True:
            for key, _ in self._selector.select(LOOK_EVERY_S if self._numbers else None):
                if key.fd == self._wake:
                    os.read(self._wake, 4096)
                else:
                    self._obey()
            self._report_ended()
            self._look(time.monotonic())

    def _obey(self) -> None:
        fds: list[int] = []
        order: PlaceOrder = receive(self._connection, fds)
        if order.what == "start":
            self._start(order.number, fds[0])
        for pid, number in self._numbers.items():
            if order.what == "kill" and number == order.number:
                os.kill(pid, signal.SIGKILL)

    # --- Places ---

    def _start(self, number: int, fd: int) -> None:
        os.set_inheritable(fd, False)
        if self._is_alone:
            parent_pid, pid = os.getpid(), os.fork()
            if pid == 0:
                self._become_place(fd, parent_pid)
        else:
            variables = {_PATTERN: self._pattern.written()}
            process = children.run("environments.template:live_alone", fd, variables)
            process.returncode = 0  # It is this loop that waits for it, and not its object.
            pid = process.pid
        self._numbers[pid] = number
        os.close(fd)

    def _become_place(self, fd: int, parent_pid: int) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            children.die_with(parent_pid)
            self._selector.close()
            self._connection.close()
            os.close(self._wake)
            os.close(self._woken)
            place.live(self._loaded, socket.socket(fileno=fd))
            code = 0
        except BaseException:  # noqa: BLE001 - the end of a process is at hand, and its log has the trace
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    def _report_ended(self) -> None:
        for pid, status in _wait(self._numbers):
            how = children.describe_exit(os.waitstatus_to_exitcode(status))
            number, used = self._numbers.pop(pid), self._used.pop(pid, 0)
            self._families.pop(pid, None)
            send(self._connection, TemplateReport("ended", number, how, end_strangers(self._numbers), used))

    def _look(self, now_s: float) -> None:
        """Kills places that use more memory than they may, with their families."""
        if not self._numbers or now_s < self._look_at_s:
            return
        start_s = time.thread_time()
        if now_s - self._found_s >= FAMILY_EVERY_S:
            self._found_s, self._families = now_s, _families(self._numbers)
        for pid in self._numbers:
            used = children.used_bytes(self._families.get(pid, [pid]), self._pattern.memory_bytes)
            if used > self._pattern.memory_bytes:
                self._used[pid] = used
                os.kill(pid, signal.SIGKILL)
        self._look_at_s = now_s + max(LOOK_EVERY_S, (time.thread_time() - start_s) / LOOK_SHARE)


def _do_nothing(*_: object) -> None:
    """Handles a signal whose arrival alone matters."""


def _families(pids: Iterable[int]) -> dict[int, list[int]]:
    """Returns each process with its descendants."""
    found: dict[int, list[int]] = defaultdict(list)
    for pid, parent in children.parents().items():
        found[parent].append(pid)
    families = {}
    for pid in pids:
        family = [pid]
        for member in family:  # It grows while it is read.
            family += found.get(member, ())
        families[pid] = family
    return families


def _wait(places: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yields places that have ended, with their status; forgets whatever else has."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in places:
                yield pid, status


def end_strangers(places: Collection[int], timeout_s: float = END_TIMEOUT_S) -> int:
    """Kills this process's children that are no places: what places left behind that have ended. Returns how
    many there were.
    """
    killed: set[int] = set()
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        parents = children.parents()
        strangers = [pid for pid, parent in parents.items() if parent == os.getpid() and pid not in places]
        if not strangers:  # Nor were there any when the reading began, so nobody's children are on their way.
            break
        strangers = [pid for pid in strangers if os.waitpid(pid, os.WNOHANG)[0] == 0]
        for pid in strangers:  # Their children come to this process, and are found in the next round.
            os.kill(pid, signal.SIGKILL)
        killed.update(strangers)
        time.sleep(0.001)
    return len(killed)
