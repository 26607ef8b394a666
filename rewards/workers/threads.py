"""The thread that keeps one worker process of a pool: it hands calls to it, takes the replies, and replaces
the process when it is lost.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Protocol

import msgspec

from core.errors import RewardError
from rewards.workers.jobs import FunctionCall, Queue
from rewards.workers.search import Failed, Outcome, Verdict
from rewards.workers.worker import BEAT, LOOK_EVERY_S, LoadedFunction, MemoryExceeded, Worker, WorkerReply

IDLE_S = 60.0
BLOCKED_GRACE_S = 1.0
_log = logging.getLogger(__name__)


class Pool(Protocol):
    """What a thread needs of its pool; all of it may be called from any thread."""

    is_closed: bool

    def loaded(self, thread: WorkerThread, found: list[LoadedFunction] | RewardError) -> Queue | None:
        """Takes note that the thread's worker has loaded the functions, or cannot, for the first time;
        returns the queue to serve, None for none.
        """
        ...

    def take(self, thread: WorkerThread) -> list[FunctionCall]:
        """Returns calls for the thread's worker."""
        ...

    def settle(self, call: FunctionCall, outcome: Outcome) -> None:
        """Takes what became of a call."""


class _LateError(Exception):
    """A call did not end within its limit."""


class _BlockedError(Exception):
    """An event loop did not turn for too long."""


class WorkerThread(threading.Thread):
    """Serves one queue with one process at a time.

    A worker is started by the thread that serves it: the kernel ends it with that thread (PR_SET_PDEATHSIG).
    """

    def __init__(self, pool: Pool, worker: Worker, name: str, names: str, timeout_s: float) -> None:
        """`names` are those of all functions, for messages; `timeout_s` is how long an event loop may stand
        still.
        """
        super().__init__(name=name, daemon=True)
        self._pool, self.worker, self._names, self._timeout_s = pool, worker, names, timeout_s
        self.queue: Queue | None = None
        self.held: dict[int, tuple[FunctionCall, float]] = {}  # With the moment until which it may take.
        self.busy_s = self._idle_s = 0.0  # The latter of the present turn.
        self._number = 0
        self._heard_s = self._looked_s = 0.0

    def run(self) -> None:
        """Lives until the pool is closed, or at once where the functions cannot be loaded."""
        self.queue = self._pool.loaded(self, self._load())
        while self.queue is not None and not self._pool.is_closed:
            self._idle_s, start_s = 0.0, time.monotonic()
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever it is, no call may stay without an outcome
                self._lose(error)
            self.busy_s += time.monotonic() - start_s - self._idle_s
        self.worker.reap()

    def _load(self) -> list[LoadedFunction] | RewardError:
        try:
            return self.worker.load()
        except MemoryExceeded as error:
            reason = f"while it imported them, {error}"
        except RewardError as error:
            self.worker.reap()
            return error
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            status = self.worker.reap()
            reason = f"no worker could be started: {error}"
            if status:
                reason = f"the worker died while it imported them: {status}"
        self.worker.reap()
        return RewardError(f"reward functions {self._names}: {reason}")

    def _turn(self) -> None:
        """Hands over new calls, waits for replies for a moment, and looks whether all is well."""
        if not self.worker.is_loaded:
            # No process to be had: the next call meets it, and says so.
            with contextlib.suppress(OSError, EOFError):
                self.worker.start()
        taken = self._pool.take(self)
        numbers = range(self._number, self._number + len(taken))
        self._number += len(taken)
        self.held |= {number: (call, float("inf")) for number, call in zip(numbers, taken, strict=True)}
        if taken:
            self.worker.load()
        for number in numbers:
            call, _ = self.held[number]
            if not (self._is_loop and len(self.held) > len(taken)):
                self._heard_s = time.monotonic()
            self.held[number] = call, time.monotonic() + call.job.function.limit_s
            self.worker.ask(call.request(number))
        if not self.held:
            start_s = time.monotonic()
            self.worker.receive(IDLE_S)
            self._idle_s = time.monotonic() - start_s
            return
        for reply in self.worker.receive(LOOK_EVERY_S):
            self._take(reply)
        if self.held:
            self._look()

    @property
    def _is_loop(self) -> bool:
        return self.queue is not None and self.queue.room > 0

    def _take(self, reply: WorkerReply) -> None:
        self._heard_s = time.monotonic()
        for text in reply.warnings:
            _log.warning("%s", text)
        if reply.number == BEAT:
            return
        if reply.number not in self.held:
            raise msgspec.ValidationError("a reply to something else")
        call, _ = self.held[reply.number]
        outcome: Outcome = [Verdict(*found) for found in zip(reply.values, reply.votes, strict=True)]
        if reply.timed_out:
            outcome = Failed("timeout", self._late(call))
        elif reply.error is not None:
            outcome = Failed("raised", reply.error)
        elif len(outcome) != len(call.ask.places):
            raise msgspec.ValidationError("values for other completions")
        del self.held[reply.number]
        self._pool.settle(call, outcome)

    def _look(self) -> None:
        """Raises where a call takes too long, or the process uses too much memory."""
        now_s = time.monotonic()
        # An event loop keeps the limits by itself, but may begin a call late and see its limit late.
        grace_s = 2 * (self._timeout_s + BLOCKED_GRACE_S) if self._is_loop else 0.0
        if now_s > min(deadline_s for _, deadline_s in self.held.values()) + grace_s:
            raise _LateError
        if self._is_loop and now_s - self._heard_s > self._timeout_s + BLOCKED_GRACE_S:
            raise _BlockedError
        if now_s - self._looked_s > LOOK_EVERY_S:
            self._looked_s = now_s
            self.worker.check_memory()

    def _lose(self, error: Exception) -> None:
        """Ends the process, and every call that it held."""
        was_loaded = self.worker.is_loaded
        status = self.worker.reap()
        held, self.held = [call for call, _ in self.held.values()], {}
        for call in held:
            if self._pool.is_closed:
                failed = Failed(
                    "crash", "the reward pool was closed before this group was scored", hopeless=True
                )
            else:
                failed = self._failed(call, error, status)
                failed = failed._replace(lost=True, shared=len(held) > 1, hopeless=not was_loaded)
            self._pool.settle(call, failed)

    def _failed(self, call: FunctionCall, error: Exception, status: str | None) -> Failed:
        name = call.job.function.name
        if isinstance(error, _BlockedError):
            return Failed("timeout", f"blocked its event loop for {self._timeout_s:g} s ({name})")
        if isinstance(error, _LateError | TimeoutError | BlockingIOError):
            return Failed("timeout", self._late(call))
        if isinstance(error, RewardError):
            return Failed("crash", f"{error} ({name})")
        if status:
            return Failed("crash", f"the worker died: {status} ({name})")
        return Failed("crash", f"no worker could be started: {error} ({name})")

    def _late(self, call: FunctionCall) -> str:
        function = call.job.function
        return f"timed out after {function.limit_s:g} s ({function.name})"
