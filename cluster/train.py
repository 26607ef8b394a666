"""`launch.py train`: from a config to a summary."""

from __future__ import annotations

from typing import Any

from cluster import placement
from cluster.config import Config
from cluster.errors import AgroError
from cluster.prepare import prepare
from cluster.run_dir import kept_if_begun
from cluster.session import StopSignal, ray_session
from cluster.supervisor import Supervisor
from cluster.terminal import Terminal


def train(config: Config) -> dict[str, Any]:
    """Run `config` to its end, or to SIGINT or SIGTERM, in order; the summary. Raises AgroError after writing what there is."""
    inputs = prepare(config)
    with kept_if_begun(inputs.run_dir, inputs.is_continued), ray_session(inputs.config), StopSignal() as stop:
        warnings = [*config.warnings(), *placement.check(placement.bundles(config), placement.ask_ray())]
        supervisor = Supervisor(inputs)
        try:
            supervisor.start(warnings)
            with Terminal() as terminal:
                totals = supervisor.watch(stop, terminal)
            return supervisor.finish(totals, stop.name)
        except AgroError as error:
            try:
                supervisor.finish([], str(error).splitlines()[0])
            except AgroError as second:  # What is left of the run cannot be closed in order: say so, but the first error is the cause.
                raise type(error)(f"{error}\n(and the run's files could not be completed: {str(second).splitlines()[0]})") from None
            raise
        finally:
            supervisor.close()
