"""Runs reward functions in processes that can be killed: whatever a function does, its group gets an answer
and the others go on.

    submit() --> a job per function --calls--> queue --> one thread per worker --> a Worker's process (worker)
                       ^                                     |    plain functions: one call at a time
                       |                                     |    async def: up to rewards.concurrency completions
                       `--- values, or how it failed --------'    a hang, too much memory, a death: a new process
                what is called next says rewards/workers/search.py

Plain and asynchronous functions have queues and processes of their own. All processes but the first of each
start when a call has waited for START_AFTER_S. Built-in functions that only compare or count are called by
`values` itself (rewards/registry.py:INSTANT); where all are of these, no process starts.

Why not pebble's ProcessPool: its workers share one channel, and a worker that dies while it is idle, or
before its acknowledgement was read (1 of 20 immediate `os._exit` under load), breaks the whole pool for good.
Here a worker shares nothing with the others. Workers are fresh interpreters, never forks (the parent runs
vLLM's threads), and do not import the parent's main module, which in an actor would be Ray. A worker is a
process with limits, not a sandbox.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from core.errors import RewardError
from rewards.registry import read_name
from rewards.scoring import Completions, Scored, Summand, complete, joined, shorten
from rewards.workers.jobs import AskedGroup, Function, FunctionCall, FunctionJob, Queue, Values
from rewards.workers.search import Outcome
from rewards.workers.threads import WorkerThread
from rewards.workers.worker import FunctionSpec, LoadedFunction, Worker, described, load_function

if TYPE_CHECKING:  # pydantic stays out of the workers
    from core.config import RewardsConfig

CLOSE_LIMIT_S = 2.0
START_AFTER_S = 0.5


class RewardPool:
    """Scores groups in at most `rewards.workers` processes (two where plain and asynchronous functions meet).

        with RewardPool(config.rewards) as pool:
            scored = pool.submit("2+2=", ["4", "5"], {"answer": "4"}).result()

    num_scored, num_errors   count completions with values, and completions without
    num_timeouts             counts those of them for which a function gave no answer within its limit
    num_crashes              counts those whose worker died, did not start, or used more memory than it may
    queue_s, num_groups      add up how long groups waited for a worker, and count them
    columns                  holds, by function name, the dataset's columns that it cannot be called without

    `config` gives the functions (weights by name) and the limits; of the functions, those that are called in
    workers, or here, are this pool's (`RewardName.is_local`). The constructor returns when one worker has
    loaded them; it raises RewardError, in one line, when one cannot be loaded.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._weights = {
            name: weight for name, weight in config.functions.items() if read_name(name).is_local
        }
        self._here = {
            name: load_function(FunctionSpec(name, weight))
            for name, weight in self._weights.items()
            if read_name(name).is_instant
        }
        # Those of the workers.
        self._specs = [
            FunctionSpec(name, weight) for name, weight in self._weights.items() if name not in self._here
        ]
        self._names = ", ".join(self._weights)
        self._lock = threading.RLock()
        self.is_closed = False
        self.num_scored = self.num_errors = self.num_timeouts = self.num_crashes = self.num_groups = 0
        self.queue_s = self._here_s = 0.0
        self._started_s = time.monotonic()
        self._functions: list[Function] = []
        self._queues = {False: Queue(0), True: Queue(config.concurrency)}  # By whether they are asynchronous.
        self._groups: set[AskedGroup] = set()
        self._threads: list[WorkerThread] = []
        self._first: Future[list[LoadedFunction]] = Future()
        self.columns: dict[str, tuple[str, ...]] = {}
        self.own: dict[str, tuple[str, ...]] = {}
        found = {name: described(reward) for name, reward in self._here.items()}
        if self._specs:
            found |= self._start()
        for name in self._weights:
            self.columns[name], self.own[name] = found[name].columns, found[name].own
        self._functions = self._listed(found)

    def _start(self) -> dict[str, LoadedFunction]:
        """Returns what the functions of the workers are, as soon as the first has loaded them."""
        with self._lock:
            self._start_thread()
        try:
            found = self._first.result()
        except BaseException:  # Ctrl-C too, while a user's module hangs in its import.
            self.close()
            raise
        with self._lock:
            if len({function.is_async for function in found}) == 2:
                self._start_thread(self._queues[True])
        return {spec.name: function for spec, function in zip(self._specs, found, strict=True)}

    def _listed(self, found: Mapping[str, LoadedFunction]) -> list[Function]:
        """Returns the functions in the order of the config; the first that can tell is asked for votes."""
        voter = next((name for name in self._weights if found[name].votes), None)
        places = {spec.name: place for place, spec in enumerate(self._specs)}
        return [
            Function(
                places.get(name, -1),
                name,
                weight,
                found[name].is_async,
                max(self._config.timeout_s, found[name].timeout_s or 0.0),
                name == voter,
                self._here.get(name),
            )
            for name, weight in self._weights.items()
        ]

    def _start_thread(self, queue: Queue | None = None) -> None:
        memory_bytes = round(self._config.memory_gib * 2**30)
        worker = Worker(msgspec.msgpack.encode(self._specs), self._config.timeout_s, memory_bytes)
        name = f"reward-{len(self._threads)}"
        names = ", ".join(spec.name for spec in self._specs)
        thread = WorkerThread(self, worker, name, names, self._config.timeout_s)
        thread.queue = queue
        self._threads.append(thread)
        thread.start()

    def submit(
        self,
        prompt: str,
        completions: Sequence[str],
        columns: Mapping[str, Any],
        own: Mapping[str, Sequence[Any]] | None = None,
    ) -> Future[list[Scored]]:
        """Hands in one group; the future's result is one Scored per completion, in order, and never an
        exception. The arguments are those of Completions.
        """
        scored: Future[list[Scored]] = Future()
        scored.set_running_or_notify_cancel()  # Nobody can cancel it from here on.
        count = len(completions)

        def add_up(values: Future[Values]) -> None:
            found = values.result()
            complete(scored, count, lambda: joined(found.parts, count, found.votes))

        self.values(Completions(prompt, list(completions), dict(columns), own or {})).add_done_callback(
            add_up
        )
        return scored

    def values(self, completions: Completions) -> Future[Values]:
        """Hands in one group; the future's result is what each function says of it, and never an exception.

        It is there after some calls of each function at most (rewards/workers/search.py), each of at most the
        function's limit, once workers took them up, plus STARTUP_LIMIT_S where a new worker had to start.
        """
        future: Future[Values] = Future()
        future.set_running_or_notify_cancel()
        group = AskedGroup(len(completions.texts), b"", future)
        if not self._weights or not completions.texts:
            future.set_result(Values([Summand(name, weight, []) for name, weight in self._weights.items()]))
            return future
        if self._specs:
            try:
                group.payload = pickle.dumps(completions)
            except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
                self._refuse(group, f"the row cannot be sent to a worker: {error}")
                return future
        group.jobs = [FunctionJob(group, function) for function in self._functions]
        start_s = time.monotonic()
        for job in group.jobs:
            if job.function.here is not None:
                job.answer_here(job.function.here, completions)
        with self._lock:
            self._here_s += time.monotonic() - start_s
            is_closed = self.is_closed
            if self._specs and not is_closed:
                self._begin(group)
        if is_closed:
            self._refuse(group, "the reward pool is closed")
        elif not self._specs:
            self._end(group)
        return future

    def _begin(self, group: AskedGroup) -> None:
        """Queues the calls that workers make, with the lock."""
        self._groups.add(group)
        for job in group.jobs:
            if job.function.here is None:
                self._queue(job, job.begin())

    def _end(self, group: AskedGroup) -> None:
        """Ends a group of which no worker was asked."""
        values = group.values()
        with self._lock:
            self.num_groups += 1
            self._count(values, group.num_completions)
        group.future.set_result(values)

    @property
    def busy_s(self) -> float:
        """Returns for how long workers had something to do, all together, or whoever called functions that
        need none.
        """
        return self._here_s + sum(thread.busy_s for thread in list(self._threads))

    @property
    def worker_s(self) -> float:
        """Returns for how long `rewards.workers` workers could have had something to do, or the caller where
        no function needs one.
        """
        could = self._config.workers if self._specs else int(bool(self._here))
        return (time.monotonic() - self._started_s) * could

    def close(self) -> None:
        """Kills the workers within 2 s. Groups that were not scored get an error that says so. A second call
        does nothing.
        """
        with self._lock:
            self.is_closed = True
            threads = list(self._threads)
        for thread in threads:
            thread.worker.close()
        deadline_s = time.monotonic() + CLOSE_LIMIT_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if not thread.is_alive():
                thread.worker.free()
        with self._lock:
            left, self._groups = list(self._groups), set()
        for group in left:
            self._refuse(group, "the reward pool was closed before this group was scored")

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- what the threads call ---

    def loaded(self, thread: WorkerThread, found: list[LoadedFunction] | RewardError) -> Queue | None:
        """Takes note of a thread's first loading, and returns the queue that it serves."""
        with self._lock:
            if isinstance(found, RewardError):
                if not self._first.done():
                    self._first.set_exception(found)
                    return None
                # The others have them: calls go to these. One that serves alone says what is wrong.
                others = [
                    other for other in self._threads if other.queue is thread.queue and other is not thread
                ]
                return None if others else thread.queue
            if self._first.done():
                return thread.queue
            thread.queue = self._queues[all(function.is_async for function in found)]
            self._first.set_result(found)
            return thread.queue

    def take(self, thread: WorkerThread) -> list[FunctionCall]:
        """Returns calls for the thread's worker; starts another where work waits."""
        assert thread.queue is not None
        with self._lock:
            taken = thread.queue.take([call.ask for call, _ in thread.held.values()])
            for call in taken:
                group = call.job.group
                if not group.is_begun:
                    group.is_begun = True
                    self.queue_s += time.monotonic() - group.submitted_s
                    self.num_groups += 1
            self._grow(thread.queue)
        return taken

    def settle(self, call: FunctionCall, outcome: Outcome) -> None:
        """Takes what became of a call: it leads to others, or to the end of its group."""
        group = call.job.group
        with self._lock:
            self._queue(call.job, call.job.settle(call, outcome))
            if not group.is_done or group not in self._groups:
                return
            self._groups.remove(group)
            values = group.values()
            self.num_timeouts += group.failures("timeout")
            self.num_crashes += group.failures("crash")
            self._count(values, group.num_completions)
        group.future.set_result(values)

    # --- inside, with the lock ---

    def _queue(self, job: FunctionJob, calls: Sequence[FunctionCall]) -> None:
        queue = self._queues[job.function.is_async]
        if job.group.is_begun:
            queue.calls.extendleft(reversed(calls))  # What was begun is finished first.
        else:
            queue.calls.extend(calls)
        if calls:
            for thread in self._threads:
                if thread.queue is queue:
                    thread.worker.wake()

    def _grow(self, queue: Queue) -> None:
        """Starts another worker where a call has waited for long and none is starting."""
        is_starting = any(not thread.worker.is_loaded for thread in self._threads if thread.queue is queue)
        is_full = len(self._threads) >= self._config.workers
        if not (is_full or is_starting or self.is_closed) and queue.waited_s() > START_AFTER_S:
            self._start_thread(queue)

    def _count(self, values: Values, num_completions: int) -> None:
        num_errors = sum(
            any(isinstance(part.values[place], str) for part in values.parts)
            for place in range(num_completions)
        )
        self.num_errors += num_errors
        self.num_scored += num_completions - num_errors

    def _refuse(self, group: AskedGroup, reason: str) -> None:
        """Ends a group that no worker scores; the reason is the error of every completion."""
        values = Values([Summand(self._names, 1.0, [shorten(reason)] * group.num_completions)])
        with self._lock:
            self._count(values, group.num_completions)
        group.future.set_result(values)
