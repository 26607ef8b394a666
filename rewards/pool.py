"""Runs reward functions in processes that can be killed: whatever a reward does, its group gets an answer and
the others go on.

    submit() --> queue --> one thread per worker --> a Worker's process (rewards/worker.py)
           no reply in time, too much memory, a death: the group is marked --'  and a new process starts

Why not pebble's ProcessPool: its workers share one channel, and a worker that dies while it is idle, or
before its acknowledgement was read (1 of 20 immediate `os._exit` under load), breaks the whole pool for good.
Here a worker shares nothing with the others. Workers are fresh interpreters, never forks (the parent runs
vLLM's threads), and do not import the parent's main module, which in an actor would be Ray. A worker is a
process with limits, not a sandbox.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from core.errors import RewardError
from rewards.registry import read_name
from rewards.scoring import Scored, shorten
from rewards.worker import FunctionSpec, MemoryExceeded, Worker

if TYPE_CHECKING:  # pydantic stays out of the workers
    from core.config import RewardsConfig

CLOSE_LIMIT_S = 2.0
MEMORY_GIB = 4.0


class _Task(NamedTuple):
    request: bytes
    num_completions: int
    future: Future[list[Scored]]


class RewardPool:
    """Scores groups in `workers` processes.

        with RewardPool(config.rewards, workers=2) as pool:
            scored = pool.submit("2+2=", ["4", "5"], {"answer": "4"}).result()

    num_scored, num_errors     count samples with a reward, and samples without one
    num_timeouts               counts groups whose worker was killed at `timeout_s`
    num_crashes                counts groups whose worker died, did not start, or used more memory than it may
    columns                    holds, by function name, the dataset's columns that it cannot be called without

    `config` gives the functions (weights by name), `timeout_s` and `memory_gib`. The
    constructor returns when every worker has loaded the functions; it raises RewardError, in one line, when
    one cannot be loaded.
    """

    def __init__(self, config: RewardsConfig, workers: int = 1) -> None:
        self._names = ", ".join(config.functions)
        self._timeout_s = config.timeout_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self.num_scored = self.num_errors = self.num_timeouts = self.num_crashes = 0
        specs = [
            FunctionSpec(name, weight)
            for name, weight in config.functions.items()
            if read_name(name).is_local
        ]
        memory_bytes = round(getattr(config, "memory_gib", MEMORY_GIB) * 2**30)
        self._workers = [
            Worker(msgspec.msgpack.encode(specs), config.timeout_s, memory_bytes) for _ in range(workers)
        ]
        # A worker is started by the thread that serves it: the kernel ends it with that thread
        # (PR_SET_PDEATHSIG).
        loaded: list[Future[list[tuple[str, ...]]]] = [Future() for _ in self._workers]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker, future), name=f"reward-{index}", daemon=True)
            for index, (worker, future) in enumerate(zip(self._workers, loaded, strict=True))
        ]
        for thread in self._threads:
            thread.start()
        try:
            columns = [future.result() for future in loaded]
            self.columns = dict(zip((spec.name for spec in specs), columns[0], strict=True))
        except BaseException:  # Ctrl-C too, while a user's module hangs in its import.
            self.close()
            raise

    def submit(
        self,
        prompt: str,
        completions: Sequence[str],
        columns: Mapping[str, Any],
        own: Mapping[str, Sequence[Any]] | None = None,
    ) -> Future[list[Scored]]:
        """Hands in one group; the future's result is one Scored per completion, in order, and never an
        exception.

        The result is there at most `timeout_s` after a worker took the group up, plus at most STARTUP_LIMIT_S
        where a new worker had to start. `columns` is the dataset row, `own` has by name what belongs to each
        completion (signature.OWN); anything that pickles.
        """
        future: Future[list[Scored]] = Future()
        try:
            request = pickle.dumps((prompt, list(completions), dict(columns), own))
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
        """Kills the workers within 2 s. Groups that were not scored get an error that says so. A second call
        does nothing.
        """
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

    def _serve(self, worker: Worker, loaded: Future[list[tuple[str, ...]]]) -> None:
        """Lives one worker's thread: groups come in, results go out, and a new process starts after each
        failure.
        """
        self._load(worker, loaded)
        while True:
            # no process to be had: met again, and reported, at the next group
            with contextlib.suppress(OSError, EOFError):
                worker.start()
            task = self._tasks.get()
            if task is None:
                worker.reap()
                return
            if task.future.set_running_or_notify_cancel():
                self._score(worker, task)

    def _load(self, worker: Worker, loaded: Future[list[tuple[str, ...]]]) -> None:
        try:
            loaded.set_result(worker.load())
        except MemoryExceeded as error:
            worker.reap()
            loaded.set_exception(
                RewardError(f"reward functions {self._names}: while it imported them, {error}")
            )
        except RewardError as error:
            worker.reap()
            loaded.set_exception(error)
        except (OSError, EOFError, msgspec.MsgspecError) as error:
            status = worker.reap()
            reason = (
                f"the worker died while it imported them: {status}"
                if status
                else f"no worker could be started: {error}"
            )
            loaded.set_exception(RewardError(f"reward functions {self._names}: {reason}"))

    def _score(self, worker: Worker, task: _Task) -> None:
        try:
            self._finish(task, worker.score(task.request, task.num_completions))
        except (TimeoutError, BlockingIOError):
            worker.reap()
            reason = f"timed out after {self._timeout_s:g} s ({self._names})"
            remedy = f"; where {task.num_completions} completions need longer, raise rewards.timeout_s"
            self._finish(task, reason + remedy, timeouts=1)
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
        """Counts, then resolves the future with `outcome`; a reason is the error of every sample."""
        scored = (
            [Scored(error=shorten(outcome))] * task.num_completions if isinstance(outcome, str) else outcome
        )
        num_errors = sum(sample.error is not None for sample in scored)
        with self._lock:
            self.num_scored += len(scored) - num_errors
            self.num_errors += num_errors
            self.num_timeouts += timeouts
            self.num_crashes += crashes
        task.future.set_result(scored)
