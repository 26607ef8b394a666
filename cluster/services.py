"""Monitor, replay buffer, board and reward models of a run: Ray actors that everybody else talks to. All but
the reward models reserve no CPU.

Monitor and buffer write into the run directory and stay on the driver's node. Each of them that is killed
comes back by itself, and Ray repeats the calls that were under way: a buffer shard with all it acknowledged,
the monitor with what its files say, the board empty, to be told again (`restore_board`), a reward model as
it was.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from actors.reward_model import RewardModel, RewardModelClient
from buffer.client import BufferClient, connect_buffer
from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from cluster.deaths import BOARD as BOARD_KIND
from cluster.deaths import MONITOR as MONITOR_KIND
from cluster.deaths import REWARD_MODEL, SHARD, Deaths, ProcessKind
from cluster.monitor.monitor import Monitor
from cluster.monitor.reporting_board import ReportingBoard
from cluster.preparation.prepare import Inputs
from core.calls import Calls, Client, Pending, Polled
from core.evaluation.open_evaluation import SuiteSize
from core.evaluation.records import Evaluation
from core.monitor_client import MONITOR, MonitorClient
from core.newest import MAX_GONE, Newest
from core.own_warnings import OwnWarnings
from core.process_log import ProcessLog, make_log_folder, role_of
from core.processes import Whereabouts, cause_of_end, on_this_node, remote, threads, whereabouts
from core.weights.board import BOARD, BoardClient, Retirement
from rewards.hosted import HostedModel, models_of, path_of

_log = logging.getLogger(__name__)


@dataclass
class _Life:
    """A service that Ray starts again by itself: where its process is, and was when that was last asked."""

    name: str
    kind: ProcessKind
    place: Polled[Whereabouts]
    known: Whereabouts | None = None


class Services:
    """`buffer`, `board` and `monitor`, as clients that other processes get too.

    stats, view   what the buffer and the monitor say of themselves, asked again and again
    """

    def __init__(self, inputs: Inputs, deaths: Deaths) -> None:
        config, here = inputs.config.without_knobs(), on_this_node()
        self._run_dir, self._deaths = str(inputs.run_dir), deaths
        make_log_folder(inputs.run_dir)
        self._owed: list[Pending[Any]] = []
        self._retiring: Newest[Retirement] = Newest(MAX_GONE)
        self._warnings = OwnWarnings()  # Of the driver itself.
        again = {"max_restarts": -1, "max_task_retries": -1}
        name = self._monitor_name = f"monitor-{secrets.token_hex(4)}"
        shown = inputs.config.model_dump(mode="json")
        monitor_class = remote(Monitor, self.log_of("monitor")).options(name=name, **here, **again)
        monitor = monitor_class.remote(
            config,
            self._run_dir,
            began_at_s=time.time(),
            shown=shown,
            wandb=inputs.wandb_mode,
            project=inputs.wandb_project,
        )
        self.monitor = MonitorClient(monitor, MONITOR)
        self.calls = Calls(config.run.timeout_s, self.monitor.event)
        shards = []
        for shard in range(config.buffer.num_shards):
            shard_class = remote(ReplayBuffer, self.log_of(f"buffer-{shard}"))
            options = shard_class.options(max_concurrency=1000, **here, **again)
            shards.append(
                options.remote(config, self._run_dir, len(inputs.prompts), shard, inputs.prompts.parts)
            )
        self.buffer = connect_buffer(shards)
        board_class = remote(ReportingBoard, self.log_of("board"))
        board_class = board_class.options(max_concurrency=1000, **here, **again)
        samples = {suite.name: suite.samples for suite in config.suites}
        sizes = {
            suite: SuiteSize(len(prompts), samples[suite]) for suite, prompts in inputs.eval_prompts.items()
        }
        kept_suite = (config.eval.keep_best or "").partition("/")[0]
        self.board = BoardClient(board_class.remote(config.run, sizes, name, kept_suite), BOARD)
        self.reward_models = {
            name: self._host(number, name, model)
            for number, (name, model) in enumerate(models_of(config).items())
        }
        self.stats = Polled(self.calls, self.buffer.stats)
        self.view = Polled(self.calls, self.monitor.view)
        self._lives = [
            *(
                self._life(f"buffer-{shard}", SHARD, client)
                for shard, client in enumerate(self.buffer.shards)
            ),
            self._life("board", BOARD_KIND, self.board),
            self._life("monitor", MONITOR_KIND, self.monitor),
            *(
                self._life(f"reward-model-{number}", REWARD_MODEL, client)
                for number, client in enumerate(self.reward_models.values())
            ),
        ]

    def _host(self, number: int, name: str, model: HostedModel) -> RewardModelClient:
        """Starts the process of a reward model, where its CPUs and GPUs are free; not waited for."""
        model_class = remote(RewardModel, self.log_of(f"reward-model-{number}")).options(
            num_cpus=model.num_cpus,
            num_gpus=model.num_gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
            runtime_env=threads(model.num_cpus),
        )
        return RewardModelClient(
            model_class.remote(name, model, path_of(name)), f"the reward model {path_of(name)}"
        )

    def _life(self, name: str, kind: ProcessKind, client: Client) -> _Life:
        return _Life(name, kind, Polled(self.calls, partial(client.inside, whereabouts)))

    @property
    def peers(self) -> tuple[BufferClient, BoardClient, MonitorClient]:
        """What actors and ranks get: buffer, board, monitor."""
        return self.buffer, self.board, self.monitor

    @property
    def num_models_loading(self) -> int:
        """How many reward models are not ready yet."""
        return sum(life.known is None for life in self._lives if life.kind is REWARD_MODEL)

    def log_of(self, name: str) -> ProcessLog:
        """Says where the process `name` writes; its warnings go to the monitor."""
        return ProcessLog(self._run_dir, role_of(name), name, self._monitor_name)

    def forget_snapshots(self) -> Pending[list[int]]:
        """The learner died: what it published is gone with it. Not waited for; the answer are the versions
        whose evaluation ended.
        """
        return self.calls.start(self.board.forget_snapshots())

    def event(self, text: str) -> None:
        """Tells something worth telling: in the run's events, and in the driver's log."""
        _log.info("%s", text)
        self.calls.tell(text)

    def log_buffer(self, gauges: Mapping[str, float]) -> None:
        """Gives the monitor the buffer's gauges for its next rows, and the share of samples that failed."""
        errors, samples = gauges["buffer/samples_error"], gauges["buffer/samples_total"]
        shares = {"reward/error_fraction": errors / samples if samples else 0.0}
        self.calls.post(self.monitor.log_buffer({**gauges, **shares}), "the buffer's gauges")

    def poll(self) -> list[str]:
        """Takes the answers that have come, and asks again; the names of the services that were started
        again.

        Raises AgroError: an order was not carried out, nobody answers, or a service has died too often.
        """
        self._poll_orders()
        self.stats.poll()
        self.view.poll()
        if counts := self._warnings.take():
            self.calls.post(self.monitor.warn("driver", counts), "the driver's warnings")
        return [life.name for life in self._lives if self._is_another(life)]

    def _is_another(self, life: _Life) -> bool:
        """Whether Ray has made another process in a service's place; its death is noted and told."""
        life.place.poll()
        before, life.known = life.known, life.place.value
        if before is None or life.known is None or before == life.known:
            return False
        kind = life.kind
        cause = self._deaths.note(kind, life.name, cause_of_end(before), where=before)
        who = kind.together or (life.name if kind is REWARD_MODEL else kind.name)
        number = ordinal(self._deaths.total(kind))
        stats = self.stats.value or {}
        found = f", {stats.get('buffer/groups', 0):.0f} groups recovered" if kind is SHARD else ""
        self.event(f"{who} restarted ({number} time){found}: {cause}")
        return True

    def restore_board(self, results: Sequence[Evaluation], held: Sequence[int] = ()) -> Pending[None]:
        """Tells a board that was started again what is done, who ends, and which snapshots to hold; not
        waited for.
        """
        return self.calls.start(self.board.restore(list(results), dict(self._retiring), list(held)))

    def release_all(self) -> Pending[None]:
        """Takes back what an earlier start of the run had leased, to actors of the same names; not waited
        for.
        """
        return self.calls.start(self.buffer.release_all())

    def _poll_orders(self) -> None:
        """Looks at the orders that are under way. One that failed is raised once, the others are kept."""
        looked_at, self._owed = deque(self._owed), []
        try:
            while looked_at:
                call = looked_at.popleft()
                if not call.is_done():
                    self._owed.append(call)
                    continue
                try:
                    call.result()
                except DiskFullError as error:
                    self.event(f"{call.who} could not take leases back; they will run out: {error}")
        finally:
            self._owed += looked_at

    def retire(self, names: Sequence[str], how: Retirement) -> None:
        """Tells actors to end; not waited for."""
        for name in names:
            if self._retiring.get(name) != "now":
                self._retiring[name] = how
        self._owed.append(self.calls.start(self.board.retire(list(names), how)))

    def release(self, name: str) -> None:
        """Hands the work of an actor that is gone out again; not waited for."""
        self._retiring[name] = "now"
        self._owed.append(self.calls.start(self.buffer.release_actor(name)))
        self._owed.append(self.calls.start(self.board.release_actor(name)))
        self.calls.post(self.monitor.forget_actor(name), "that an actor is gone")

    def kill(self) -> None:
        """Ends them all at once."""
        self._warnings.end()
        for client in (*self.buffer.shards, self.board, self.monitor, *self.reward_models.values()):
            ray.kill(client.handle)


def ordinal(number: int) -> str:
    """Writes 1st, 2nd, 3rd, 4th."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{suffix}"
