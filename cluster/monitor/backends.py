"""Hands a run's rows to what shows them besides its own files and W&B: TensorBoard, trackio, Prometheus.

    Monitor --log(row)--> bounded queue --> one daemon thread --> TensorboardBackend, TrackioBackend, PrometheusBackend

A back-end that fails is told once and left alone: metrics.jsonl has everything. A further one is a class with
`log` and `close`, its line in `_OPENERS`, and its name in core/config/monitor.py.
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
from core.metrics import METRICS

Row = Mapping[str, float | None]
QUEUE_ROWS = 1000
GAUGE_PREFIX = "agro_"


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
    """A run of trackio, which keeps it in files of its own; a run that goes on is resumed there."""

    def __init__(self, opened: Opened) -> None:
        trackio = importlib.import_module("trackio")
        run = f"{opened.name}-{opened.run_dir.name}"
        self._trackio = trackio
        trackio.init(project=opened.project, name=run, config=dict(opened.config), resume="allow")

    def log(self, row: Row) -> None:
        """Logs the known values at the row's step."""
        known = {name: value for name, value in row.items() if value is not None}
        self._trackio.log(known, step=int(row.get("progress/step") or 0))

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
    """The back-ends of a run behind one thread; never raises. `failures()` tells once what went wrong, and
    `dropped` counts rows that found the queue full.
    """

    def __init__(self, names: tuple[str, ...], opened: Opened) -> None:
        """`names` may hold `wandb`, which has a writer of its own."""
        self.dropped = 0
        self._names = [name for name in names if name in _OPENERS]
        self._opened = opened
        self._rows: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="backends", daemon=True)
        if self._names:
            self._thread.start()

    def log(self, row: Row) -> None:
        """Hands a row to all of them."""
        if self._names:
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                self.dropped += 1

    def failures(self) -> list[str]:
        """Returns what went wrong since the last call, one sentence each."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._failures.get_nowait())
        return found

    def close(self, timeout_s: float) -> bool:
        """Ends all of them; False where one was not done in time."""
        if not self._names:
            return True
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        living: dict[str, Backend] = {}
        for name in self._names:
            self._try(name, living, functools.partial(self._open, name, living))
        while (row := self._rows.get()) is not None:
            for name, backend in list(living.items()):
                self._try(name, living, functools.partial(backend.log, row))
        for name, backend in list(living.items()):
            self._try(name, living, backend.close)

    def _open(self, name: str, living: dict[str, Backend]) -> None:
        living[name] = _OPENERS[name](self._opened)

    def _try(self, name: str, living: dict[str, Backend], does: Callable[[], object]) -> None:
        try:
            does()
        except Exception as error:  # noqa: BLE001 - files, sockets and other people's code: none may reach the run
            living.pop(name, None)
            lines = str(error).strip().splitlines() or [""]
            self._failures.put(
                f"the back-end {name} failed ({type(error).__name__}: {lines[0][:200]}); it gets nothing more, metrics.jsonl "
                "has everything"
            )
