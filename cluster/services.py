"""Monitor, replay buffer and board of a run: Ray actors that reserve no CPU. What everybody else talks to.

Monitor and buffer write into the run directory and stay on the driver's node. Each of them that is killed
comes back by itself, and Ray repeats the calls that were under way: a buffer shard with all it acknowledged,
the monitor with what its files say, the board empty, to be told again (`restore_board`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import ray

from buffer.client import BufferClient, connect_buffer
from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from cluster.monitor.monitor import Monitor
from cluster.preparation.prepare import Inputs
from core.calls import Calls, Pending, Polled
from core.config import Config
from core.monitor_client import MONITOR, MonitorClient
from core.processes import log_tail, on_this_node, remote, whereabouts
from core.records import Evaluation
from core.weights.board import BOARD, Board, BoardClient, Retirement


class ReportingBoard(Board):
    """A board that tells the monitor of its evaluations.

    It is given the monitor's name: a handle among its arguments would lie in Ray's object store, where a
    restart may not find it.
    """

    def __init__(self, config: Config, num_eval_rows: int, monitor_name: str) -> None:
        super().__init__(config, num_eval_rows, self._report)
        self._monitor = MonitorClient(ray.get_actor(monitor_name), MONITOR)
        self._calls = Calls(config.run.timeout_s, self._monitor.event, name="the board")

    def _report(self, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        self._calls.post(self._monitor.log_evaluation(evaluation, samples), "an evaluation")


@dataclass
class _Life:
    """A service that is started again by itself, and the process it is now."""

    where: Polled[tuple[str, int]]
    pid: int | None = None


class Services:
    """`buffer`, `board` and `monitor`, as clients that other processes get too."""

    def __init__(self, inputs: Inputs) -> None:
        config, run_dir, here = inputs.config.without_knobs(), str(inputs.run_dir), on_this_node()
        self._owed: list[Pending[Any]] = []
        self._whereabouts: list[Pending[tuple[str, int]]] = []
        again = {"max_restarts": -1, "max_task_retries": -1}
        name = f"monitor-{secrets.token_hex(4)}"
        shown = inputs.config.model_dump(mode="json")
        monitor_class = remote(Monitor).options(name=name, **here, **again)
        monitor = monitor_class.remote(config, run_dir, began_at_s=time.time(), shown=shown)
        self.monitor = MonitorClient(monitor, MONITOR)
        self.calls = Calls(config.run.timeout_s, self.monitor.event)
        shard_class = remote(ReplayBuffer).options(max_concurrency=1000, **here, **again)
        self.buffer = connect_buffer(
            [
                shard_class.remote(config, run_dir, len(inputs.prompts), shard)
                for shard in range(config.buffer.num_shards)
            ]
        )
        board_class = remote(ReportingBoard).options(num_cpus=0, max_concurrency=1000, **again)
        self.board = BoardClient(board_class.remote(config, len(inputs.eval_prompts), name), BOARD)
        self._retiring: dict[str, Retirement] = {}
        self._lives = {
            part: _Life(Polled(self.calls, partial(client.inside, whereabouts)))
            for part, client in (("monitor", self.monitor), ("board", self.board))
        }

    @property
    def peers(self) -> tuple[BufferClient, BoardClient, MonitorClient]:
        """What actors and ranks get: buffer, board, monitor."""
        return self.buffer, self.board, self.monitor

    def forget_snapshots(self) -> None:
        """The learner died: what it published is gone with it."""
        dropped = self.calls.ask(self.board.forget_snapshots())
        if dropped:
            self.event(
                f"evaluations of versions {dropped} ended with the learner's death; the versions it "
                "publishes again are evaluated again"
            )

    def event(self, text: str) -> None:
        """Tells the monitor something that is worth telling."""
        self.calls.tell(text)

    def log_buffer(self, gauges: Mapping[str, float]) -> None:
        """Gauges for the monitor's next rows."""
        self.calls.post(self.monitor.log_buffer(gauges), "the buffer's gauges")

    def restarted(self) -> dict[str, list[str]]:
        """Monitor and board, where they were started again since the last call: their names, and the
        last words of the process before.
        """
        found = {}
        for part, life in self._lives.items():
            life.where.poll()
            if life.where.value is None:
                continue
            pid = life.where.value[1]
            if life.pid not in (None, pid):
                found[part] = log_tail(life.pid)
            life.pid = pid
        return found

    def restore_board(self, results: Sequence[Evaluation]) -> None:
        """Tell a board that was started again what is done, and who ends."""
        self.calls.ask(self.board.restore(list(results), self._retiring))

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
        self._owed.append(self.calls.start(self.board.retire(list(names), how)))

    def release(self, name: str) -> None:
        """Hand the work of an actor that is gone out again; not waited for."""
        self._retiring[name] = "now"
        self._owed.append(self.calls.start(self.buffer.release_actor(name)))
        self._owed.append(self.calls.start(self.board.release_actor(name)))

    def last_words_of_shards(self) -> str:
        """What buffer shards that are gone since the last call wrote to their logs."""
        known = [asked for asked in self._whereabouts if asked.future.done() and asked.error() is None]
        pids = [asked.result()[1] for asked in known]
        for asked in self._whereabouts:
            asked.give_up()
        self._whereabouts = [self.calls.start(shard.inside(whereabouts)) for shard in self.buffer.shards]
        return "\n".join(line for pid in pids if not psutil.pid_exists(pid) for line in log_tail(pid))

    def kill(self) -> None:
        """End them all at once."""
        for client in (*self.buffer.shards, self.board, self.monitor):
            ray.kill(client.handle)
