"""Calls to other processes: the one way in which the parts of a run talk to each other.

    class BoardClient(Client):          what may be asked of a peer, a line a method: mypy takes arguments and
        snapshot = asks(Board.snapshot) answers from the method itself, and a reader gets there with one click

    call = board.snapshot(3)    a Call[Snapshot | None]: nothing has happened yet; it may be made again

    calls = Calls(run.timeout_s, monitor.event, name="actor-0")
    calls.ask(call)             -> Snapshot | None             waits for the answer
    calls.start(call)           -> Pending[Snapshot | None]    is looked at later, or awaited
    calls.post(call, "rows")    -> Future                      nobody waits; failures are counted, and told
                                                               when they begin and end
    calls.tell(text)            -> None                        an event for the monitor; one that it does not
                                                               take goes to the log

Every wait ends: `PeerTimeout` names who did not answer whom, and for how long. What a call raises is an
error of ours, in a sentence of its own: Ray's paragraphs end here. A Pending that is dropped before anybody
has looked at it becomes a post, so that no failure vanishes.

The calls run on an event loop in a thread of its own, in the order in which they were started.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from ray.exceptions import RayError

from core.errors import PeerTimeout
from core.processes import explained
from core.troubles import Troubles

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")
C = TypeVar("C", bound="_Named")
_UNTIL: Mapping[str, str] = {
    "all": concurrent.futures.ALL_COMPLETED,
    "first failure": concurrent.futures.FIRST_EXCEPTION,
    "first": concurrent.futures.FIRST_COMPLETED,
}
_log = logging.getLogger(__name__)
_AN_EVENT = {"is_event": True}
"""Marks what the log gets because the monitor did not: whoever makes events of warnings leaves it alone."""


# --- what may be asked ---


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """One question to a peer, not asked yet. Every await asks it anew.

    who     is asked, as errors name it
    method  is what runs there
    make    begins it; what that returns is awaited
    """

    who: str
    method: str
    make: Callable[[], Awaitable[T_co]]

    def __await__(self) -> Generator[Any, None, T_co]:
        return self._answer().__await__()

    async def _answer(self) -> T_co:
        """The answer. What Ray wraps, or has to say itself, is raised as an error of ours."""
        try:
            return await self.make()
        except RayError as error:
            raise explained(error, self.who) from error  # The cause says more to whoever watches processes.


@dataclass(frozen=True)
class Client:
    """A peer, as other processes see it. Subclasses name what may be asked of it; see the module's docstring.

    handle  a Ray actor's, or anything else whose `handle.method.remote(...)` can be awaited
    who     names the peer in errors
    """

    handle: object
    who: str

    def inside(self, function: Callable[[Any], T]) -> Call[T]:
        """Runs `function(peer)` in the peer's process."""
        return self._call("__ray_call__", function)

    def _call(self, method: str, *arguments: Any, **named: Any) -> Call[Any]:
        return Call(self.who, method, lambda: getattr(self.handle, method).remote(*arguments, **named))


class Local:
    """A handle of an object in this process, in place of a peer's."""

    def __init__(self, part: object) -> None:
        self._part = part

    def __getattr__(self, method: str) -> Any:
        function = getattr(self._part, method)

        async def remote(*arguments: Any, **named: Any) -> Any:
            answer = function(*arguments, **named)
            return await answer if inspect.isawaitable(answer) else answer

        return SimpleNamespace(remote=remote)


class _Named(Protocol):
    @property
    def who(self) -> str: ...


@overload
def asks(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], Call[T]]: ...
@overload
def asks(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Client, P], Call[T]]: ...
def asks(method: Callable[..., Any]) -> Callable[..., Call[Any]]:
    """A client's method that asks for `method` of its peer: the same arguments, and a Call of what it
    returns.
    """

    @functools.wraps(method)
    def asked(self: Client, *arguments: Any, **named: Any) -> Call[Any]:
        return self._call(method.__name__, *arguments, **named)

    return asked


def as_call(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[C, P], Call[T]]:
    """Makes one Call of a client's coroutine function that asks several peers."""

    @functools.wraps(method)
    def called(self: C, *arguments: P.args, **named: P.kwargs) -> Call[T]:
        return Call(self.who, method.__name__, lambda: method(self, *arguments, **named))

    return called


# --- what was asked ---


class Pending(Generic[T]):
    """A call under way: `who` was asked, and has until `deadline_s` (of `time.monotonic`) to answer.

    future   resolves to the answer; for `settle`, and for whoever waits for other things too
    """

    def __init__(
        self,
        future: Future[T],
        who: str,
        timeout_s: float,
        *,
        late: str = "",
        on_dropped: Callable[[], object] | None = None,
    ) -> None:
        """Tracks `future`, of which `who` has `timeout_s` to make something; `math.inf` is no limit.

        `late` is what PeerTimeout says then. `on_dropped` is called in the end, should nobody have looked at
        the answer.
        """
        self.future, self.who, self.deadline_s = future, who, time.monotonic() + timeout_s
        self._late = late or f"{who} did not answer within {timeout_s:.0f} s (run.timeout_s)"
        self._on_dropped = on_dropped
        self._is_late = False

    def is_done(self) -> bool:
        """Says whether `result` has an answer. Raises PeerTimeout, and gives the call up, when that is
        overdue.
        """
        if self._is_late:
            raise PeerTimeout(self._late)
        if self.future.done():
            return True
        if time.monotonic() > self.deadline_s:
            raise self._given_up()
        return False

    def result(self) -> T:
        """The answer of a call that is done, or what it raised. Raises PeerTimeout where it came too late."""
        self._on_dropped = None
        if self._is_late:
            raise PeerTimeout(self._late)
        return self.future.result(0)

    def error(self) -> BaseException | None:
        """What a call that is done raised, None where it answered."""
        self._on_dropped = None
        return self.future.exception(0)

    def wait(self) -> T:
        """The answer, waited for. Raises PeerTimeout when none comes by the deadline, or what the call
        raised.
        """
        self._on_dropped = None
        try:
            return self.future.result(self._left_s())
        except TimeoutError:
            if self.future.done():  # It came at the last moment, or the call itself raised a TimeoutError.
                return self.future.result(0)
            raise self._given_up() from None

    def __await__(self) -> Generator[Any, None, T]:
        """Waits as `wait` does, on the event loop of whoever awaits it."""
        return self._awaited().__await__()

    def give_up(self) -> None:
        """Says that nobody wants the answer any more, whatever it is."""
        self._on_dropped = None
        self.future.cancel()

    async def _awaited(self) -> T:
        self._on_dropped = None
        answer = asyncio.wrap_future(self.future)
        done, _ = await asyncio.wait([answer], timeout=self._left_s())
        if not done:
            raise self._given_up()
        return answer.result()

    def _left_s(self) -> float | None:
        """Seconds until the deadline, None where there is none."""
        return None if math.isinf(self.deadline_s) else max(0.0, self.deadline_s - time.monotonic())

    def _given_up(self) -> PeerTimeout:
        self._is_late = True
        self.give_up()
        return PeerTimeout(self._late)

    def __del__(self) -> None:
        if self._on_dropped is not None:
            self._on_dropped()


def settle(
    pendings: Iterable[Pending[Any]],
    timeout_s: float,
    *,
    until: Literal["all", "first failure", "first"] = "all",
) -> None:
    """Waits until all are done, or until the first failed or is done, and no longer than `timeout_s`."""
    concurrent.futures.wait([pending.future for pending in pendings], timeout_s, return_when=_UNTIL[until])


class Calls:
    """Asks peers from one process; see the module's docstring. Its methods may be called from any thread.

    num_failed_posts   of those calls that nobody waited for, how many failed
    """

    def __init__(
        self, timeout_s: float, event: Callable[[str], Call[Any]] | None = None, *, name: str = ""
    ) -> None:
        """`timeout_s` limits every call that has no limit of its own: it is `run.timeout_s`.

        `event(text)` is the call that tells the monitor; without it events go to the log. `name` is who asks,
        for errors.
        """
        self._timeout_s, self._event, self._name = timeout_s, event, name
        self._troubles = Troubles(self.tell)
        self.num_failed_posts = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="calls", daemon=True).start()

    def start(self, call: Call[T], timeout_s: float | None = None) -> Pending[T]:
        """Begins the call, and returns at once. `timeout_s` is its limit in place of `run.timeout_s`;
        `math.inf` is none.
        """
        within_s = self._timeout_s if timeout_s is None else timeout_s
        future = asyncio.run_coroutine_threadsafe(_awaited(call), self._loop)
        return Pending(
            future,
            call.who,
            within_s,
            late=f"{call.who} did not answer{self._within(within_s)}",
            on_dropped=functools.partial(self.watch, future, call.who, f"`{call.method}`"),
        )

    def ask(self, call: Call[T], timeout_s: float | None = None) -> T:
        """The call's answer, waited for. Raises PeerTimeout that names who did not answer, or what the call
        raised.
        """
        return self.start(call, timeout_s).wait()

    def post(self, call: Call[Any], what: str, *, after: Future[Any] | None = None) -> Future[Any]:
        """Makes the call for nobody's sake. Failures are counted, and told by peer and `what` when they begin
        and end.

        With `after`, what another post returned, it is made once that is done: Ray repeats the calls to a
        process that it has started again in no certain order.
        """
        future = asyncio.run_coroutine_threadsafe(self._limited(call, after), self._loop)
        self.watch(future, call.who, what)
        return future

    def tell(self, text: str) -> None:
        """Notes an event. It never waits and never raises; what the monitor does not take is in this
        process's log.
        """
        if self._event is None:
            _log.warning("%s", text, extra=_AN_EVENT)
            return

        def look(future: Future[Any]) -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                self.num_failed_posts += 1
                _log.warning("the monitor did not take an event (%s): %s", error, text, extra=_AN_EVENT)

        asyncio.run_coroutine_threadsafe(self._limited(self._event(text)), self._loop).add_done_callback(look)

    async def _limited(self, call: Call[T], after: Future[Any] | None = None) -> T:
        """The answer of a call that nobody waits for: one that never comes is a failure too."""
        if after is not None:
            await asyncio.gather(asyncio.wrap_future(after), return_exceptions=True)
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await call
        except TimeoutError:
            if not limit.expired():  # The call itself raised it.
                raise
            raise PeerTimeout(f"{call.who} did not answer{self._within(self._timeout_s)}") from None

    def _within(self, timeout_s: float) -> str:
        whom = f" {self._name}" if self._name else ""
        return f"{whom} within {timeout_s:.0f} s (run.timeout_s)"

    def in_background(self, work: Callable[[], T], who: str, timeout_s: float = math.inf) -> Pending[T]:
        """Begins work of this process that takes seconds and belongs to nobody's loop, such as hashing.

        It runs in a daemon thread: an executor's would be waited for at the end of the process.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 -- whoever asks for the result meets it
                future.set_exception(error)

        threading.Thread(target=run, name=who, daemon=True).start()
        return Pending(
            future, who, timeout_s, on_dropped=functools.partial(self.watch, future, who, "its work")
        )

    def watch(self, future: Future[Any], who: str, what: str) -> None:
        """Counts and tells the failure of what was begun elsewhere, and nobody waits for."""
        said = f"{who} did not take {what}"

        def look(future: Future[Any]) -> None:
            if future.cancelled():
                return
            if (error := future.exception()) is not None:
                self.num_failed_posts += 1
                self._troubles.note(said, error)
            else:
                self._troubles.well(said)

        # By way of the loop: the garbage collector may drop a Pending, in any thread and with any lock held.
        self._loop.call_soon_threadsafe(future.add_done_callback, look)


class Polled(Generic[T]):
    """What a peer says about itself, asked for again and again and never waited for.

    value   is the newest answer, None before the first
    """

    def __init__(self, calls: Calls, make: Callable[[], Call[T]]) -> None:
        self._calls, self._make = calls, make
        self._pending: Pending[T] | None = None
        self.value: T | None = None

    def poll(self) -> bool:
        """Takes the answer if it came, and then asks again; says whether one came.

        Raises AgroError when no answer comes in time, or when the call failed; the next poll asks anew.
        """
        pending, self._pending = self._pending, None
        has_come = pending is not None and pending.is_done()
        if pending is not None and not has_come:
            self._pending = pending
            return False
        if pending is not None:
            self.value = pending.result()
        self._pending = self._calls.start(self._make())
        return has_come


async def _awaited(call: Awaitable[T]) -> T:
    return await call


__all__ = [
    "Call",
    "Calls",
    "Client",
    "Local",
    "Pending",
    "Polled",
    "as_call",
    "asks",
    "settle",
]
