"""Monitor, replay buffer and board of a run: Ray actors that reserve no CPU. What everybody else talks to.

Monitor and buffer write into the run directory and stay on the driver's node. Each of them that is killed
comes back by itself, and Ray repeats the calls that were under way: a buffer shard with all it acknowledged,
the monitor with what its files say, the board empty, to be told again (`restore_board`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import ray

from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from cluster.monitor.monitor import Monitor
from cluster.preparation.prepare import Inputs
from core.calls import Calls, connect_buffer
from core.config import Config
from core.errors import PeerTimeout
from core.processes import log_tail, on_this_node, remote, whereabouts
from core.records import Evaluation
from core.weights.board import Board, Retirement

BUFFER, BOARD, MONITOR = "replay buffer", "board", "monitor"


class Polled:
    """What another process says about itself, asked for again and again, and never waited for: `value`,
    None before the first answer.
    """

    def __init__(self, services: Services, method: Any, who: str) -> None:
        self._services, self._method, self._who = services, method, who
        self._call: Call | None = None
        self.value: Any = None

    def look(self) -> None:
        """Take the answer that has come, and ask again. Raises AgroError when none comes, or a failure
        does.
        """
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
        return self._future.result(0)


class ReportingBoard(Board):
    """A board that tells the monitor of its evaluations.

    It is given the monitor's name: a handle among its arguments would lie in Ray's object store, where a
    restart may not find it.
    """

    def __init__(self, config: Config, num_eval_rows: int, monitor_name: str) -> None:
        super().__init__(config, num_eval_rows, self._report)
        self._monitor = ray.get_actor(monitor_name)
        self._calls = Calls(config.run.timeout_s, self._monitor.event.remote)

    def _report(self, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        self._calls.post(self._monitor.log_evaluation.remote(evaluation, samples), MONITOR, "an evaluation")


@dataclass
class _Life:
    """A service that is started again by itself, and the process it is now."""

    where: Polled
    pid: int | None = None


class Services:
    """`monitor`, `board`, and `buffers`, the handles that other processes get; `buffer` is these as one."""

    def __init__(self, inputs: Inputs) -> None:
        config, run_dir, here = inputs.config.without_knobs(), str(inputs.run_dir), on_this_node()
        self._timeout_s = config.run.timeout_s
        self._calls = Calls(self._timeout_s, self.event)
        self._owed: list[Call] = []
        self._whereabouts: list[Future[tuple[str, int]]] = []
        again = {"max_restarts": -1, "max_task_retries": -1}
        name = f"monitor-{secrets.token_hex(4)}"
        self.monitor = monitor = (
            remote(Monitor)
            .options(name=name, **here, **again)
            .remote(config, run_dir, began_at_s=time.time(), shown=inputs.config.model_dump(mode="json"))
        )
        shard_class = remote(ReplayBuffer).options(max_concurrency=1000, **here, **again)
        self.buffers = [
            shard_class.remote(config, run_dir, len(inputs.prompts), shard)
            for shard in range(config.buffer.num_shards)
        ]
        self.buffer = connect_buffer(self.buffers)
        board_class = remote(ReportingBoard).options(num_cpus=0, max_concurrency=1000, **again)
        self.board = board_class.remote(config, len(inputs.eval_prompts), name)
        self._retiring: dict[str, Retirement] = {}
        handles = {MONITOR: monitor, BOARD: self.board}
        self._lives = {
            who: _Life(Polled(self, partial(handle.__ray_call__.remote, whereabouts), who))
            for who, handle in handles.items()
        }

    @property
    def peers(self) -> tuple[list[Any], Any, Any]:
        """What actors and ranks get: buffer shards, board, monitor."""
        return self.buffers, self.board, self.monitor

    def forget_snapshots(self) -> None:
        """The learner died: what it published is gone with it."""
        dropped = self.ask(self.board.forget_snapshots.remote(), BOARD)
        if dropped:
            self.event(
                f"evaluations of versions {dropped} ended with the learner's death; the versions it "
                "publishes again are evaluated again"
            )

    def event(self, text: str) -> None:
        """Something worth telling."""
        self.monitor.event.remote(text)  # Not looked at: it is what failures are told by.

    def log_buffer(self, gauges: Mapping[str, float]) -> None:
        """Gauges for the monitor's next rows."""
        self._calls.post(self.monitor.log_buffer.remote(gauges), MONITOR, "the buffer's gauges")

    def restarted(self) -> dict[str, list[str]]:
        """Monitor and board, where they were started again since the last call: their names, and the
        last words of the process before.
        """
        found = {}
        for who, life in self._lives.items():
            life.where.look()
            if life.where.value is None:
                continue
            pid = life.where.value[1]
            if life.pid not in (None, pid):
                found[who] = log_tail(life.pid)
            life.pid = pid
        return found

    def restore_board(self, results: Sequence[Evaluation]) -> None:
        """Tell a board that was started again what is done, and who ends."""
        self.ask(self.board.restore.remote(list(results), self._retiring), BOARD)

    def ask(self, call: Awaitable[Any], who: str, timeout_s: float | None = None) -> Any:
        """The call's result, waited for. Raises AgroError: no answer, a failure, a death."""
        return self._calls.ask(call, who, timeout_s)

    def start(self, call: Awaitable[Any], who: str) -> Call:
        """The call, not waited for."""
        return Call(self._calls.start(call, who), who, self._timeout_s)

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
        self._retiring |= {name: how for name in names if self._retiring.get(name) != "now"}
        self._owed.append(self.start(self.board.retire.remote(list(names), how), BOARD))

    def release(self, name: str) -> None:
        """Hand the work of an actor that is gone out again; not waited for."""
        self._retiring[name] = "now"
        self._owed.append(self.start(self.buffer.release_actor(name), BUFFER))
        self._owed.append(self.start(self.board.release_actor.remote(name), BOARD))

    def last_words_of_shards(self) -> str:
        """What buffer shards that are gone since the last call wrote to their logs."""
        pids = [
            future.result(0)[1]
            for future in self._whereabouts
            if future.done() and future.exception() is None
        ]
        self._whereabouts = [
            self._calls.start(shard.__ray_call__.remote(whereabouts), BUFFER) for shard in self.buffers
        ]
        return "\n".join(line for pid in pids if not psutil.pid_exists(pid) for line in log_tail(pid))

    def kill(self) -> None:
        """End them all at once."""
        for handle in [*self.buffers, self.board, self.monitor]:
            ray.kill(handle)
