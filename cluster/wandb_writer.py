"""Weights & Biases behind a queue: whatever it does, the run does not notice.

    Monitor --log, log_samples--> bounded queue --> one daemon thread --> wandb

Online or offline is decided before `wandb.init`, by `wandb_mode`. If `init` raises online (no network, a bad key) the thread
goes on offline, so that `wandb sync` can upload the run later. Calls that fail or find the queue full are counted.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.config import Config
from cluster.errors import ConfigError

WandbMode = Literal["online", "offline", "off"]

TABLE_ROWS = 16
SAMPLE_COLUMNS = ("step", "version", "staleness", "prompt", "completion", "reward", "error", "advantage", "answer")
_INIT_TIMEOUT_S = 60.0
_DEFAULT_HOST = "https://api.wandb.ai"


def wandb_mode(config: Config) -> WandbMode:
    """What W&B will do in this run: call it before anything is started.

    `auto` is online if there is an API key (WANDB_API_KEY, or netrc for the host of WANDB_BASE_URL), else offline; a
    WANDB_MODE of `offline` or `disabled` in the environment is obeyed. Raises ConfigError if `online` is demanded without a key.
    """
    wanted = config.monitor.wandb
    if wanted in ("offline", "off"):
        return wanted
    if wanted == "auto" and os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return "off" if os.environ["WANDB_MODE"] == "disabled" else "offline"
    if _has_api_key():
        return "online"
    if wanted == "online":
        raise ConfigError(
            "monitor.wandb = online, but there is no W&B API key: set WANDB_API_KEY, run `wandb login`, "
            "or take monitor.wandb=auto (offline without a key)."
        )
    return "offline"


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

    def __init__(self, name: str, project: str, config: Mapping[str, Any], run_dir: Path, mode: WandbMode, queue_size: int = 1000) -> None:
        self.mode = mode
        self.dropped = 0
        self._name, self._project, self._config, self._run_dir = name, project, dict(config), run_dir
        self._jobs: queue.Queue[Callable[[Any], object] | None] = queue.Queue(queue_size)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if mode != "off":
            self._thread.start()

    def log(self, row: Mapping[str, float | None]) -> None:
        """Log the known values of a row. The x axis is the row's `progress/step`, not W&B's step, which asynchronous code breaks."""
        known = {name: value for name, value in row.items() if value is not None}
        self._put(lambda run: run.log(known))

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Log the last `TABLE_ROWS` samples as a new table: a W&B table cannot be appended to."""
        data = [[sample.get(column) for column in SAMPLE_COLUMNS] for sample in samples[-TABLE_ROWS:]]

        def log_table(run: Any) -> None:
            import wandb

            run.log({"progress/step": step, "samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=data, allow_mixed_types=True)})

        self._put(log_table)

    def failures(self) -> list[str]:
        """What went wrong since the last call, one sentence each."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def finish(self, summary: Mapping[str, Any], timeout_s: float) -> bool:
        """Finish the run; False if W&B was not done within `timeout_s` (what waited is counted as dropped)."""
        if self.mode == "off":
            return True
        deadline = time.monotonic() + timeout_s
        self._put(lambda run: run.summary.update(dict(summary)))
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.dropped += self._jobs.qsize()
        return not self._thread.is_alive()

    def _put(self, job: Callable[[Any], object]) -> None:
        if self.mode == "off":
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        run = self._start()
        failed_before = False
        while (job := self._jobs.get()) is not None:
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
        try:
            if run is not None:
                import wandb

                run.finish()
                # `finish` only asks W&B's own process to close the run file, and that process dies with this one: wait for it.
                wandb.teardown()
        except Exception as error:  # noqa: BLE001 - as above
            self._failures.put(f"W&B finish failed ({_brief(error)})")

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
        # Tables are staged under WANDB_DATA_DIR; in the run directory an offline run stays complete when it is moved.
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
        )
        run = wandb.init(
            project=self._project,
            name=self._name,
            id=self._run_id(),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(self._run_dir),
            config=self._config,
            settings=settings,
        )
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
        return run_id


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
