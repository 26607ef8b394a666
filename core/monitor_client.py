"""The monitor as other processes see it: `cluster/monitor/monitor.py`, of which only the driver knows more
than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from core.calls import Client, asks
from core.evaluation.records import Evaluation

MONITOR = "the monitor"


class MonitorMethods(Protocol):
    """What may be asked of the monitor. `cluster.monitor.monitor.Monitor` says what each method does."""

    def log_step(self, row: Mapping[str, float | None]) -> None:
        """Takes the learner's metrics of one step."""

    def log_actor(self, name: str, counters: Mapping[str, Any]) -> None:
        """Takes an actor's counters and gauges."""

    def forget_actor(self, name: str) -> None:
        """Forgets an actor that is gone for good."""

    def log_buffer(self, gauges: Mapping[str, float]) -> None:
        """Takes the buffer's gauges."""

    def log_evaluation(self, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        """Takes a finished evaluation, with samples to show."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Takes samples of a batch to show."""

    def event(self, text: str) -> None:
        """Takes something worth telling."""

    def warn(self, name: str, counts: Mapping[str, int]) -> None:
        """Takes how often a process has logged which warnings."""

    def generation(self) -> dict[str, tuple[tuple[float, float], float]]:
        """Tells who generated how much, and when each actor was last heard of."""
        ...

    def view(self) -> dict[str, Any]:
        """Gives a snapshot of everything, for the terminal and the status."""
        ...

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes the last row and the summary."""


class MonitorClient(Client):
    """The monitor of the run."""

    log_step = asks(MonitorMethods.log_step)
    log_actor = asks(MonitorMethods.log_actor)
    forget_actor = asks(MonitorMethods.forget_actor)
    log_buffer = asks(MonitorMethods.log_buffer)
    log_evaluation = asks(MonitorMethods.log_evaluation)
    log_samples = asks(MonitorMethods.log_samples)
    event = asks(MonitorMethods.event)
    warn = asks(MonitorMethods.warn)
    generation = asks(MonitorMethods.generation)
    view = asks(MonitorMethods.view)
    close = asks(MonitorMethods.close)
