"""Monitor, replay buffer and board of a run: Ray actors that reserve no CPU. What everybody else talks to.

Monitor and buffer write into the run directory and stay on the driver's node. A buffer shard that is killed comes back by
itself with all it acknowledged, and Ray repeats the calls that were under way.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from cluster.board import Board, Retirement
from cluster.errors import PeerTimeout
from cluster.monitor import Monitor
from cluster.peers import Calls, connect_buffer
from cluster.prepare import Inputs
from cluster.processes import explained, log_tail, on_this_node, remote, whereabouts

BUFFER, BOARD, MONITOR = "replay buffer", "board", "monitor"


class Polled:
    """What another process says about itself, asked for again and again, and never waited for: `value`, None before the first answer."""

    def __init__(self, services: Services, method: Any, who: str) -> None:
        self._services, self._method, self._who = services, method, who
        self._call: Call | None = None
        self.value: Any = None

    def look(self) -> None:
        """Take the answer that has come, and ask again. Raises AgroError when none comes, or a failure does."""
        if self._call is not None and self._call.is_done():
            self.value = self._call.result()
            self._call = None
        if self._call is None:
            self._call = self._services.start(self._method(), self._who)


class Call:
    """One call under way, with a limit."""

    def __init__(self, future: Future[Any], who: str, timeout_s: float) -> None:
        self.who, self._future, self._timeout_s = who, future, timeout_s
        self._until_s = time.monotonic() + timeout_s

    def is_done(self) -> bool:
        """Whether `result` would not wait. Raises PeerTimeout when the answer is overdue."""
        if not self._future.done() and time.monotonic() > self._until_s:
            raise PeerTimeout(f"{self.who} did not answer within {self._timeout_s:.0f} s (run.timeout_s)")
        return self._future.done()

    def result(self) -> Any:
        """The answer; raises AgroError for a failure or a death."""
        try:
            return self._future.result(0)
        except RayError as error:
            raise explained(error, self.who) from None


class Services:
    """`monitor`, `board`, and `buffers`, the handles that other processes get; `buffer` is these as one."""

    def __init__(self, inputs: Inputs) -> None:
        config, run_dir, here = inputs.config, str(inputs.run_dir), on_this_node()
        self._timeout_s = config.run.timeout_s
        self._calls = Calls(self._timeout_s)
        self._owed: list[Call] = []
        self._whereabouts: list[Future[tuple[str, int]]] = []
        self.monitor = monitor = remote(Monitor).options(**here).remote(config, run_dir)
        shard_class = remote(ReplayBuffer).options(max_concurrency=1000, max_restarts=-1, max_task_retries=-1, **here)
        self.buffers = [shard_class.remote(config, run_dir, len(inputs.prompts), shard) for shard in range(config.buffer.num_shards)]
        self.buffer = connect_buffer(self.buffers)

        def tell(evaluation: Any, samples: Any) -> None:
            monitor.log_evaluation.remote(evaluation, samples)

        self.board = remote(Board).options(num_cpus=0, max_concurrency=1000).remote(config, len(inputs.eval_prompts), tell)

    @property
    def peers(self) -> tuple[list[Any], Any, Any]:
        """What actors and ranks get: buffer shards, board, monitor."""
        return self.buffers, self.board, self.monitor

    def forget_snapshots(self) -> None:
        """The learner died: what it published is gone with it."""
        dropped = self.ask(self.board.forget_snapshots.remote(), BOARD)
        if dropped:
            self.event(
                f"evaluations of versions {dropped} ended with the learner's death; the versions it publishes again are evaluated again"
            )

    def event(self, text: str) -> None:
        """Something worth telling."""
        self.monitor.event.remote(text)

    def ask(self, call: Awaitable[Any], who: str, timeout_s: float | None = None) -> Any:
        """The call's result, waited for. Raises AgroError: no answer, a failure, a death."""
        try:
            return self._calls.ask(call, who, timeout_s)
        except RayError as error:
            raise explained(error, who) from None

    def start(self, call: Awaitable[Any], who: str) -> Call:
        """The call, not waited for."""
        return Call(self._calls.start(call), who, self._timeout_s)

    def look(self) -> None:
        """Whether orders given earlier were carried out. Raises AgroError when one was not."""
        running = []
        for call in self._owed:
            if not call.is_done():
                running.append(call)
                continue
            try:
                call.result()
            except DiskFullError as error:
                self.event(f"{call.who} could not take leases back; they will run out: {error}")
        self._owed = running

    def retire(self, names: Sequence[str], how: Retirement) -> None:
        """Tell actors to end; not waited for."""
        self._owed.append(self.start(self.board.retire.remote(list(names), how), BOARD))

    def release(self, name: str) -> None:
        """Hand the work of an actor that is gone out again; not waited for."""
        self._owed.append(self.start(self.buffer.release_actor(name), BUFFER))
        self._owed.append(self.start(self.board.release_actor.remote(name), BOARD))

    def last_words_of_shards(self) -> str:
        """What buffer shards that are gone since the last call wrote to their logs."""
        pids = [future.result(0)[1] for future in self._whereabouts if future.done() and future.exception() is None]
        self._whereabouts = [self._calls.start(shard.__ray_call__.remote(whereabouts)) for shard in self.buffers]
        return "\n".join(line for pid in pids if not psutil.pid_exists(pid) for line in log_tail(pid))

    def kill(self) -> None:
        """End them all at once."""
        for handle in [*self.buffers, self.board, self.monitor]:
            ray.kill(handle)
