"""Weights & Biases behind a queue: whatever it does, the run does not notice.

    Monitor --log, log_samples--> bounded queue --> one daemon thread --> wandb

Online or offline is decided before `wandb.init`, by `wandb_mode`. If `init` raises online (no network, a bad
key) the thread goes on offline, so that `wandb sync` can upload the run later. Calls that fail or find the
queue full are counted.

An offline run cannot be resumed by W&B: it begins another directory, and `wandb sync` of several puts one
over the other. So a continued run is told again from metrics.jsonl and samples.jsonl, from its first step on,
and the directories of earlier starts, which hold nothing else, are removed. W&B gets a step once: what a
learner does again since a checkpoint it has already.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import shutil
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.monitor import wandb_file
from cluster.monitor.wandb_tables import EarlierEvaluations, EvaluationTables, table_of
from cluster.monitor.wandb_view import make_view
from core.config import Config
from core.errors import ConfigError
from core.json_lines import read_json_lines

WandbMode = Literal["online", "offline", "disabled"]

_INIT_TIMEOUT_S = 60.0
PROJECT_FILE = "wandb_project"
DEFAULT_PROJECT = "agro"
MAX_PROJECT_CHARS = 128
BAD_IN_PROJECT = "/\\#?%:"
_MODES: dict[str, WandbMode | None] = {
    "": None,
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What W&B does by the words of WANDB_MODE; None: what the API key says."""
_DEFAULT_HOST = "https://api.wandb.ai"
# How long a row may be in W&B's memory only: that much of it is lost when the driver is killed.
_FLUSH_S = 1.0


def wandb_mode() -> WandbMode:
    """What W&B will do in this run, by WANDB_MODE: the driver asks before anything is started.

    Unset it is online if there is an API key (WANDB_API_KEY, or netrc for the host of WANDB_BASE_URL), else
    offline. Raises ConfigError for another word than W&B's online, offline (in its older words run, dryrun)
    and disabled, and if `online` is demanded without a key.
    """
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted not in _MODES:
        raise ConfigError(
            f"WANDB_MODE = {wanted[:40]!r}: expected online, offline or disabled; unset (unset WANDB_MODE), W&B is online if "
            "there is an API key, else offline."
        )
    mode = _MODES[wanted]
    if mode == "online" and not _has_api_key():
        raise ConfigError(
            "WANDB_MODE = online, but there is no W&B API key: set WANDB_API_KEY, run `wandb login`, or unset "
            "WANDB_MODE (offline without a key)."
        )
    if mode is not None:
        return mode
    return "online" if _has_api_key() else "offline"


def mode_of(config: Config) -> WandbMode:
    """Returns what W&B will do in a run of the config: nothing where it is none of its back-ends."""
    return wandb_mode() if "wandb" in config.monitor.backends else "disabled"


def wandb_project() -> str:
    """Returns the W&B project of WANDB_PROJECT, as wandb itself has it; `agro` where it is not set.

    Raises ConfigError for a name that W&B would refuse, in its service and long after the start.
    """
    project = os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
    if len(project) > MAX_PROJECT_CHARS or set(project) & set(BAD_IN_PROJECT):
        raise ConfigError(
            f"WANDB_PROJECT = {project[:80]!r}: a W&B project has at most {MAX_PROJECT_CHARS} characters, and none of "
            f"{' '.join(BAD_IN_PROJECT)}. Choose another name."
        )
    return project


def project_of(run_dir: Path) -> str:
    """Returns the W&B project of a run: that in which it began, else the one of the environment.

    A run id is of one project: a continued run that named another would be a second run. Raises ConfigError
    as `wandb_project` does.
    """
    path = run_dir / PROJECT_FILE
    stored = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return stored or wandb_project()


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or _DEFAULT_HOST).hostname or ""
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(candidate)).hosts.get(host):
                return True
    return False


class WandbWriter:
    """Hands rows and samples to W&B from a thread of its own; never raises, never blocks longer than told.

    `dropped` counts the calls that were lost; `failures()` returns, once each, sentences on what went wrong.
    `config` is what W&B shows as the run's config: it must hold no secret.
    """

    def __init__(
        self,
        name: str,
        project: str,
        config: Mapping[str, Any],
        run_dir: Path,
        mode: WandbMode,
        shows_samples: Callable[[int], bool] = lambda step: False,
        queue_size: int = 1000,
    ) -> None:
        """`shows_samples(step)`: whether samples of a learner step will come too."""
        self.mode = mode
        self.dropped = 0
        self._name, self._project, self._config, self._run_dir = name, project, dict(config), run_dir
        self._shows_samples = shows_samples
        self._jobs: queue.Queue[Callable[[Any], object] | None] = queue.Queue(queue_size)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        # Touched by the thread alone: what W&B has, and the row that waits for its other part.
        self._newest_row = self._newest_table = 0.0
        self._open: dict[str, Any] = {}
        self._evaluated = EvaluationTables()
        lines = read_json_lines(run_dir / "evaluations.jsonl")[0] if mode != "disabled" else []
        self._earlier = EarlierEvaluations(lines)
        self._superseded: list[Path] | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if mode != "disabled":
            self._thread.start()

    def log(self, row: Mapping[str, float | None]) -> None:
        """Logs the known values of a row. The x axis is the row's `progress/step`, not W&B's step, which
        asynchronous code breaks.
        """
        self._put(lambda run: self._log_row(run, row))

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Logs the last of the samples as a new table: a W&B table cannot be appended to."""
        self._put(lambda run: self._log_table(run, step, samples))

    def log_evaluation(self, suite: str, samples: list[dict[str, Any]]) -> None:
        """Logs samples of an evaluation as a table of its suite, with the next row."""
        self._put(lambda run: self._evaluated.put(suite, samples))

    def failures(self) -> list[str]:
        """Returns what went wrong since the last call, one sentence each."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def finish(self, summary: Mapping[str, Any], timeout_s: float) -> bool:
        """Finishes the run; False if W&B was not done within `timeout_s` (what waited is counted as
        dropped).
        """
        if self.mode == "disabled":
            return True
        deadline = time.monotonic() + timeout_s
        self._put(lambda run: self._log_summary(run, summary))
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.dropped += self._jobs.qsize()
        return not self._thread.is_alive()

    def _put(self, job: Callable[[Any], object]) -> None:
        if self.mode == "disabled":
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # It is told when W&B starts.
            self._run_id()
        # W&B takes the CPU of a second to start, which is better spent on what the first step waits for.
        job = self._jobs.get()
        run = self._start()
        self._make_view(run)
        failed_before = False
        while job is not None:
            try:
                if run is not None:
                    job(run)
            except Exception as error:  # noqa: BLE001 - W&B is another process and a network: nothing it raises may reach the run
                self.dropped += 1
                if not failed_before:
                    self._failures.put(f"W&B log failed ({_brief(error)}); further failures are only counted")
                failed_before = True
            else:
                self.dropped += run is None
            job = self._jobs.get()
        try:
            if run is not None:
                import wandb

                run.finish()
                # `finish` only asks W&B's own process to close the run file, and that process dies with this
                # one: wait for it.
                wandb.teardown()
        except Exception as error:  # noqa: BLE001 - as above
            self._failures.put(f"W&B finish failed ({_brief(error)})")

    def _make_view(self, run: Any) -> None:
        """Makes the project's view, where this is the first run of an online project."""
        if run is None or self.mode != "online" or getattr(run, "offline", True):
            return
        try:
            make_view(run)
        except Exception as error:  # noqa: BLE001 - as in _work: a view is worth no run
            self._failures.put(f"W&B's view of the project was not made ({_brief(error)})")

    def _log_row(self, run: Any, row: Mapping[str, float | None]) -> None:
        step = row.get("progress/step") or 0.0
        self._catch_up(run, step)
        if step > self._newest_row:
            self._newest_row = step
            waits = self._shows_samples(int(step)) and self._newest_table < step
            known = {name: value for name, value in row.items() if value is not None}
            self._log_part(run, step, {**known, **self._evaluated.take()}, waits)

    def _log_table(self, run: Any, step: float, samples: list[dict[str, Any]]) -> None:
        self._catch_up(run, step)
        if step > self._newest_table:
            self._newest_table = step
            part = {"progress/step": step, "samples": table_of(samples)}
            self._log_part(run, step, part, self._newest_row < step)

    def _log_part(self, run: Any, step: float, part: Mapping[str, Any], waits: bool) -> None:
        """Makes one row a step: the figures of a step and its samples wait for each other."""
        if step != self._open.get("progress/step"):
            self._log_open(run)
        self._open.update(part)
        if not waits:
            self._log_open(run)

    def _log_open(self, run: Any) -> None:
        row, self._open = self._open, {}
        if row:
            run.log(row)

    def _log_summary(self, run: Any, summary: Mapping[str, Any]) -> None:
        self._catch_up(run, float("inf"))
        if tables := self._evaluated.take():  # No row came any more.
            self._log_part(run, self._newest_row, {"progress/step": self._newest_row, **tables}, False)
        self._log_open(run)
        run.summary.update(dict(summary))

    def _catch_up(self, run: Any, before_step: float) -> None:
        """Logs once, before anything else, what earlier starts of the run did, up to `before_step`."""
        if self._superseded is None:
            return
        superseded, self._superseded = self._superseded, None
        rows, tables = self._earlier_rows(superseded), self._earlier_samples()
        evaluations, newest, self._evaluated = self._earlier, self._evaluated, EvaluationTables()
        for step in sorted(step for step in rows.keys() | tables.keys() if 0 < step < before_step):
            if step in rows:
                for suite, samples in evaluations.of(rows[step]):
                    self._evaluated.put(suite, samples)
                self._log_row(run, rows[step])
            if step in tables:
                self._log_table(run, step, tables[step])
        for suite, samples in evaluations.rest():
            self._evaluated.put(suite, samples)
        self._evaluated.update(newest)
        if superseded:
            time.sleep(2 * _FLUSH_S)  # Until they are on disk a second time.
        for directory in superseded:
            shutil.rmtree(directory, ignore_errors=True)

    def _earlier_rows(self, directories: list[Path]) -> dict[float, dict[str, Any]]:
        """Returns by step the rows of metrics.jsonl, and those that only W&B's own files have."""
        rows: dict[float, dict[str, Any]] = {}
        for file in (file for directory in directories for file in directory.glob("run-*.wandb")):
            with contextlib.suppress(OSError):
                for row in wandb_file.history(file):
                    if "samples" not in row:
                        rows[row.get("progress/step") or 0.0] = {
                            name: row[name] for name in row if not name.startswith("_")
                        }
        for row in read_json_lines(self._run_dir / "metrics.jsonl")[0]:
            rows[row.get("progress/step") or 0.0] = row
        return rows

    def _earlier_samples(self) -> dict[float, list[dict[str, Any]]]:
        tables: dict[float, list[dict[str, Any]]] = {}
        for sample in read_json_lines(self._run_dir / "samples.jsonl")[0]:
            tables.setdefault(sample.get("step") or 0.0, []).append(sample)
        return tables

    def _start(self) -> Any | None:
        """The W&B run, offline if online fails; None if neither starts."""
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                return self._init(mode)
            except Exception as error:  # noqa: BLE001 - as in _work
                then = "going on offline" if mode == "online" else "W&B is off; metrics.jsonl has everything"
                self._failures.put(f"W&B init failed, {mode} ({_brief(error)}); {then}")
        return None

    def _init(self, mode: str) -> Any:
        # Tables are staged under WANDB_DATA_DIR; in the run directory an offline run stays complete when it
        # is moved.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._run_dir / "wandb" / "data"))
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_TIMEOUT_S,
            # Nothing of the machine: no argv, git, code, host, packages, hardware.
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=_FLUSH_S,
        )
        run_id = self._run_id()
        self._superseded = sorted(self._run_dir.glob(f"wandb/offline-run-*-{run_id}"))
        run = wandb.init(
            project=self._project,
            name=self._name,
            id=run_id,
            resume="allow" if mode == "online" else None,  # Offline, what is synced stands for the whole run.
            mode=mode,  # type: ignore[arg-type]
            dir=str(self._run_dir),
            config=self._config,
            settings=settings,
        )
        if mode == "online" and run.resumed:
            self._newest_row = self._newest_table = run.summary.get("progress/step") or 0.0
        run.define_metric("progress/step")
        run.define_metric("*", step_metric="progress/step")
        return run

    def _run_id(self) -> str:
        """The W&B run id of this run directory: a continued run goes on in the same W&B run."""
        path = self._run_dir / "wandb_id"
        if path.is_file() and (stored := path.read_text(encoding="utf-8").strip()):
            return stored
        run_id = secrets.token_hex(4)
        path.write_text(run_id + "\n", encoding="utf-8")
        (self._run_dir / PROJECT_FILE).write_text(self._project + "\n", encoding="utf-8")
        return run_id


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
