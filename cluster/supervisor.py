"""The driver of a run: starts every part, watches them, ends them in order.

    monitor, buffer, board   one Ray actor each, no CPU reserved
    learner ranks            one placement group for the gang
    rollout actors           one placement group each, so that one that cannot be placed never blocks the others
    offline actor            one, no CPU reserved, where all samples are offline; the rollout actors then only evaluate

An actor that dies is replaced; its leases and evaluation items are handed out again. A learner rank that dies ends the run
with the cause.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.offline import OfflineActor
from actors.rollout import RolloutActor
from buffer.server import ReplayBuffer
from cluster.board import Board
from cluster.config import Config
from cluster.errors import AgroError, PeerTimeout, PlacementError, RewardError, TrainingError
from cluster.guardian import guard
from cluster.monitor import Monitor
from cluster.prepare import Inputs, repository_root
from cluster.report import write_report
from cluster.terminal import Terminal
from learner.worker import LearnerRank

WATCH_S = 0.5
START_TIMEOUT_S = 180.0
MAX_RESTARTS = 5
MIN_SCORED_SAMPLES = 64
CLOSE_TIMEOUT_S = 30.0
FEEDER = "offline"


class StopSignal:
    """SIGINT and SIGTERM as a request to end in order; a second one interrupts."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to the cluster of this job (RAY_ADDRESS), else to a local Ray of our own that ends with the run."""
    on_cluster = "RAY_ADDRESS" in os.environ
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if on_cluster:
            ray.init(address="auto", **common)
        else:
            guard()
            # Logical CPUs: a machine with fewer cores than the config asks for still runs it, only slower.
            asked = config.actors.count * config.actors.num_cpus + config.learner.ranks * config.learner.num_cpus
            env = {"PYTHONPATH": os.pathsep.join([str(repository_root()), *filter(None, [os.environ.get("PYTHONPATH")])])}
            cpus = max(os.cpu_count() or 1, int(asked + 0.999))
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env={"env_vars": env}, **common)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise PlacementError(
            f"no connection to Ray at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {str(error).splitlines()[0]}. "
            "Start a head (`ray start --head`) or unset RAY_ADDRESS to run alone; see `python launch.py doctor`."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


class Supervisor:
    """One run, from its inputs to its summary."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._config = inputs, inputs.config
        self._groups: dict[str, PlacementGroup] = {}
        self._rollouts: dict[Any, str] = {}  # the running call of each rollout actor, and of the offline actor -> its name
        self._handles: dict[str, Any] = {}
        self._pid_calls: dict[str, Any] = {}
        self._restarts = 0
        self._start_s = time.monotonic()
        self._start_services()

    # --- start ----------------------------------------------------------------------------------------------------

    def _start_services(self) -> None:
        config, inputs = self._config, self._inputs
        run_dir = str(inputs.run_dir)
        self.monitor = _remote(Monitor).options(num_cpus=0).remote(config, run_dir)
        buffer_class = _remote(ReplayBuffer).options(num_cpus=0, max_concurrency=1000)
        self.buffer = buffer_class.remote(config, run_dir, len(inputs.prompts))
        monitor = self.monitor

        def tell(evaluation: Any, samples: Any) -> None:
            monitor.log_evaluation.remote(evaluation, samples)

        self.board = _remote(Board).options(num_cpus=0, max_concurrency=1000).remote(config, len(inputs.eval_prompts), tell)

    def start(self, warnings: list[str]) -> None:
        """Place and start learner and actors; returns when every learner rank is ready. Actors may still be loading."""
        for text in [*(f"warning: {warning}" for warning in warnings), *self._inputs.notes]:
            self._event(text)
        config = self._config
        learner, actors = config.learner, config.actors
        group = self._place("learner", [{"CPU": learner.num_cpus, "GPU": learner.num_gpus}] * learner.ranks)
        self._await_placed("learner")
        self._ranks = [
            _remote(LearnerRank)
            .options(max_concurrency=2, runtime_env=_threads(learner.num_cpus), **_on(group, index, learner.num_cpus, learner.num_gpus))
            .remote(index, config, self._inputs.pad_id)
            for index in range(learner.ranks)
        ]
        for name in [*([FEEDER] if config.is_offline else []), *(f"actor-{index}" for index in range(actors.count))]:
            self._start_actor(name)
        address = self._get(self._ranks[0].address.remote(), "learner rank 0")
        self._get([rank.start.remote(address) for rank in self._ranks], "learner ranks", config.run.timeout_s)
        self._pid_calls["learner ranks"] = self._ranks[0].__ray_call__.remote(lambda _: os.getpid())
        self.policy_dir = str(self._inputs.run_dir / "policy")
        self._training = [rank.train.remote(self.buffer, self.board, self.monitor, self.policy_dir) for rank in self._ranks]
        self._event(f"learner ready: {learner.ranks} ZeRO-3 rank(s); {actors.count} rollout actors loading")

    def _start_actor(self, name: str) -> None:
        config, inputs, actors = self._config, self._inputs, self._config.actors
        peers = (self.buffer, self.board, self.monitor)
        if _role(name) == FEEDER:
            actor_class = _remote(OfflineActor).options(num_cpus=0, runtime_env=_threads(1))
            handle = actor_class.remote(name, config, inputs.prompts, *peers)
        else:
            group = self._place(name, [{"CPU": actors.num_cpus, "GPU": actors.num_gpus}])
            placed = _on(group, 0, actors.num_cpus, actors.num_gpus)
            actor_class = _remote(RolloutActor).options(runtime_env=_threads(actors.num_cpus, engine=True), **placed)
            handle = actor_class.remote(name, config, inputs.prompts, inputs.eval_prompts, *peers)
        self._handles[name] = handle
        self._rollouts[handle.run.remote()] = name
        self._pid_calls[name] = handle.__ray_call__.remote(lambda _: os.getpid())

    def _place(self, role: str, bundles: list[dict[str, float]]) -> PlacementGroup:
        """A placement group of its own for `role`."""
        asked = [{key: value for key, value in bundle.items() if value} or {"CPU": 0.001} for bundle in bundles]
        self._groups[role] = placement_group(asked, "PACK")
        return self._groups[role]

    def _await_placed(self, role: str) -> None:
        """Raises PlacementError that says what was asked for and what is free."""
        group = self._groups[role]
        if not ray.wait([group.ready()], timeout=START_TIMEOUT_S)[0]:
            asked = ", ".join(str(bundle) for bundle in group.bundle_specs)
            raise PlacementError(
                f"{role} could not be placed in {START_TIMEOUT_S:.0f} s: asks for {asked}; free now: {ray.available_resources()}"
            )

    # --- watch ----------------------------------------------------------------------------------------------------

    def watch(self, stop: StopSignal, terminal: Terminal) -> list[dict[str, float]]:
        """Until training and the evaluations it began are over; the totals of each rank."""
        stop_sent = False
        while True:
            self._look(terminal)
            if stop.name and not stop_sent:
                stop_sent = True
                self._event(f"{stop.name}: ending after the step in progress")
                for rank in self._ranks:
                    rank.request_stop.remote()
            ready, _ = ray.wait([*self._training, *self._rollouts], num_returns=1, timeout=WATCH_S)
            for call in ready:
                if call in self._rollouts:
                    self._replace(call)
            if any(call in self._training for call in ready):
                done, running = ray.wait(self._training, num_returns=len(self._training), timeout=0)
                self._get(list(done), "learner ranks")  # Raises what any rank raised.
                if not running:
                    break
                time.sleep(WATCH_S)
        totals = self._get(self._training, "learner ranks")
        self._await_evaluations(stop, terminal)
        return totals

    def _look(self, terminal: Terminal) -> None:
        """Carry the buffer's gauges to the monitor, show the view, and stop a run whose rewards fail."""
        stats = self._get(self.buffer.stats.remote(), "replay buffer")
        errors, samples = stats["buffer/samples_error"], stats["buffer/samples_total"]
        self.monitor.log_buffer.remote({**stats, "reward/error_fraction": errors / samples if samples else 0.0})
        terminal.update(self._get(self.monitor.view.remote(), "monitor"))
        if samples >= MIN_SCORED_SAMPLES and errors / samples > self._config.rewards.max_error_fraction:
            _, _, texts = self._get(self.buffer.error_summary.remote(), "replay buffer")
            shown = "\n  ".join(dict.fromkeys(texts))
            raise RewardError(
                f"{errors:.0f} of {samples:.0f} samples got no reward, more than rewards.max_error_fraction = "
                f"{self._config.rewards.max_error_fraction}. The last errors:\n  {shown}"
            )

    def _replace(self, call: Any) -> None:
        """An actor ended although nobody retired it: say why, hand its work out again, start another."""
        name = self._rollouts.pop(call)
        try:
            ray.get(call)
            cause = "it returned"
        except RayTaskError as error:
            if isinstance(error, AgroError):
                raise
            cause = str(error.cause).strip().splitlines()[-1][:300] if str(error.cause).strip() else type(error.cause).__name__
            raise TrainingError(f"actor {name} failed: {type(error.cause).__name__}: {cause}\n{_last_lines(str(error), 6)}") from None
        except RayActorError as error:
            cause = _death_cause(error, self._pid_of(name))
            if "error raised in its creation task" in str(error):
                raise TrainingError(f"actor {name} could not start:\n{_last_lines(str(error), 3)}") from None
        self._restarts += 1
        self._event(f"{name} died: {cause}")
        if self._restarts > MAX_RESTARTS:
            raise TrainingError(f"actors died {self._restarts} times, the last one ({name}): {cause}")
        self._get([self.buffer.release_actor.remote(name), self.board.release_actor.remote(name)], "buffer and board")
        if name in self._groups:
            remove_placement_group(self._groups.pop(name))
        del self._handles[name]
        # A name of its own: what its predecessor still asks for is refused by name.
        successor = f"{_role(name)}.{self._restarts}"
        self._start_actor(successor)
        self._event(f"{name} restarted as {successor} ({self._restarts} of at most {MAX_RESTARTS})")

    def _await_evaluations(self, stop: StopSignal, terminal: Terminal) -> None:
        until_s = time.monotonic() + self._config.run.timeout_s
        while not stop.name:
            open_evaluations, _ = self._get(self.board.evaluations.remote(), "board")
            if not open_evaluations:
                return
            if time.monotonic() > until_s:
                self._event(
                    f"the final evaluation did not end within {self._config.run.timeout_s:.0f} s (run.timeout_s); going on without it"
                )
                return
            self._look(terminal)
            for call in ray.wait(list(self._rollouts), num_returns=1, timeout=WATCH_S)[0]:
                self._replace(call)

    # --- end ------------------------------------------------------------------------------------------------------

    def finish(self, totals: list[dict[str, float]], stopped: str | None) -> dict[str, Any]:
        """Retire the actors, write summary and report; the summary."""
        inputs = self._inputs
        _, arrived = self._get(self.board.evaluations.remote(), "board")
        results = sorted(arrived, key=lambda evaluation: evaluation.policy_version)
        stats = self._get(self.buffer.stats.remote(), "replay buffer")
        self.monitor.log_buffer.remote(stats)
        self._get(self.board.retire.remote(list(self._handles)), "board")  # They end their loops.
        ray.wait(list(self._rollouts), num_returns=len(self._rollouts), timeout=CLOSE_TIMEOUT_S)
        wall_s = time.monotonic() - self._start_s
        first = totals[0] if totals else {}
        summary = {
            "name": self._config.run.name,
            "steps": first.get("steps"),
            "wall_s": wall_s,
            "base_solve_rate": results[0].solve_rate if results and results[0].policy_version == 0 else None,
            "final_solve_rate": results[-1].solve_rate if results else None,
            "final_policy_version": results[-1].policy_version if results else None,
            **{name: _known(first.get(name)) for name in ("staleness_mean", "staleness_max")},
            "samples": first.get("samples"),
            "tokens": first.get("tokens"),
            "samples_per_s": first["samples"] / wall_s if first else None,
            "policy_dir": self.policy_dir if totals else None,
            "report": str(inputs.run_dir / "report.html"),
            "run_dir": str(inputs.run_dir),
            "stopped": stopped,
            "errors": {
                "failed rewards": stats["buffer/samples_error"],
                "bad rows skipped": inputs.prompts.num_bad_rows,
                "groups evicted as stale": stats["buffer/evicted_stale"],
                "actor restarts": self._restarts,
            },
            "wandb_mode": inputs.wandb_mode,
        }
        self._get(self.monitor.close.remote(summary), "monitor", CLOSE_TIMEOUT_S)
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(self.buffer.close.remote(), timeout=CLOSE_TIMEOUT_S)
        write_report(inputs.run_dir)
        return summary

    def close(self) -> None:
        """Kill whatever is left and free its resources."""
        for handle in [*self._handles.values(), *getattr(self, "_ranks", []), self.buffer, self.board, self.monitor]:
            ray.kill(handle)
        for group in self._groups.values():
            remove_placement_group(group)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _event(self, text: str) -> None:
        self.monitor.event.remote(text)

    def _pid_of(self, role: str) -> int | None:
        """Its process id, if it lived long enough to tell: by it the log is found."""
        call = self._pid_calls.get(role)
        if call is None or not ray.wait([call], timeout=0)[0]:
            return None
        with contextlib.suppress(RayActorError):
            return int(ray.get(call))
        return None

    def _get(self, calls: Any, who: str, timeout_s: float | None = None) -> Any:
        """ray.get with the run's timeout; its error names who did not answer, or why it died."""
        limit_s = timeout_s or self._config.run.timeout_s
        try:
            return ray.get(calls, timeout=limit_s)
        except GetTimeoutError:
            raise PeerTimeout(f"{who} did not answer within {limit_s:.0f} s (run.timeout_s)") from None
        except RayTaskError as error:
            if isinstance(error.cause, AgroError):
                raise error.cause from None
            raise TrainingError(f"{who} failed: {type(error.cause).__name__}: {error.cause}\n{_last_lines(str(error), 8)}") from None
        except RayActorError as error:
            raise TrainingError(f"{who} died: {_death_cause(error, self._pid_of(who))}") from None


def _remote(part: type) -> Any:
    """The class as a Ray actor class; untyped, as its handles are."""
    return ray.remote(part)


def _role(name: str) -> str:
    """An actor's name without the number that its restarts gave it."""
    return name.split(".")[0]


def _known(value: float | None) -> float | None:
    """None for NaN: all samples were offline, and had no age."""
    return None if value is None or math.isnan(value) else value


def _on(group: PlacementGroup, index: int, num_cpus: float, num_gpus: float) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "scheduling_strategy": strategy}


def _threads(num_cpus: float, *, engine: bool = False) -> dict[str, Any]:
    """Environment of a worker process: read before torch is imported. One thread per process where cores are shared."""
    env = {"OMP_NUM_THREADS": str(max(1, int(num_cpus))), "TOKENIZERS_PARALLELISM": "false"}
    if engine:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {"env_vars": env}


def _death_cause(error: RayActorError, pid: int | None) -> str:
    """In a few lines: what Ray knows, and the last lines of the process's log where it is on this machine."""
    reason = str(error) if isinstance(error, ActorDiedError) else type(error).__name__
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    known = next((line for line in lines if "worker exit" in line.lower()), lines[0] if lines else "no cause given")
    logs = Path(_ray_node().get_session_dir_path()) / "logs"
    tail = [_last_lines(path.read_text(errors="replace"), 5) for path in logs.glob(f"*-{pid}.err")] if pid else []
    return "\n".join([known[:300], *tail])


def _ray_node() -> Any:
    """Ray's record of this node; private, but there is no public way to a worker's log."""
    return ray._private.worker._global_node


def _last_lines(text: str, count: int) -> str:
    return "\n".join("  " + line[:200] for line in text.strip().splitlines()[-count:])
