"""The driver of a run: starts every part, watches them, ends them in order.

    monitor, buffer, board   services.py      no CPU reserved; Ray starts them again, and reward models too
    learner ranks            learner.py       one placement group for all; all start again from a checkpoint when one dies
    rollout actors           fleet.py         one placement group each: placed, replaced, scaled while the run goes on
    offline actor            fleet.py         one, no CPU reserved, where all samples are offline; the others then only evaluate
    other shells             control.py       scale requests in, status out
    judgements               health.py, scaling.py
    deaths                   deaths.py        counted and written down, whoever noticed them

The loop turns every `TURN_S`, and more often until the learner trains. A turn polls (takes the answers that
came), ticks (does what the clock says is due), judges, and shows; nothing in it waits for another process,
hashes, or reads more than the end of a file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from actors.offline import OfflineActor
from actors.rollout import RolloutActor
from buffer.usable import last_texts
from cluster.control import Control, RunStatus, read_status
from cluster.deaths import Deaths
from cluster.evaluations.best import BestPolicy
from cluster.evaluations.results import Evaluations
from cluster.evaluations.target import Target
from cluster.fleet import Fleet, Kind
from cluster.health import Health, step_of
from cluster.learner import Learner
from cluster.monitor.report import read_evaluations, write_report
from cluster.monitor.terminal import Terminal
from cluster.preparation.prepare import Inputs
from cluster.ray_watch import RayWatch
from cluster.scaling import Scaling
from cluster.services import Services
from cluster.session import first_at_once
from cluster.signals import StopSignal
from cluster.summary import run_summary
from core.calls import Call
from core.errors import AgroError, ConfigError, TrainingError
from core.json_lines import finite_tree, note_event, replace_json
from core.process_log import forget_old_logs, last_lines, log_path, words_of
from core.processes import remote, threads
from core.text import counted

T = TypeVar("T")
TURN_S, START_TURN_S = 0.4, 0.1
TELL_LOADING_S = 8.0
CLOSE_TIMEOUT_S = 30.0
RAY_GONE_TIMEOUT_S = 2.0  # Some parts live on for a moment.
RETIRE_TURN_S = 0.1
FORGET_LOGS_S = 600.0


class Supervisor:
    """One run, from its inputs to its summary."""

    def __init__(self, inputs: Inputs) -> None:
        """Starts the services. Raises StoreError when the run directory's buffer cannot be used, OSError
        when it cannot be written.
        """
        self._inputs, self._config = inputs, inputs.config
        self._start_s, self._next_tell_s = time.monotonic(), TELL_LOADING_S
        self._forget_logs_s = 0.0
        self._state = "starting"
        self._stopped: str | None = None
        run_dir, timeout_s, actors = inputs.run_dir, self._config.run.timeout_s, self._config.actors
        self._deaths = Deaths(run_dir)
        self._services = services = Services(inputs, self._deaths)
        self._best = BestPolicy(self._config, run_dir, services.calls, services.board, services.event)
        earlier = self._best.begin(read_evaluations(run_dir))
        self._evaluations = Evaluations(services, earlier, inputs.eval_prompts, self._config.run.steps)
        self._target = Target(self._config.eval, services.event)
        self._health = Health(self._config, services, run_dir)
        self._control = Control(run_dir, services.event)
        self._fleet = Fleet(
            Kind(self._spawn_rollout, actors.num_cpus, actors.num_gpus),
            services.calls,
            retire=services.retire,
            release=services.release,
            tell=services.event,
            deaths=self._deaths,
            timeout_s=timeout_s,
            held_by=self._held_by,
            first_at_once=first_at_once(self._config.learner.ranks),
            may_place=lambda: self._learner is None or not self._learner.wants_place,
        )
        self._scaling = Scaling(actors, self._fleet, self._control, services.event)
        self._learner: Learner | None = None
        self._ray = RayWatch(self._abandon)

    # --- start ---

    def start(self, warnings: list[str], stop: StopSignal, terminal: Terminal) -> None:
        """Places and starts learner and actors; returns when every learner rank is ready, or `stop` came.
        Actors may still be loading.
        """
        for text in [*(f"warning: {warning}" for warning in warnings), *self._inputs.notes]:
            self._services.event(text)
        self._start_learner()
        if self._inputs.is_continued:
            self._tell_of_driver()
            release = self._services.release_all()  # Actors of an earlier start had the same names.
            if not self._await(release.is_done, stop, terminal):
                return
            release.result()
        # Before the actors, which take what is left.
        if not self._await(lambda: self._learner_is("loading", "training"), stop, terminal):
            return
        # Else the first groups would wait for their rewards while their time runs.
        if not self._await(lambda: not self._services.num_models_loading, stop, terminal):
            return
        if self._config.is_offline:
            self._fleet.add_feeder(Kind(self._spawn_feeder, is_placed=False))
        self._fleet.scale_to(self._config.actors.fewest)
        if not self._await(lambda: self._learner_is("training"), stop, terminal):
            return
        self._state = "training"
        self._services.event(
            f"learner ready: {self._config.learner.ranks} ZeRO-3 rank(s); {self._config.actors.fewest} "
            "rollout actors loading"
        )

    def _start_learner(self) -> None:
        inputs, services = self._inputs, self._services
        self._learner = Learner(
            self._config,
            inputs.pad_id,
            services.peers,
            inputs.run_dir,
            log_of=services.log_of,
            tell=services.event,
            forget_snapshots=services.forget_snapshots,
            on_going_on=self._make_up_evaluations,
            deaths=self._deaths,
            calls=services.calls,
        )

    def _make_up_evaluations(self, step: int) -> None:
        evaluated = [suite for suite in self._config.suites if suite.name in self._inputs.eval_prompts]
        self._evaluations.make_up(evaluated, step, self._config.weights.publish_every)

    def _learner_is(self, *states: str) -> bool:
        return self._learner is not None and self._learner.state in (*states, "done")

    def _await(self, is_so: Callable[[], bool], stop: StopSignal, terminal: Terminal) -> bool:
        """Turns until `is_so`, which has a limit of its own; False when a signal ends the run before."""
        while not is_so():
            if stop.name:
                return False
            self.turn(terminal)
            self._tell_what_loads()
            time.sleep(START_TURN_S)
        return True

    def _tell_what_loads(self) -> None:
        """Tells what the run waits for until its first step is done: every `TELL_LOADING_S`, then less and
        less often.
        """
        elapsed_s, view = time.monotonic() - self._start_s, self._services.view.value
        if elapsed_s < self._next_tell_s or view is None or step_of(view):
            return
        self._next_tell_s = max(elapsed_s + TELL_LOADING_S, 1.5 * elapsed_s)
        waits = []
        if self._learner is not None and not self._learner_is("training"):
            waits.append(f"the learner is {self._learner.state}")
        if num_models := self._services.num_models_loading:
            waits.append(f"{counted(num_models, 'reward model')} loading")
        if num_loading := len(self._fleet.rollout_names("waiting for placement", "loading")):
            waits.append(f"{num_loading} of {self._fleet.target} actors are loading")
        self._services.event(
            f"starting for {elapsed_s:.0f} s: {', '.join(waits) or 'waiting for the first batch'}"
        )

    def _tell_of_driver(self) -> None:
        """Notes the death of the driver of the start before this one, where it did not end in order."""
        run_dir = self._inputs.run_dir
        try:
            status = read_status(run_dir)
        except ConfigError:  # It had not written one.
            return
        if status.state == "over" or (status.is_here and status.pid == os.getpid()):
            return
        words = last_lines(words_of(log_path(run_dir, "driver"), status.pid, status.host))
        self._deaths.note_driver(
            pid=status.pid, step=status.step, died_at=status.time, last_words=tuple(words)
        )

    @cached_property
    def _prompts(self) -> tuple[Any, Any]:
        """Returns references to the prompts and to those to evaluate with: a large data set takes seconds to
        make bytes of, once for all actors that are there or come later.
        """
        return ray.put(self._inputs.prompts), ray.put(self._inputs.eval_prompts)

    def _spawn_rollout(self, name: str, options: dict[str, Any]) -> Any:
        num_cpus = self._config.actors.num_cpus
        # One thread generates, another answers whether it still does; where weights are pushed, an order and
        # its abortion wait in two more.
        num_threads = 2 if self._config.weights.is_pulled else 4
        actor_class = remote(RolloutActor, self._services.log_of(name)).options(
            max_concurrency=num_threads, runtime_env=threads(num_cpus), **options
        )
        return actor_class.remote(
            name,
            self._config,
            *self._prompts,
            *self._services.peers,
            self._services.reward_models,
        )

    def _spawn_feeder(self, name: str, options: dict[str, Any]) -> Any:
        actor_class = remote(OfflineActor, self._services.log_of(name)).options(
            runtime_env=threads(1), **options
        )
        config, scores_all = self._config.without_knobs(), self._config.objective.compares_answers
        prompts, peers = self._prompts[0], (*self._services.peers, self._services.reward_models)
        return actor_class.remote(name, config, prompts, *peers, scores_all=scores_all)

    # --- turns ---

    def watch(self, stop: StopSignal, terminal: Terminal) -> list[dict[str, float]]:
        """Turns until training and the evaluations it began are over; the totals of each rank."""
        learner, stop_sent = self._learner, False
        while learner is not None and learner.state != "done":
            self.turn(terminal)
            self._tell_what_loads()
            if stop.name and not stop_sent:
                stop_sent = True
                if learner.state != "training":
                    break
                self._services.event(f"{stop.name}: ending after the step in progress")
                learner.request_stop()
            time.sleep(TURN_S)
        if learner is None or learner.state != "done":
            self._services.event(
                f"{stop.name}: ending while the learner loads; nothing was trained since "
                "the newest checkpoint"
            )
            return []
        self._await_evaluations(stop, terminal)
        return learner.totals

    def turn(self, terminal: Terminal | None = None) -> None:
        """Takes everything one step further, and waits for nobody; raises what ends the run."""
        self._refuse_if_ray_is_gone()
        self._poll()
        self._tick(time.monotonic())
        self._scaling.obey(self._state)
        self._write_status()  # An answer to another shell is told with what it changed, before that is over.
        self._judge()
        if terminal is not None:
            self._show(terminal)

    def _poll(self) -> None:
        """Takes the answers that have come."""
        if "board" in self._services.poll():
            self._evaluations.restore(self._best.held)
        if self._evaluations.poll() and self._learner is not None:
            self._learner.republish()  # Only now: what is done already would be evaluated once more.
        results = self._evaluations.results.values()
        self._best.consider(results)
        if self._learner is not None and self._target.consider(results):
            self._learner.end_at_target()
        self._best.poll()
        self._fleet.poll()
        if self._learner is not None:
            self._learner.poll()
        if self._services.view.value is not None:
            self._deaths.step = step_of(self._services.view.value)

    def _tick(self, now_s: float) -> None:
        """Does what is due by the clock: placing, pings, time limits, old logs."""
        self._fleet.tick(now_s)
        if self._learner is not None:
            self._learner.tick(now_s)
        if now_s > self._forget_logs_s:
            self._forget_logs_s = now_s + FORGET_LOGS_S
            forget_old_logs(self._inputs.run_dir, self._fleet.names())

    def _write_status(self) -> None:
        """Writes status.json when that is due, once there is something to write."""
        gauges = self._gauges()
        if gauges is not None and self._control.is_due():
            self._control.write(self._status(*gauges))

    def _judge(self) -> None:
        """Decides on what is known; raises what ends the run."""
        gauges = self._gauges()
        if gauges is None:
            return
        stats, view = gauges
        self._services.log_buffer(stats)
        if self._learner is not None:
            num_open = len(self._evaluations.open)
            self._health.judge(stats, view, num_open, self._fleet, self._learner)
        if self._state == "training":
            self._scaling.judge(stats, view, step_of(view))

    def _show(self, terminal: Terminal) -> None:
        gauges = self._gauges()
        if gauges is not None:
            view = gauges[1]
            alive = set(self._fleet.names())
            actors = {name: counters for name, counters in view["actors"].items() if name in alive}
            terminal.update({**view, "actors": actors})

    def _gauges(self) -> tuple[Mapping[str, float], Mapping[str, Any]] | None:
        """What buffer and monitor last said; None until they and the board have answered once."""
        stats, view = self._services.stats.value, self._services.view.value
        return None if stats is None or view is None or not self._evaluations.is_known else (stats, view)

    def _refuse_if_ray_is_gone(self) -> None:
        if self._ray.cause:
            self._ray.obeyed()
            raise TrainingError(self._ray.cause)

    def explained(self, error: AgroError | RayError) -> AgroError:
        """Returns the error that ends the run, in words of ours also where Ray failed in the middle of a
        turn.
        """
        return error if isinstance(error, AgroError) else self._ray.explained(error)

    def _held_by(self, name: str) -> str:
        """What an actor had when it died, by what it last reported."""
        counters = (self._services.view.value or {"actors": {}})["actors"].get(name)
        if counters is None:
            return ""
        leases, tokens = counters.get("leases") or 0, counters.get("tokens_under_way") or 0
        return (
            f"{leases:.0f} leases on prompts and {tokens:.0f} tokens of unfinished samples, as it reported "
            f"{counters.get('silent_s') or 0:.0f} s before"
        )

    def _await_evaluations(self, stop: StopSignal, terminal: Terminal) -> None:
        """Turns until no evaluation is open, as the board says from now on, and the best version is written,
        or none comes any further.
        """
        timeout_s, seen = self._config.run.timeout_s, None
        deadline_s = time.monotonic() + timeout_s
        last_word = self._services.calls.start(self._services.board.evaluations(0))
        is_told = False
        while not stop.name:
            if not is_told and last_word.is_done():
                self._evaluations.take(*last_word.result())
                self._best.consider(self._evaluations.results.values())
                is_told = True
            if is_told and not self._evaluations.open and not self._best.is_busy:
                return
            view = self._services.view.value
            generated = view and [actor.get("tokens_under_way") for actor in view["actors"].values()]
            if generated != seen:  # As long as tokens come, it is only slow.
                deadline_s, seen = time.monotonic() + timeout_s, generated
            if time.monotonic() > deadline_s:
                self._services.event(
                    f"the final evaluation stood still for {timeout_s:.0f} s (run.timeout_s); going on without it"
                )
                return
            self.turn(terminal)
            time.sleep(TURN_S)

    def _status(self, stats: Mapping[str, float], view: Mapping[str, Any]) -> RunStatus:
        known, shown = view["actors"], ("version", "tokens_per_s")
        actors = [
            {**entry, **{key: known.get(entry["name"], {}).get(key) for key in shown}}
            for entry in self._fleet.status()
        ]
        is_restarting = self._state == "training" and not self._learner_is("training")
        waits = {f"actors for {what}": waited_s for what, waited_s in view.get("waits", {}).items()}
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
        """Retires the actors, writes summary and report; the summary. What does not answer any more is left
        out.
        """
        services = self._services
        self._evaluations.take(*self._last_word(services.board.evaluations(0), ([], [])))
        stats = defaultdict(float, self._last_word(services.buffer.stats(), services.stats.value or {}))
        services.log_buffer(stats)
        failures = self._health.failures
        failures.take(*self._last_word(services.buffer.error_summary(), (0, 0, failures.texts)))
        if not self._ray.cause:
            self._retire_all()
        summary = self._summary(totals[0] if totals else {}, stats, stopped)
        self._state, self._stopped = "over", stopped
        if stopped is not None:
            self._deaths.note_end(stopped)
        view = self._last_word(services.monitor.view(), services.view.value)
        self._control.write(self._status(stats, view or {"row": {}, "actors": {}}))
        self._write_summary(summary)
        if not Path(summary["report"]).is_file():  # A full disk may have refused it.
            summary["report"] = None
        self._last_word(services.buffer.close(), None)  # What it acknowledged is on disk.
        return summary

    def _last_word(self, call: Call[T], otherwise: T) -> T:
        """The call's answer; `otherwise` from who is gone, or does not answer in time."""
        try:
            timeout_s = RAY_GONE_TIMEOUT_S if self._ray.cause else CLOSE_TIMEOUT_S
            return self._services.calls.ask(call, timeout_s)
        except AgroError:
            return otherwise

    def _summary(
        self, totals: Mapping[str, float], stats: Mapping[str, float], stopped: str | None
    ) -> dict[str, Any]:
        return run_summary(
            self._inputs,
            time.monotonic() - self._start_s,
            totals=totals,
            evaluations=self._evaluations.by_version(),
            stats=stats,
            deaths=self._deaths,
            stopped=stopped,
            best=self._best.kept,
            last_errors=last_texts(self._health.failures.texts),
        )

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the last rows, the summary and the report: by the monitor, and by this process where that
        is gone.
        """
        run_dir, path = self._inputs.run_dir, self._inputs.run_dir / "summary.json"
        with contextlib.suppress(OSError):  # Of a disk that went read-only; it is told below.
            path.unlink(missing_ok=True)
        self._last_word(self._services.monitor.close(summary), None)
        try:
            if self._ray.cause or not path.exists():
                gone = f"the monitor is gone; the run ended: {summary['stopped'] or 'finished'}"
                note_event(run_dir, self._ray.cause or gone)
            if not path.exists():
                replace_json(path, finite_tree(summary))
            write_report(run_dir)
        except OSError as error:
            self._services.event(
                f"{error.filename or run_dir} was not written: {error.strerror}; `launch.py "
                "report` makes the report"
            )

    def _abandon(self, cause: str) -> None:
        """Writes what there is of the run and ends this process: Ray is gone, and the main thread hangs in
        it. From another thread.
        """
        run_dir = self._inputs.run_dir
        with contextlib.suppress(OSError):
            note_event(run_dir, cause)
            self._deaths.note_end(cause)
            summary = self._summary({}, defaultdict(float, self._services.stats.value or {}), cause)
            replace_json(run_dir / "summary.json", finite_tree(summary))
            write_report(run_dir)
        os.write(sys.stderr.fileno(), f"error: {cause}\n".encode())
        os._exit(2)

    def close(self) -> None:
        """Kills whatever is left and frees its resources."""
        self._ray.stop()
        self._deaths.close()
        if self._ray.cause:  # A call to it would hang; the guardian ends what is left.
            return
        self._fleet.kill()
        if self._learner is not None:
            self._learner.kill()
        self._services.kill()

    def _retire_all(self) -> None:
        """Ends every actor: it hands back what it has not finished."""
        self._state = "ending"
        self._fleet.end()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self._fleet.names() and time.monotonic() < deadline_s:
            try:
                self._services.poll()
            except AgroError as error:  # The run is ending anyway, and is to have its summary.
                self._services.event(f"while the actors end: {error}")
            self._fleet.poll()
            self._fleet.tick(time.monotonic())
            time.sleep(RETIRE_TURN_S)
