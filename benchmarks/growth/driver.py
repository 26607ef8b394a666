"""The driver of a run of simulated actors: what `cluster/supervisor.py` does in a turn, without Ray."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from buffer.client import BufferClient
from cluster.control import Control, RunStatus
from cluster.health import Health, step_of
from cluster.monitor.terminal import Terminal
from cluster.supervisor import TURN_S
from core.calls import Calls, Polled
from core.config import Config
from core.monitor_client import MonitorClient
from core.weights.board import BoardClient


class _Roles:
    """In place of the fleet, for who judges by it: all actors run."""

    num_deaths = 0

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def names(self, *states: str) -> list[str]:
        """Returns all actors."""
        return list(self._names)

    rollout_names = names

    def status(self) -> list[dict[str, Any]]:
        """Returns an entry an actor, as `Fleet.status` does."""
        return [
            {"name": name, "state": "running", "since_s": 1.0, "pid": 1, "note": ""} for name in self._names
        ]


class Driver:
    """A driver whose `turn()` takes answers, asks again, judges, shows, writes the status."""

    turn_s = TURN_S

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        num_actors: int,
        calls: Calls,
        buffer: BufferClient,
        board: BoardClient,
        monitor: MonitorClient,
    ) -> None:
        self._calls, self._monitor, self._config = calls, monitor, config
        clock = asyncio.get_running_loop().time
        self._fleet: Any = _Roles([f"actor-{number}" for number in range(num_actors)])
        self._stats = Polled(calls, buffer.stats)
        self._view = Polled(calls, monitor.view)
        self._evaluations = Polled(calls, lambda: board.evaluations(0))
        services: Any = SimpleNamespace(calls=calls, buffer=buffer, event=lambda text: None)
        self._health = Health(config, services, run_dir, clock)
        self._control = Control(run_dir, lambda text: None, clock)
        self._terminal = Terminal(io.StringIO(), live=False, clock=clock)
        self._learner: Any = SimpleNamespace(state="training", clients=dict)

    def turn(self) -> None:
        """Takes one turn."""
        for polled in (self._stats, self._view, self._evaluations):
            polled.poll()
        stats, view = self._stats.value, self._view.value
        if stats is None or view is None:
            return
        if self._control.is_due():
            self._control.write(self._status(stats, view))
        self._calls.post(self._monitor.log_buffer(stats), "the buffer's gauges")
        self._health.judge(stats, view, 0, self._fleet, self._learner)
        self._terminal.update(view)

    def _status(self, stats: Mapping[str, float], view: Mapping[str, Any]) -> RunStatus:
        known = view["actors"]
        actors = [
            {**entry, "version": known.get(entry["name"], {}).get("version")}
            for entry in self._fleet.status()
        ]
        return RunStatus(
            name="growth",
            state="training",
            step=step_of(view),
            steps=self._config.run.steps,
            actors=actors,
            buffer=dict(stats),
            waits={},
        )
