"""Buffer, board and monitor in this process, behind handles like Ray's: for the actor's loop with whatever
may go wrong.

Each part runs on one event loop in a thread of its own, as in its Ray actor; calls of several actors meet
there.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from actors.offline import OfflineActor
from actors.prompts import PromptRow, PromptSet
from actors.rollout import RolloutActor
from buffer.client import BufferClient, connect_buffer
from buffer.ledger import audit_run
from buffer.server import ReplayBuffer
from core.calls import Call, Calls
from core.config import Config
from core.config.evaluation import HELD_OUT
from core.evaluation.open_evaluation import SuiteSize
from core.monitor_client import MONITOR, MonitorClient
from core.records import Group, decode_batch
from core.weights.board import BOARD, Board, BoardClient
from core.weights.snapshots import SnapshotWriter

T = TypeVar("T")


class Answer:
    """What a call returns: to be awaited on any event loop, as an ObjectRef is."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self.future).__await__()


class Handle:
    """`handle.method.remote(...)` of `part`, on `loop`.

    faults    by method: exceptions that its next calls raise instead of being made
    asked     by method: the arguments of the calls so far
    """

    def __init__(self, part: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._part, self._loop = part, loop
        self.faults: dict[str, deque[BaseException]] = defaultdict(deque)
        self.asked: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._part, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            self.asked[name].append(arguments)
            if faults := self.faults[name]:
                raise faults.popleft()
            result = method(*arguments, **named)
            return await result if inspect.isawaitable(result) else result

        class Method:
            @staticmethod
            def remote(*arguments: Any, **named: Any) -> Answer:
                return Answer(asyncio.run_coroutine_threadsafe(call(*arguments, **named), self._loop))

        return Method

    def get(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Makes the call and waits for it."""
        return getattr(self, name).remote(*arguments, **named).future.result(60)


class Monitor:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.counters: dict[str, dict[str, float]] = {}

    def event(self, text: str) -> None:
        self.events.append(text)

    def log_actor(self, name: str, counters: dict[str, float]) -> None:
        self.counters[name] = counters


class Reference:
    """A bucket in an object store: awaited as often as one likes. It takes `delay_s`, once `is_there` is
    set.
    """

    def __init__(
        self, bucket: np.ndarray, delay_s: float = 0.0, is_there: threading.Event | None = None
    ) -> None:
        self.bucket, self._delay_s, self._is_there = bucket, delay_s, is_there

    def __await__(self) -> Generator[Any, None, np.ndarray]:
        while self._is_there is not None and not self._is_there.is_set():
            yield from asyncio.sleep(0.01).__await__()
        yield from asyncio.sleep(self._delay_s).__await__()
        return self.bucket


class Bench:
    """One run's buffer, board and monitor, the actors started on them, and a learner's view of it all."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        rows: list[PromptRow],
        eval_rows: list[PromptRow] | None = None,
        suites: dict[str, list[PromptRow]] | None = None,
    ) -> None:
        samples = {suite.name: suite.samples for suite in config.suites}
        self.config, self.run_dir = config, run_dir
        self.prompts = PromptSet(rows, 0, "rows")
        suites = {HELD_OUT: eval_rows or []} if suites is None else suites
        self.eval_prompts = {suite: PromptSet(held_out, 0, "rows") for suite, held_out in suites.items()}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="parts", daemon=True).start()
        self.evaluations: list[tuple[Any, list[dict[str, Any]]]] = []
        self.told = Monitor()
        shards = range(config.buffer.num_shards)
        self.buffers = [
            self._serve(partial(ReplayBuffer, config, str(run_dir), len(rows), shard)) for shard in shards
        ]
        self.buffer = self.buffers[0]
        self._facade, self._calls = connect_buffer(self.buffers), Calls(60.0)
        self.board = self._serve(
            lambda: Board(
                config.run,
                {suite: SuiteSize(len(held), samples[suite]) for suite, held in self.eval_prompts.items()},
                lambda *found: self.evaluations.append(found),
                kept_suite=(config.eval.keep_best or "").partition("/")[0],
            )
        )
        self.monitor = self._serve(lambda: self.told)
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="actor")
        self._running: dict[str, Future[dict[str, float]]] = {}

    def _ask(self, call: Call[T]) -> T:
        return self._calls.ask(call, 60)

    def _serve(self, make: Callable[[], Any]) -> Handle:
        async def made() -> Any:
            return make()

        return Handle(asyncio.run_coroutine_threadsafe(made(), self.loop).result(60), self.loop)

    def peers(self) -> tuple[BufferClient, BoardClient, MonitorClient]:
        """Buffers, board, monitor: the last arguments of an actor."""
        return self._facade, BoardClient(self.board, BOARD), MonitorClient(self.monitor, MONITOR)

    def start(self, actor: RolloutActor | OfflineActor) -> Future[dict[str, float]]:
        """The actor's `run` in a thread; its result."""
        running: Future[Any] = self._threads.submit(actor.run)
        self._running[actor._name] = running
        return running

    def publish(
        self,
        version: int,
        *,
        evaluate: bool | Sequence[str] = False,
        delay_s: float = 0.0,
        is_there: threading.Event | None = None,
        torn: bool = False,
        tensors: Any = None,
    ) -> None:
        """A snapshot as the learner publishes it; each of its buckets takes `delay_s` to arrive, counted
        from when `is_there` is set, where it is given. It is evaluated on all suites, on some, or on none.
        """
        if isinstance(evaluate, bool):
            evaluate = list(self.eval_prompts) if evaluate else []
        writer = SnapshotWriter(bucket_bytes=1 << 20)
        for name, tensor in tensors or [("weight", torch.full((4,), float(version)))]:
            writer.add(name, tensor)
        manifest, buckets = writer.finish(version)
        if torn:
            buckets[0][0] += 1
        references = [Reference(bucket, delay_s, is_there) for bucket in buckets]
        self.board.get("publish", msgspec.msgpack.encode(manifest), references, version, evaluate=evaluate)

    def train(self, step: int, num_groups: int, timeout_s: float = 60.0) -> list[Group]:
        """The batch of a learner step."""
        payload = self._ask(self._facade.sample(step, num_groups, timeout_s))
        assert payload is not None, f"no {num_groups} groups within {timeout_s} s"
        return list(decode_batch(payload).groups)

    def stats(self) -> dict[str, float]:
        """Of the buffer, names without `buffer/`."""
        return {
            name.removeprefix("buffer/"): value for name, value in self._ask(self._facade.stats()).items()
        }

    def close(self) -> dict[str, Any]:
        """Ends everything; the audit of the ledger."""
        try:
            self.board.get("retire", list(self._running), "now")
            wait(self._running.values(), 60)  # All of them, also where the first has failed.
            for running in self._running.values():
                running.result(0)
        finally:
            self._ask(self._facade.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._threads.shutdown(wait=False)
        return audit_run(self.run_dir)
