"""The monitor: the one process that writes what a run reports.

    learner --log_step-------.
    actors  --log_actor------|            .--> metrics.jsonl       one row a learner step, every name of METRICS in it
    buffer  --log_buffer-----+-> Monitor -+--> evaluations.jsonl, samples.jsonl, events.jsonl, summary.json
    driver  --log_evaluation-|            +--> W&B                 a thread of its own: see wandb_writer
            --event----------'            '--> view()              a snapshot for the terminal

`Monitor` is plain Python; the driver makes a Ray actor of it. Calls do not raise because of what the values
are: what is no finite number is written as null and counted (`monitor/null_values`).
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cluster.monitor.actor_totals import actor_totals
from cluster.monitor.backends import Backends, Opened
from cluster.monitor.wandb_writer import DEFAULT_PROJECT, WandbMode, WandbWriter
from core.config import Config
from core.config.environments import all_paths
from core.config.evaluation import HELD_OUT
from core.evaluation.records import Evaluation
from core.json_lines import JsonLines, Redactor, StepLines, finite, finite_tree, last_json_lines, replace_json
from core.metrics import METRICS, shows_samples

RATE_WINDOW_S = 5.0  # actors report in bursts of whole groups: over less than 2 s their rates are noise
SILENT_S = 60.0  # an actor that has not reported for so long counts in no rate
WAITS = ("admission", "rewards", "weights", "environment", "evaluation", "disk")
"""What actors wait for: `wait_admission_s` and so on among their counters."""
NUM_GONE_KNOWN = 64
MAX_WARNINGS = 1000
"""Texts of warnings that are known at a time."""
WANDB_FINISH_S = 15.0
STATE_NAME = ".monitor.json"  # What a monitor that is started again goes on with; gone when the run is over.

_HISTORY_ROWS = 60
_VIEW_EVENTS = 40


class Monitor:
    """Merges what learner, actors, buffer and driver report into rows, and writes them.

    Row `progress/step == config.run.steps` is held back until `close`, so that the final evaluation, which
    comes after it, is in the last row. Where a target may end the run at any step (`eval.stop_at`), each row
    is held back until the next. Existing files of `run_dir` are appended to: a continued run goes on
    in them, and a step that it does again replaces what was written of it.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str,
        clock: Callable[[], float] = time.monotonic,
        began_at_s: float | None = None,
        shown: Mapping[str, Any] | None = None,
        wandb: WandbMode = "disabled",
        project: str = DEFAULT_PROJECT,
    ) -> None:
        """`run_dir` is made if missing. `clock` gives seconds. `wandb` and `project` are what the driver's
        environment says (`wandb_mode`, `project_of`): the one here may say something else.

        `began_at_s` (since 1970) is when this start of the run began: a monitor that is started again within
        it takes up its times, and the row that it held back. `shown` is what W&B shows as the run's config,
        None for all of `config`.
        """
        self._config, self._run_dir, self._clock = config, Path(run_dir), clock
        self._start_s = clock() - (0.0 if began_at_s is None else max(0.0, time.time() - began_at_s))
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._redact = Redactor(os.environ)
        self._metrics = StepLines(self._run_dir / "metrics.jsonl", self._redact, "progress/step")
        self._samples = StepLines(self._run_dir / "samples.jsonl", self._redact, "step")
        self._files: dict[str, JsonLines] = {"metrics": self._metrics, "samples": self._samples}
        num_suites = len(config.suites)
        self._files["events"] = JsonLines(self._run_dir / "events.jsonl", self._redact)
        self._evaluation: dict[str, Any] = {"eval/solve_rate": None, "eval/policy_version": None}
        # By suite: version and solve rate of its evaluations.
        self._evaluations: dict[str, collections.deque[tuple[int, float]]] = {}
        for line in last_json_lines(self._run_dir / "evaluations.jsonl", _HISTORY_ROWS * max(1, num_suites)):
            self._note_evaluation(line)
        self._files["evaluations"] = JsonLines(self._run_dir / "evaluations.jsonl", self._redact)
        self._actors: dict[str, _ActorGauge] = {}
        self._totals = actor_totals(bool(all_paths(config)))
        # Names of those that went last: a report of one may come after it.
        self._gone: collections.deque[str] = collections.deque(maxlen=NUM_GONE_KNOWN)
        self._waits = [wait for wait in WAITS if wait != "environment" or all_paths(config)]
        self._waited_s = dict.fromkeys(WAITS, 0.0)  # Of those that are gone.
        self._buffer: dict[str, Any] = {}
        self._row: dict[str, Any] = dict.fromkeys(METRICS)
        # wall_s, step, reward
        self._rows_seen = collections.deque[tuple[float, float, Any]](maxlen=_HISTORY_ROWS)
        self._held: dict[str, Any] | None = None
        self._null_values = 0
        self._warnings: dict[str, int] = {}  # By text, of all processes.
        self._num_warnings = 0
        self._began_at_s = began_at_s
        self._take_up()
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_VIEW_EVENTS)
        self._event_number = 0
        self._closed = False
        public_config = json.loads(self._redact(json.dumps(shown or config.model_dump(mode="json"))))
        name = config.run.name
        self._wandb = WandbWriter(name, project, public_config, self._run_dir, wandb, shows_samples)
        opened = Opened(name, self._run_dir, public_config, project)
        self._backends = Backends(config.monitor.backends, opened)

    def log_step(self, row: Mapping[str, float | None]) -> None:
        """Takes a row of the learner; the newest gauges, rates and evaluation join it. The last step's row
        waits for `close`.
        """
        now_s = self._clock()
        live = [actor for actor in self._actors.values() if now_s - actor.seen_s <= SILENT_S]
        rates = [rate for actor in live if (rate := actor.rates()) is not None]
        apply_s = [actor.counters["apply_s"] for actor in live if actor.counters.get("apply_s") is not None]
        derived = {
            "time/wall_s": now_s - self._start_s,
            "weights/apply_s": max(apply_s, default=None),
        }
        if rates:
            derived["perf/sampled_tokens_per_s"] = sum(tokens_per_s for tokens_per_s, _ in rates)
            derived["time/actor_busy_fraction"] = sum(busy for _, busy in rates) / len(rates)
        for totals in self._totals:
            derived |= totals.row()
        own = {name: value for name, value in derived.items() if value is not None}
        reported = {**dict.fromkeys(METRICS), **self._buffer, **row, **own}
        merged = {name: self._number(value) for name, value in reported.items()}
        self._row = {**merged, **self._evaluation, **self._own_counts()}
        self._rows_seen.append((now_s - self._start_s, merged["progress/step"] or 0, merged["reward/mean"]))
        self._release_held()
        if self._config.eval.stop_at is not None or merged["progress/step"] == self._config.run.steps:
            self._held = self._row
            self._note_held()
        else:
            self._write_row(self._row)
        self._report_failures()

    def log_actor(self, name: str, counters: Mapping[str, Any]) -> None:
        """Takes the cumulative counters of one rollout actor (`generated_tokens`, `busy_s`, ...) and gauges
        (`version`, `apply_s`, ...).
        """
        clean = {
            key: value if isinstance(value, str) else self._number(value) for key, value in counters.items()
        }
        if name not in self._gone:
            self._actors.setdefault(name, _ActorGauge()).report(self._clock(), clean)
            for totals in self._totals:
                totals.take(name, clean)

    def forget_actor(self, name: str) -> None:
        """Forgets an actor that is gone for good: only what it waited stays, in the sums of `view`."""
        self._gone.append(name)
        for totals in self._totals:
            totals.forget(name)
        actor = self._actors.pop(name, None)
        if actor is not None:
            for wait in WAITS:
                self._waited_s[wait] += actor.counters.get(f"wait_{wait}_s") or 0.0

    def generation(self) -> dict[str, tuple[tuple[float, float], float]]:
        """Returns, by actor, the tokens of its finished and of its unfinished samples, and the seconds since
        it was last heard of.
        """
        now_s, names = self._clock(), ("generated_tokens", "tokens_under_way")
        return {
            name: (
                (actor.counters.get(names[0]) or 0.0, actor.counters.get(names[1]) or 0.0),
                now_s - actor.seen_s,
            )
            for name, actor in self._actors.items()
        }

    def log_buffer(self, gauges: Mapping[str, float]) -> None:
        """Takes gauges of the buffer by full metric name; they are in the next rows as they are."""
        self._buffer.update({name: self._number(value) for name, value in gauges.items()})

    def log_evaluation(self, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        """Takes a finished evaluation; the next rows carry the newest one. `samples`: the keys of
        `log_samples`.
        """
        line = {
            **msgspec.structs.asdict(evaluation),
            "wall_s": self._clock() - self._start_s,
            "samples": samples,
        }
        self._files["evaluations"].append(line)
        self._note_evaluation(finite_tree(line))
        self._wandb.log_evaluation(evaluation.suite, self._public(samples))

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Takes samples of one batch: dicts of step, version, staleness, prompt, completion, reward, error,
        advantage, answer (optional).
        """
        self._samples.rewind(step)
        for sample in samples:
            self._samples.append({"step": step, **sample})
        self._wandb.log_samples(step, self._public([{"step": step, **sample} for sample in samples]))

    def _public(self, samples: list[dict[str, Any]]) -> Any:
        """Returns what W&B gets, which is what the file gets: redacted, finite."""
        return json.loads(self._redact(json.dumps(finite_tree(samples))))

    def event(self, text: str) -> None:
        """Notes something worth telling: an actor replaced, a warning, a publication that failed."""
        record = {"time": time.time(), "wall_s": self._clock() - self._start_s, "text": self._redact(text)}
        self._files["events"].append(record)
        # Rises also over a restart of this process.
        self._event_number = max(self._event_number + 1, time.time_ns() // 1000)
        self._events.append({**record, "number": self._event_number})

    def warn(self, name: str, counts: Mapping[str, int]) -> None:
        """Counts how often the process `name` has logged which warnings since it last told.

        A text is an event when it first comes, whichever process it is of, and whenever its count gains a
        digit.
        """
        for text, count in counts.items():
            if text not in self._warnings and len(self._warnings) >= MAX_WARNINGS:
                self._warnings.pop(next(iter(self._warnings)))
            before = self._warnings.get(text, 0)
            now = self._warnings[text] = before + count
            self._num_warnings += count
            if not before:
                self.event(f"{name}: {text}")
            elif len(str(now)) > len(str(before)):
                self.event(f"{name}: {text} ({now:,} times by now, all processes together)")

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes the held row with the newest evaluation, writes summary.json, finishes W&B within
        `WANDB_FINISH_S`.

        A second call does nothing.
        """
        if self._closed:
            return
        self._closed = True
        if self._held is not None:
            self._held = self._row = {**self._held, **self._evaluation, **self._own_counts()}
        self._release_held()
        public = json.loads(self._redact(json.dumps(finite_tree(summary))))
        self._write_summary(public)
        flat = {key: value for key, value in public.items() if isinstance(value, int | float | str)}
        if not self._wandb.finish(flat, WANDB_FINISH_S):
            self.event(
                f"W&B did not finish within {WANDB_FINISH_S:g} s: {self._wandb.dropped} calls lost; "
                "metrics.jsonl has everything"
            )
        if not self._backends.close(WANDB_FINISH_S):
            self.event("a back-end of the monitor did not finish; metrics.jsonl has everything")
        self._report_failures()
        for file in self._files.values():
            file.close()
        with contextlib.suppress(OSError):
            (self._run_dir / STATE_NAME).unlink()

    def view(self) -> dict[str, Any]:
        """Returns a snapshot for `terminal.Terminal`: plain dicts and lists, some kilobytes."""
        self._report_failures()
        now_s = self._clock()
        return {
            "name": self._config.run.name,
            "steps": self._config.run.steps,
            "max_staleness": self._config.buffer.max_staleness,
            "capacity": self._config.admitted_groups,
            "run_dir": str(self._run_dir),
            "wandb": self._wandb.mode,
            "wall_s": now_s - self._start_s,
            "eta_s": self._eta_s(),
            "row": dict(self._row),
            "rewards": [reward for _, _, reward in self._rows_seen if reward is not None],
            "evaluations": {suite: list(known) for suite, known in self._evaluations.items()},
            "actors": {
                name: {**actor.counters, **actor.summary(now_s)} for name, actor in self._actors.items()
            },
            "waits": {wait: self._waits_s(wait) for wait in self._waits},
            "buffer": dict(self._buffer),
            "events": list(self._events),
        }

    def _waits_s(self, wait: str) -> float:
        """Seconds that all actors so far have waited for it."""
        counted = [actor.counters.get(f"wait_{wait}_s") or 0.0 for actor in self._actors.values()]
        return self._waited_s[wait] + sum(counted)

    def _number(self, value: Any) -> float | int | None:
        number = finite(value) if value is not None else None
        self._null_values += value is not None and number is None
        return number

    def _own_counts(self) -> dict[str, int]:
        return {
            "monitor/null_values": self._null_values,
            "monitor/write_errors": sum(file.write_errors for file in self._files.values()),
            "monitor/lines_lost": sum(file.lines_lost for file in self._files.values()),
            "monitor/warnings": self._num_warnings,
            "monitor/wandb_dropped": self._wandb.dropped,
        }

    def _note_evaluation(self, line: Mapping[str, Any]) -> None:
        """Takes the newest evaluation of a suite: `eval/SUITE/...`, and of `held_out` `eval/solve_rate`."""
        suite, version, solve_rate = (line.get(key) for key in ("suite", "policy_version", "solve_rate"))
        if suite is None or version is None:
            return
        metrics = {"policy_version": version, **(line.get("metrics") or {})}
        known = {name: None for name in self._evaluation if name.startswith(f"eval/{suite}/")}
        self._evaluation |= {**known, **{f"eval/{suite}/{name}": value for name, value in metrics.items()}}
        if suite == HELD_OUT:
            self._evaluation |= {"eval/solve_rate": solve_rate, "eval/policy_version": version}
        if solve_rate is not None:
            history = self._evaluations.setdefault(suite, collections.deque(maxlen=_HISTORY_ROWS))
            history.append((version, solve_rate))

    def _release_held(self) -> None:
        if self._held is not None:
            self._write_row(self._held)
            self._held = None
            self._note_held()

    def _take_up(self) -> None:
        """Takes up what a monitor that was killed had: the row it held back, and the newest row where it was
        of this start of the run.

        A run that was killed in its last evaluation goes on behind its last step: that row comes from here
        or never. One that does steps before it again takes it back (`_write_row`).
        """
        if self._began_at_s is None:
            return
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads((self._run_dir / STATE_NAME).read_text(encoding="utf-8"))
            self._held = kept["held"]
            if kept["began_at_s"] == self._began_at_s:
                newest = [self._held] if self._held else last_json_lines(self._run_dir / "metrics.jsonl", 1)
                self._row = {**self._row, **(newest[0] if newest else {})}
                return
        self._note_held()

    def _note_held(self) -> None:
        """Keeps the held row for `_take_up`. A disk that does not take it costs nothing but that."""
        if self._began_at_s is not None:
            with contextlib.suppress(OSError):
                replace_json(self._run_dir / STATE_NAME, {"began_at_s": self._began_at_s, "held": self._held})

    def _write_row(self, row: Mapping[str, Any]) -> None:
        if row["progress/step"] is not None:
            self._metrics.rewind(int(row["progress/step"]))
        self._metrics.append(row)
        self._wandb.log(row)
        self._backends.log(row)

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        try:
            replace_json(self._run_dir / "summary.json", summary)
        except OSError as error:
            self.event(f"summary.json was not written: {error}")

    def _report_failures(self) -> None:
        # Told here, not by their threads: only one thread writes the files.
        for failure in (*self._wandb.failures(), *self._backends.failures()):
            self.event(failure)

    def _eta_s(self) -> float | None:
        if len(self._rows_seen) < 2:
            return None
        (first_s, first_step, _), (last_s, last_step, _) = self._rows_seen[0], self._rows_seen[-1]
        if last_step <= first_step:
            return None
        return (self._config.run.steps - last_step) * (last_s - first_s) / (last_step - first_step)


class _ActorGauge:
    """Rates of one actor from its cumulative counters, over at least `RATE_WINDOW_S` once it has
    reported for so long.
    """

    def __init__(self) -> None:
        self.counters: dict[str, Any] = {}
        self.seen_s = 0.0
        # time, tokens, busy_s
        self._reports: collections.deque[tuple[float, float, float]] = collections.deque()

    def report(self, now_s: float, counters: dict[str, Any]) -> None:
        """Takes the newest counters; a counter that fell means that the actor was started again, and the
        window with it.
        """
        self.counters, self.seen_s = counters, now_s
        tokens, busy_s = counters.get("generated_tokens") or 0.0, counters.get("busy_s") or 0.0
        if self._reports and (tokens < self._reports[-1][1] or busy_s < self._reports[-1][2]):
            self._reports.clear()
        self._reports.append((now_s, tokens, busy_s))
        while len(self._reports) > 2 and now_s - self._reports[1][0] >= RATE_WINDOW_S:
            self._reports.popleft()

    def rates(self) -> tuple[float, float] | None:
        """Tokens per second and busy share in the window, None before 2 s of it."""
        (first_s, first_tokens, first_busy_s), (last_s, last_tokens, last_busy_s) = (
            self._reports[0],
            self._reports[-1],
        )
        elapsed_s = last_s - first_s
        if elapsed_s < 2.0:
            return None
        return (last_tokens - first_tokens) / elapsed_s, min(1.0, (last_busy_s - first_busy_s) / elapsed_s)

    def summary(self, now_s: float) -> dict[str, float | None]:
        """Returns what the terminal shows next to the counters."""
        tokens_per_s, busy_fraction = self.rates() or (None, None)
        return {"tokens_per_s": tokens_per_s, "busy_fraction": busy_fraction, "silent_s": now_s - self.seen_s}
