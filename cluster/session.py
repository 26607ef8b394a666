"""The driver's connection to Ray, and the signals that end a run in order."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.config import Config
from cluster.errors import PlacementError
from cluster.guardian import guard
from cluster.prepare import repository_root

ROOM_FOR_ACTORS = 8


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


def logical_cpus(config: Config) -> int:
    """CPUs of a local Ray: a machine with fewer cores than asked for still runs it, only slower, and has room for scaling."""
    learner, actors = config.learner, config.actors
    most_actors = max(actors.count, actors.max or ROOM_FOR_ACTORS)
    asked = learner.ranks * learner.num_cpus + most_actors * actors.num_cpus
    return max(os.cpu_count() or 1, int(asked + 0.999))


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to the cluster of this job (RAY_ADDRESS), else to a local Ray of our own that ends with the run."""
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if "RAY_ADDRESS" in os.environ:
            ray.init(address="auto", **common)
        else:
            guard()
            env = {"PYTHONPATH": os.pathsep.join([str(repository_root()), *filter(None, [os.environ.get("PYTHONPATH")])])}
            cpus = logical_cpus(config)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env={"env_vars": env}, **common)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise PlacementError(
            f"no connection to Ray at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {str(error).splitlines()[0]}. "
            "Start a head (`ray start --head`) or unset RAY_ADDRESS to run alone; see `python launch.py doctor`."
        ) from None
    _keep_deaths_to_ourselves()
    try:
        yield
    finally:
        ray.shutdown()


def _keep_deaths_to_ourselves() -> None:
    """Ray prints a paragraph for every worker that dies, also with log_to_driver off; our events say it in a line. No public switch."""
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
