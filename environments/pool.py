"""Runs environments in processes that can be killed: whatever an episode does, its future gets an answer, and
nothing here waits but `wait`.

    place = pool.open("game", row, seed)
    place.reset() --> Future[Turn]     place.act(text, calls) --> Future[Turn] ... until `done`     place.close()
    pool.turn() sends what was asked, and completes the futures of what has come

                    all sockets                  one for each environment       one for each open episode
    Place  -->  EnvironmentPool, Nursery  -->  template (environments/template)  -->  place (environments/place)
                        `------------------------- questions and replies ------------------'

Episodes of an environment that is asynchronous share processes, several to an event loop.

The pool has no thread: who plays gives it its turns, an actor between two steps of its engine. A thread would
want the interpreter four times a sample, and each time the engine would wait for it in the middle of a step.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from environments import EnvironmentFailure, ToolCall, Turn
from environments.nursery import Nursery, Playing, PoolCounts
from environments.spec import EnvironmentSpec
from environments.wire import Question

_log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
TICK_EVERY_S = 0.05
IDLE_TICK_EVERY_S = 5.0
AMID_LIMIT_S = 0.05
"""A turn waits so long for the rest of a message whose beginning has come, or for room to send the rest of
one.
"""


class Place:
    """The place where one episode lives, from `EnvironmentPool.open` to `close`. One question at a time: the
    next may be asked when the future of the last is done.

    The exception of a future is always an EnvironmentFailure, after which only `close` is of use. Futures are
    completed in the pool's turns: whoever gives it these never waits for one by `result`.
    """

    def __init__(
        self, pool: EnvironmentPool, nursery: Nursery, playing: Playing, row: Mapping[str, Any], seed: int
    ):
        self._pool, self._nursery, self._playing = pool, nursery, playing
        self._row, self._seed = dict(row), seed

    def reset(self) -> Future[Turn]:
        """Begins the episode. The turn's observation is the text to add to the row's last user message, or
        the first user message where the row has none; "" is nothing.
        """
        return self._ask(Question(self._playing.number, "reset", self._row, self._seed))

    def act(self, text: str, calls: tuple[ToolCall, ...] = ()) -> Future[Turn]:
        """Lets the environment answer to what the policy said. An environment with tools runs the calls in
        turn; without any the episode is over.
        """
        return self._ask(Question(self._playing.number, "act", text=text, calls=calls))

    def finish(self) -> Future[Turn]:
        """Ends an episode that a limit cut: a Turn that is done, with the reward that the environment gives
        it as it stands, and its attributes.
        """
        return self._ask(Question(self._playing.number, "finish"))

    def run(self, base_url: str, api_key: str, model: str = "policy") -> Future[Turn]:
        """Runs a harness to its end: a Turn that is done, with the reward that it returned. It is asked once,
        in place of `reset` and `act`.
        """
        question = Question(self._playing.number, "run", self._row, self._seed)
        return self._ask(question._replace(base_url=base_url, api_key=api_key, model=model))

    def pause(self) -> None:
        """Stops the clock of `turn_timeout_s` until as many calls of `resume`: a harness waits for the engine
        and is not to blame.
        """
        self._pool.do(lambda: self._nursery.pause(self._playing))

    def resume(self) -> None:
        """Starts the clock again, from 0."""
        self._pool.do(lambda: self._nursery.resume(self._playing))

    def close(self) -> None:
        """Ends the episode and frees its process; what is still asked fails as `closed`. A second call does
        nothing.
        """
        self._pool.do(lambda: self._nursery.end(self._playing))

    def _ask(self, question: Question) -> Future[Turn]:
        future: Future[Turn] = Future()
        future.set_running_or_notify_cancel()
        if not self._pool.do(lambda: self._nursery.ask(self._playing, question, future)):
            future.set_exception(EnvironmentFailure("closed", "the pool was closed"))
        return future


class EnvironmentPool:
    """The places of all open episodes of an actor.

        with EnvironmentPool(describe(paths).values(), turn_timeout_s=60, memory_bytes=2**32) as pool:
            shown = pool.open("game", {"prompt": "..."}, seed=7).reset()
            while not shown.done():
                pool.wait([shown], timeout_s=0.1)

    specs           the environments; their modules are imported from the first turn on, in their own processes
    turn_timeout_s  the limit for one answer of an environment
    memory_bytes    what the process of a place and its children may use together
    counts          says what has happened so far
    """

    def __init__(self, specs: Iterable[EnvironmentSpec], turn_timeout_s: float, memory_bytes: int) -> None:
        self.counts = PoolCounts()
        self._selector = selectors.DefaultSelector()
        self._nurseries = {
            spec.name: Nursery(spec, turn_timeout_s, memory_bytes, self._selector, self.counts)
            for spec in specs
        }
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._is_closed = False
        self._ticked_s = 0.0
        self._to_do: deque[Callable[[], None]] = deque()
        self._turns_in: int | None = None  # The thread that gives the turns: it need not be woken.
        self._watched: set[Future[Any]] = set()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def open(self, name: str, row: Mapping[str, Any], seed: int) -> Place:
        """Returns a place for an episode of the environment `name`; `row` has the dataset's columns.

        An episode that is opened again with the same row and seed plays the same, where its environment draws
        from `random` or numpy.
        """
        return Place(self, self._nurseries[name], Playing(next(self._numbers)), row, seed)

    def do(self, work: Callable[[], None]) -> bool:
        """Does something in the next turn; False where the pool is closed. Any thread may ask for it."""
        with self._lock:
            if self._is_closed:
                return False
            self._to_do.append(work)
            is_first = len(self._to_do) == 1
        if is_first:
            self._wake_up()
        return True

    def turn(self, timeout_s: float = 0.0) -> None:
        """Does what was asked for, takes what processes say, for which it waits at most so long, and looks at
        the deadlines. All turns are to be one thread's, which lives as long as the pool: templates die with
        who starts them (PR_SET_PDEATHSIG).
        """
        self._begin_turn()
        if self._is_closed:
            return
        is_amid = self._take(min(timeout_s, self._patience_s()))
        deadline_s = time.monotonic() + AMID_LIMIT_S
        while is_amid and (left_s := deadline_s - time.monotonic()) > 0:
            is_amid = self._take(left_s)
        now_s = time.monotonic()
        if now_s - self._ticked_s >= TICK_EVERY_S:
            self._ticked_s = now_s
            for nursery in self._nurseries.values():
                nursery.tick(now_s)

    def wait(self, futures: Iterable[Future[Any]], timeout_s: float) -> None:
        """Takes a turn until there was something to do in it, or one of `futures`, of whomever, is done; at
        most for so long.
        """
        futures = set(futures)
        for future in futures - self._watched:
            future.add_done_callback(self._wake_up)
        self._watched = {future for future in self._watched | futures if not future.done()}
        self._begin_turn()  # Some are answered at once.
        is_done = any(future.done() for future in futures)
        self.turn(0.0 if is_done else timeout_s)

    def close(self) -> None:
        """Kills all processes within 2 s; open futures fail as `closed`. A second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._do_all()
        self._end()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _begin_turn(self) -> None:
        """Does what was asked for; in the first turn the templates are started."""
        if self._turns_in is None and not self._is_closed:
            self._turns_in = threading.get_ident()
            for nursery in self._nurseries.values():
                nursery.start()
        self._do_all()

    def _take(self, timeout_s: float) -> bool:
        """Takes what processes say, for which it waits at most so long; returns whether one of them is in the
        middle of a message, to us or from us. A socket holds a fraction of a picture.
        """
        is_amid = False
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._woken:
                self._woken.recv(64)
                continue
            nursery, process = key.data
            if process is None:
                nursery.take_reports()
            else:
                nursery.take_replies(process)
                is_amid |= process.channel.is_amid
        return is_amid

    def _wake_up(self, future: Future[Any] | None = None) -> None:
        """Ends the waiting of a turn, unless it is the turn that says so."""
        if threading.get_ident() != self._turns_in:
            with contextlib.suppress(OSError):  # It is closed, or has more to wake up for than it can hold.
                self._wake.send(b"x")

    def _do_all(self) -> None:
        while True:
            with self._lock:
                work, self._to_do = self._to_do, deque()
            if not work:
                return
            for one in work:
                try:
                    one()
                except Exception:  # noqa: BLE001 - all environments are served here, and other jobs wait
                    _log.exception("the environments' pool could not do what it was asked")

    def _patience_s(self) -> float:
        """Returns how long to wait for a socket until deadlines are looked at."""
        is_awaited = any(nursery.is_awaited for nursery in self._nurseries.values())
        return TICK_EVERY_S if is_awaited else IDLE_TICK_EVERY_S

    def _end(self) -> None:
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for nursery in self._nurseries.values():
            nursery.close()
        for nursery in self._nurseries.values():
            nursery.wait(deadline_s - time.monotonic())
        self._selector.close()
        for end in (self._wake, self._woken):
            end.close()
