"""The driver of a run: starts every part, watches them, ends them in order.

    monitor, buffer, board   services.py   no CPU reserved
    learner ranks            learner.py    one placement group for all; all start again from a checkpoint when one dies
    rollout actors           fleet.py      one placement group each: placed, replaced, scaled while the run goes on
    offline actor            fleet.py      one, no CPU reserved, where all samples are offline; the rollout actors then only evaluate
    other shells             control.py    scale requests in, status out
    judgements               health.py, autoscale.py

Everything is a look that takes each part as far as it can go; nothing in the loop waits for another process.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayError

from actors.offline import OfflineActor
from actors.rollout import RolloutActor
from cluster.autoscale import Autoscaler, Load
from cluster.control import Answer, Control, RunStatus, ScaleRequest
from cluster.fleet import Fleet, Kind
from cluster.health import Health, step_of
from cluster.learner import Learner
from cluster.monitor.report import read_evaluations, write_report
from cluster.monitor.terminal import Terminal
from cluster.preparation.prepare import Inputs
from cluster.ray_watch import RayWatch
from cluster.services import Services
from cluster.signals import StopSignal
from core.calls import Call, Polled
from core.errors import AgroError, TrainingError
from core.json_lines import finite_tree, note_event, replace_json
from core.processes import remote, threads
from core.records import Evaluation

T = TypeVar("T")

WATCH_S = 0.4
TELL_LOADING_S = 8.0
CLOSE_TIMEOUT_S = 30.0
RAY_GONE_TIMEOUT_S = 2.0  # Some parts live on for a moment.
RETIRE_LOOK_S = 0.1
WAITS = ("admission", "weights", "evaluation", "disk")


class Supervisor:
    """One run, from its inputs to its summary."""

    def __init__(self, inputs: Inputs) -> None:
        """Starts the services. Raises StoreError when the run directory's buffer cannot be used."""
        self._inputs, self._config = inputs, inputs.config
        self._start_s, self._next_tell_s = time.monotonic(), TELL_LOADING_S
        self._state = "starting"
        self._stopped: str | None = None
        self.policy_dir = str(inputs.run_dir / "policy")
        self._services = services = Services(inputs)
        self._stats = Polled(services.calls, services.buffer.stats)
        self._view = Polled(services.calls, services.monitor.view)
        self._evaluations = Polled(services.calls, services.board.evaluations)
        self._health = Health(self._config, services, inputs.run_dir)
        self._control = Control(inputs.run_dir, services.event)
        actors = self._config.actors
        self._autoscaler = None if actors.max is None else Autoscaler(actors.min, actors.max)
        self._fleet = Fleet(
            Kind(self._spawn_rollout, actors.num_cpus, actors.num_gpus),
            retire=services.retire,
            release=services.release,
            tell=services.event,
            timeout_s=self._config.run.timeout_s,
        )
        self._learner: Learner | None = None
        self._earlier_evaluations = read_evaluations(inputs.run_dir)  # Of earlier starts of the run.
        self._results: dict[int, Evaluation] = {}  # Of this start, by policy version.
        self._is_last_begun = False  # The evaluation of the last version.
        self._ray = RayWatch(self._abandon)

    # --- start ---

    def start(self, warnings: list[str], stop: StopSignal, terminal: Terminal) -> None:
        """Place and start learner and actors; returns when every learner rank is ready, or `stop` came.
        Actors may still be loading.
        """
        for text in [*(f"warning: {warning}" for warning in warnings), *self._inputs.notes]:
            self._services.event(text)
        # Raises what is wrong with the run directory.
        if not self._await(lambda: self._stats.value is not None, stop, terminal):
            return
        if self._inputs.is_continued:
            # Actors of an earlier start had the same names.
            self._services.calls.ask(self._services.buffer.release_all())
        self._start_learner()
        # Before the actors, which take what is left.
        if not self._await(lambda: self._learner_is("loading", "training"), stop, terminal):
            return
        if self._config.is_offline:
            self._fleet.add_feeder(Kind(self._spawn_feeder, is_placed=False))
        self._fleet.scale_to(self._config.actors.count)
        if not self._await(lambda: self._learner_is("training"), stop, terminal):
            return
        self._state = "training"
        self._services.event(
            f"learner ready: {self._config.learner.ranks} ZeRO-3 rank(s); {self._config.actors.count} "
            "rollout actors loading"
        )

    def _start_learner(self) -> None:
        inputs, services = self._inputs, self._services
        self._learner = Learner(
            self._config,
            inputs.pad_id,
            services.peers,
            inputs.run_dir,
            tell=services.event,
            forget_snapshots=services.forget_snapshots,
        )

    def _learner_is(self, *states: str) -> bool:
        return self._learner is not None and self._learner.state in (*states, "done")

    def _await(self, is_so: Callable[[], bool], stop: StopSignal, terminal: Terminal) -> bool:
        """Until `is_so`, which has a limit of its own; False when a signal ends the run before."""
        while not is_so():
            if stop.name:
                return False
            self._look(terminal)
            self._tell_what_loads()
            time.sleep(WATCH_S)
        return True

    def _tell_what_loads(self) -> None:
        """Until the first step is done, every `TELL_LOADING_S` and then less and less often: what the
        run waits for.
        """
        elapsed_s = time.monotonic() - self._start_s
        if elapsed_s < self._next_tell_s or self._view.value is None or step_of(self._view.value):
            return
        self._next_tell_s = max(elapsed_s + TELL_LOADING_S, 1.5 * elapsed_s)
        waits = (
            [f"the learner is {self._learner.state}"]
            if self._learner is not None and not self._learner_is("training")
            else []
        )
        num_loading = len(self._fleet.rollout_names("waiting for placement", "loading"))
        waits += [f"{num_loading} of {self._fleet.target} actors are loading"] if num_loading else []
        self._services.event(
            f"starting for {elapsed_s:.0f} s: {', '.join(waits) or 'waiting for the first batch'}"
        )

    def _spawn_rollout(self, name: str, options: dict[str, Any]) -> Any:
        inputs, num_cpus = self._inputs, self._config.actors.num_cpus
        # One thread generates, another answers whether it still does; where weights are pushed, an order and
        # its abortion wait in two more.
        num_threads = 2 if self._config.weights.transport == "snapshot" else 4
        actor_class = remote(RolloutActor).options(
            max_concurrency=num_threads, runtime_env=threads(num_cpus, engine=True), **options
        )
        return actor_class.remote(
            name, self._config, inputs.prompts, inputs.eval_prompts, *self._services.peers
        )

    def _spawn_feeder(self, name: str, options: dict[str, Any]) -> Any:
        actor_class = remote(OfflineActor).options(runtime_env=threads(1), **options)
        return actor_class.remote(name, self._config, self._inputs.prompts, *self._services.peers)

    # --- watch ---

    def watch(self, stop: StopSignal, terminal: Terminal) -> list[dict[str, float]]:
        """Until training and the evaluations it began are over; the totals of each rank."""
        learner, stop_sent = self._learner, False
        while learner is not None and learner.state != "done":
            self._look(terminal)
            self._tell_what_loads()
            if stop.name and not stop_sent:
                stop_sent = True
                if learner.state != "training":
                    break
                self._services.event(f"{stop.name}: ending after the step in progress")
                learner.request_stop()
            time.sleep(WATCH_S)
        if learner is None or learner.state != "done":
            self._services.event(
                f"{stop.name}: ending while the learner loads; nothing was trained since "
                "the newest checkpoint"
            )
            return []
        self._await_evaluations(stop, terminal)
        return learner.totals

    def _look(self, terminal: Terminal | None = None) -> None:
        """Take everything one step further; raises what ends the run."""
        self._refuse_if_ray_is_gone()
        self._mend_services()
        for part in (self._services, self._fleet, self._learner):
            if part is not None:
                part.look()
        for answers in (self._stats, self._view, self._evaluations):
            answers.poll()
        self._obey()
        stats, view = self._stats.value, self._view.value
        if stats is None or view is None or self._evaluations.value is None:
            return
        open_versions = self._note_evaluations(*self._evaluations.value)
        self._log_buffer(stats)
        if self._learner is not None:
            self._health.look(stats, view, len(open_versions), self._fleet, self._learner)
        self._autoscale(stats, view)
        if self._control.is_due():
            self._control.write(self._status(stats, view))
        if terminal is not None:
            alive = set(self._fleet.names())
            terminal.update(
                {
                    **view,
                    "actors": {name: counters for name, counters in view["actors"].items() if name in alive},
                }
            )

    def _note_evaluations(self, open_versions: Sequence[int], results: Sequence[Evaluation]) -> set[int]:
        """Takes note of the board's word; the versions under evaluation: the last one also while a
        board that died is told of it again.
        """
        self._results |= {result.policy_version: result for result in results}
        last = self._config.run.steps
        self._is_last_begun |= last in open_versions
        is_last_open = self._is_last_begun and last not in self._results
        return {*open_versions, last} if is_last_open else set(open_versions)

    def _refuse_if_ray_is_gone(self) -> None:
        if self._ray.cause:
            self._ray.obeyed()
            raise TrainingError(self._ray.cause)

    def explained(self, error: AgroError | RayError) -> AgroError:
        """The error that ends the run, in words of ours also where Ray failed in the middle of a look."""
        return error if isinstance(error, AgroError) else self._ray.explained(error)

    def _mend_services(self) -> None:
        """Monitor and board are started again by Ray; a board is told what it knew."""
        for who, words in self._services.restarted().items():
            self._health.service_restarted(who, words)
            if who == "board":
                self._services.restore_board(list(self._results.values()))
                if self._learner is not None:
                    self._learner.republish()

    def _log_buffer(self, stats: Mapping[str, float]) -> None:
        errors, samples = stats["buffer/samples_error"], stats["buffer/samples_total"]
        self._services.log_buffer({**stats, "reward/error_fraction": errors / samples if samples else 0.0})

    def _await_evaluations(self, stop: StopSignal, terminal: Terminal) -> None:
        until_s, seen = time.monotonic() + self._config.run.timeout_s, None
        while not stop.name and self._note_evaluations(
            *self._services.calls.ask(self._services.board.evaluations())
        ):
            generated = (
                [actor.get("tokens_under_way") for actor in self._view.value["actors"].values()]
                if self._view.value
                else None
            )
            if generated != seen:  # As long as tokens come, it is only slow.
                until_s, seen = time.monotonic() + self._config.run.timeout_s, generated
            if time.monotonic() > until_s:
                self._services.event(
                    f"the final evaluation stood still for {self._config.run.timeout_s:.0f} s "
                    "(run.timeout_s); going on without it"
                )
                return
            self._look(terminal)
            time.sleep(WATCH_S)

    # --- how many actors ---

    def _obey(self) -> None:
        """A request from another shell."""
        request = self._control.take()
        if request is not None:
            self._control.answer(self._answer(request))

    def _answer(self, request: ScaleRequest) -> Answer:
        actors = self._config.actors
        if self._state != "training":
            return Answer(
                request.id, request.actors, refused=f"the run is {self._state}: ask again when it trains"
            )
        if request.actors < 1 or (actors.max is not None and not actors.min <= request.actors <= actors.max):
            bounds = f"actors.min = {actors.min} to actors.max = {actors.max}, between which this run scales by itself"
            return Answer(
                request.id, request.actors, refused=bounds if actors.max is not None else "expected 1 or more"
            )
        before = self._fleet.target
        added, retired = self._scale_to(request.actors)
        self._services.event(
            f"scaled from {before} to {request.actors} actors, as asked: {_changes(added, retired)}"
        )
        return Answer(request.id, request.actors, tuple(added), tuple(retired))

    def _autoscale(self, stats: Mapping[str, float], view: Mapping[str, Any]) -> None:
        if self._autoscaler is None or self._state != "training":
            return
        rollouts, running = self._fleet.rollout_names(), self._fleet.rollout_names("running")
        waits_s = {
            name: view["actors"][name].get("wait_admission_s") or 0.0
            for name in running
            if name in view["actors"]
        }
        is_settled = len(rollouts) == len(running) == len(waits_s)
        load = Load(
            time.monotonic(),
            stats["buffer/wait_batch_s"],
            waits_s,
            self._fleet.target,
            is_settled,
            step_of(view),
        )
        decision = self._autoscaler.look(load)
        if decision is not None:
            count, reason = decision
            added, retired = self._scale_to(count)
            self._services.event(f"autoscaling to {count} actors, {_changes(added, retired)}: {reason}")

    def _scale_to(self, count: int) -> tuple[list[str], list[str]]:
        if self._autoscaler is not None:
            self._autoscaler.changed(time.monotonic())
        return self._fleet.scale_to(count)

    # --- status ---

    def _status(self, stats: Mapping[str, float], view: Mapping[str, Any]) -> RunStatus:
        known, shown = view["actors"], ("version", "tokens_per_s")
        actors = [
            {**entry, **{key: known.get(entry["name"], {}).get(key) for key in shown}}
            for entry in self._fleet.status()
        ]
        waits = {
            f"actors for {what}": sum(counters.get(f"wait_{what}_s") or 0.0 for counters in known.values())
            for what in WAITS
        }
        is_restarting = (
            self._state == "training"
            and self._learner is not None
            and self._learner.state in ("waiting for placement", "loading")
        )
        return RunStatus(
            name=self._config.run.name,
            state="starting the learner again" if is_restarting else self._state,
            step=step_of(view),
            steps=self._config.run.steps,
            actors=actors,
            buffer=dict(stats),
            waits={"learner for batches": stats["buffer/wait_batch_s"], **waits},
            stopped=self._stopped,
        )

    # --- end ---

    def finish(self, totals: list[dict[str, float]], stopped: str | None) -> dict[str, Any]:
        """Retire the actors, write summary and report; the summary. What does not answer any more is
        left out of it.
        """
        services = self._services
        _, arrived = self._last_word(services.board.evaluations(), ([], []))
        self._results |= {result.policy_version: result for result in arrived}
        last = self._last_word(services.buffer.stats(), self._stats.value or {})
        stats = defaultdict(float, last)
        self._log_buffer(stats)
        if not self._ray.cause:
            self._retire_all()
        results = sorted(
            [*self._earlier_evaluations, *self._results.values()],
            key=lambda evaluation: evaluation.policy_version,
        )
        summary = self._summary(totals[0] if totals else {}, results, stats, stopped)
        self._state, self._stopped = "over", stopped
        view = self._last_word(services.monitor.view(), self._view.value or {"row": {}, "actors": {}})
        self._control.write(self._status(stats, view))
        self._write_summary(summary)
        if not Path(summary["report"]).is_file():  # A full disk may have refused it.
            summary["report"] = None
        self._last_word(services.buffer.close(), None)  # What it acknowledged is on disk.
        return summary

    def _last_word(self, call: Call[T], otherwise: T) -> T:
        """The call's answer; `otherwise` from who is gone, or does not answer in time."""
        limit_s = RAY_GONE_TIMEOUT_S if self._ray.cause else CLOSE_TIMEOUT_S
        try:
            return self._services.calls.ask(call, limit_s)
        except AgroError:
            return otherwise

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        """The last rows, the summary and the report: by the monitor, and by this process where that is
        gone.
        """
        run_dir, path = self._inputs.run_dir, self._inputs.run_dir / "summary.json"
        with contextlib.suppress(OSError):  # Of a disk that went read-only; it is told below.
            path.unlink(missing_ok=True)
        self._last_word(self._services.monitor.close(summary), None)
        try:
            if self._ray.cause or not path.exists():
                note_event(
                    run_dir,
                    self._ray.cause
                    or f"the monitor is gone; the run ended: {summary['stopped'] or 'finished'}",
                )
            if not path.exists():
                replace_json(path, finite_tree(summary))
            write_report(run_dir)
        except OSError as error:
            self._services.event(
                f"{error.filename or run_dir} was not written: {error.strerror}; `launch.py "
                "report` makes the report"
            )

    def _abandon(self, cause: str) -> None:
        """Ray is gone, and the main thread hangs in it: what there is of the run is written, and this
        process ends. From another thread.
        """
        run_dir = self._inputs.run_dir
        with contextlib.suppress(OSError):
            note_event(run_dir, cause)
            results = sorted(self._results.values(), key=lambda evaluation: evaluation.policy_version)
            replace_json(
                run_dir / "summary.json",
                finite_tree(self._summary({}, results, defaultdict(float, self._stats.value or {}), cause)),
            )
            write_report(run_dir)
        os.write(sys.stderr.fileno(), f"error: {cause}\n".encode())
        os._exit(2)

    def close(self) -> None:
        """Kill whatever is left and free its resources."""
        self._ray.stop()
        if self._ray.cause:  # A call to it would hang; the guardian ends what is left.
            return
        self._fleet.kill()
        if self._learner is not None:
            self._learner.kill()
        self._services.kill()

    def _retire_all(self) -> None:
        self._state = "ending"
        self._fleet.end()
        until_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self._fleet.names() and time.monotonic() < until_s:
            self._services.look()
            self._fleet.look()
            time.sleep(RETIRE_LOOK_S)

    def _summary(
        self,
        first: Mapping[str, float],
        results: Sequence[Evaluation],
        stats: Mapping[str, float],
        stopped: str | None,
    ) -> dict[str, Any]:
        """`first`: the totals of rank 0, empty when training did not end; `results`: by policy version."""
        inputs, wall_s = self._inputs, time.monotonic() - self._start_s
        return {
            "name": self._config.run.name,
            "steps": first.get("steps"),
            "wall_s": wall_s,
            "base_solve_rate": results[0].solve_rate if results and results[0].policy_version == 0 else None,
            "final_solve_rate": results[-1].solve_rate if results else None,
            "final_policy_version": results[-1].policy_version if results else None,
            **{name: _known(first.get(name)) for name in ("staleness_mean", "staleness_max")},
            "samples": first.get("samples"),
            "tokens": first.get("tokens"),
            # Of a run in one piece only: the wall time of its earlier starts is not known here.
            "samples_per_s": first["samples"] / wall_s if first and not inputs.is_continued else None,
            # Else what lies there is of an earlier start.
            "policy_dir": self.policy_dir if first.get("policy_written") else None,
            "report": str(inputs.run_dir / "report.html"),
            "run_dir": str(inputs.run_dir),
            "stopped": stopped,
            "errors": {
                "failed rewards": stats["buffer/samples_error"],
                "bad rows skipped": inputs.prompts.num_bad_rows,
                "groups evicted as stale": stats["buffer/evicted_stale"],
                "actor restarts": self._fleet.num_deaths,
                "learner restarts": self._learner.num_deaths if self._learner is not None else 0,
                "buffer restarts": self._health.num_buffer_deaths,
            },
            "wandb_mode": inputs.wandb_mode,
        }


def _changes(added: Sequence[str], retired: Sequence[str]) -> str:
    """`actor-3 added`, `actor-2, actor-1 retire`, or `none`."""
    parts = [f"{', '.join(names)} {verb}" for names, verb in ((added, "added"), (retired, "retire")) if names]
    return "; ".join(parts) or "no change"


def _known(value: float | None) -> float | None:
    """None for NaN: all samples were offline, and had no age."""
    return None if value is None or math.isnan(value) else value
