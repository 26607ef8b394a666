"""Hands a run's rows to what shows them besides its own files and W&B: TensorBoard, trackio, Prometheus.

    Monitor --log(row)--> a bounded queue and a daemon thread each --> EventFile, TrackioBackend, PrometheusBackend

A back-end that fails is told once and left alone, one that hangs loses rows of its own, which is told once
too: metrics.jsonl has everything. A further one is a class with `log` and `close`, its line in `_OPENERS`,
and its name in core/config/monitor.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.monitor.event_file import EventFile
from core.config import Config
from core.errors import ConfigError
from core.json_lines import replace_json
from core.metrics import METRICS

Row = Mapping[str, float | None]
QUEUE_ROWS = 1000
GAUGE_PREFIX = "agro_"
TOLD_TRACKIO = "trackio_step"
"""In the run directory: the newest step that trackio has."""


class Opened(NamedTuple):
    """What a back-end is opened for: the run's name, its directory, and the config without secrets."""

    name: str
    run_dir: Path
    config: Mapping[str, Any]
    project: str


class Backend(Protocol):
    """One place that rows go to. Whatever it raises ends it alone."""

    def log(self, row: Row) -> None:
        """Takes a row of metrics; unknown values are None."""

    def close(self) -> None:
        """Writes what is left."""


def gauge_name(metric: str) -> str:
    """Returns a metric's name as Prometheus has it; Ray puts `ray_` before it."""
    return GAUGE_PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


class PrometheusBackend:
    """Gauges of the newest row, exported by the node's own Ray agent, with the label `run`."""

    def __init__(self, opened: Opened) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": opened.name}
        self._gauges = {
            name: Gauge(gauge_name(name), description=text, tag_keys=("run",))
            for name, text in METRICS.items()
        }

    def log(self, row: Row) -> None:
        """Sets the gauges of the values that are known."""
        for name, gauge in self._gauges.items():
            if (value := row.get(name)) is not None:
                gauge.set(value, self._tags)

    def close(self) -> None:
        """Leaves the gauges as they are: Ray drops them with this process."""


class TrackioBackend:
    """A run of trackio, which keeps it in files of its own; a run that goes on is resumed there.

    trackio takes nothing back, and a step that it has twice is two points of one curve. So it gets each step
    once: what a learner does again since its checkpoint it has already.
    """

    def __init__(self, opened: Opened) -> None:
        trackio = importlib.import_module("trackio")
        run = f"{opened.name}-{opened.run_dir.name}"
        self._trackio, self._told = trackio, opened.run_dir / TOLD_TRACKIO
        self._newest_step = -1
        with contextlib.suppress(OSError, ValueError):  # There is none, or a disk lost what was in it.
            self._newest_step = int(self._told.read_text())
        trackio.init(project=opened.project, name=run, config=dict(opened.config), resume="allow")

    def log(self, row: Row) -> None:
        """Logs the known values at the row's step, unless it had that step."""
        step = int(row.get("progress/step") or 0)
        if step <= self._newest_step:
            return
        known = {name: value for name, value in row.items() if value is not None}
        self._trackio.log(known, step=step)
        self._newest_step = step
        replace_json(self._told, step)

    def close(self) -> None:
        """Ends the run."""
        self._trackio.finish()


_OPENERS: dict[str, Callable[[Opened], Backend]] = {
    "tensorboard": lambda opened: EventFile(opened.run_dir / "tensorboard"),
    "trackio": TrackioBackend,
    "prometheus": PrometheusBackend,
}


def check_backends(config: Config) -> None:
    """Raises ConfigError where a back-end needs a package that is not here."""
    if "trackio" in config.monitor.backends and importlib.util.find_spec("trackio") is None:
        raise ConfigError(
            f"monitor.backends = {list(config.monitor.backends)}: trackio is not installed here. Install it (uv pip install "
            "trackio), or leave it out."
        )


class Backends:
    """The back-ends of a run, a thread each; never raises. `failures()` tells once what went wrong."""

    def __init__(self, names: tuple[str, ...], opened: Opened) -> None:
        """`names` may hold `wandb`, which has a writer of its own."""
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._feeds = [
            _Feed(name, functools.partial(_OPENERS[name], opened), self._failures)
            for name in names
            if name in _OPENERS
        ]

    @property
    def dropped(self) -> int:
        """Returns how many rows found a queue full."""
        return sum(feed.dropped for feed in self._feeds)

    def log(self, row: Row) -> None:
        """Hands a row to all of them."""
        for feed in self._feeds:
            feed.log(row)

    def failures(self) -> list[str]:
        """Returns what went wrong since the last call, one sentence each."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def close(self, timeout_s: float) -> bool:
        """Ends all of them; False where one was not done in time."""
        deadline_s = time.monotonic() + timeout_s
        full = [feed for feed in self._feeds if not feed.end(0.0)]  # The others need not wait for these.
        for feed in full:
            feed.end(deadline_s - time.monotonic())
        has_ended = [feed.join(deadline_s - time.monotonic()) for feed in self._feeds]
        return all(has_ended)


class _Feed:
    """What waits for one back-end, and the thread that hands it over. `dropped` counts rows that found the
    queue full.
    """

    def __init__(self, name: str, opens: Callable[[], Backend], failures: queue.SimpleQueue[str]) -> None:
        self.dropped = 0
        self._name, self._opens, self._failures = name, opens, failures
        self._rows: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"backend-{name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        if self._has_failed:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._failures.put(
                    f"the back-end {self._name} takes no rows: {QUEUE_ROWS} wait for it, and further ones are lost to it; "
                    "metrics.jsonl has everything"
                )

    def end(self, timeout_s: float) -> bool:
        """Ends it after the rows that wait; False where the queue stayed full for so long."""
        if not self._thread.is_alive():
            return True
        try:
            self._rows.put(None, timeout=max(0.0, timeout_s))
        except queue.Full:
            return False
        return True

    def join(self, timeout_s: float) -> bool:
        """Returns whether it has ended within that time."""
        self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            backend = self._opens()
            while (row := self._rows.get()) is not None:
                backend.log(row)
            backend.close()
        except Exception as error:  # noqa: BLE001 - files, sockets and other people's code: none may reach the run
            self._has_failed = True
            lines = str(error).strip().splitlines() or [""]
            self._failures.put(
                f"the back-end {self._name} failed ({type(error).__name__}: {lines[0][:200]}); it gets nothing more, "
                "metrics.jsonl has everything"
            )
