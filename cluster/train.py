"""`launch.py train` goes from a config to a summary."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from ray.exceptions import RayError

from cluster.monitor.terminal import Terminal
from cluster.preparation import placement
from cluster.preparation.cards import check_cards
from cluster.preparation.memory import estimate_memory
from cluster.preparation.nodes import ask_ray, with_shm
from cluster.preparation.prepare import Inputs, check_start, load_libraries, locate_model, prepare
from cluster.preparation.run_dir import kept_if_begun
from cluster.preparation.surroundings import cluster_address
from cluster.progress import say
from cluster.session import ray_session
from cluster.signals import StopSignal
from cluster.supervisor import Supervisor
from core.config import Config
from core.errors import AgroError, ConfigError
from core.json_lines import Redactor
from core.machine import collect_as_usual
from core.process_log import begin_driver_log
from core.text import bounded, headline
from rewards.hosted import models_of


def train(config: Config, stop: StopSignal) -> dict[str, Any]:
    """Runs `config` to its end, or to an orderly end at the signal that `stop` takes, and returns the
    summary.

    Ray starts while the libraries load that the checks need. Raises AgroError after writing what there is,
    and Interrupted for a signal before a process of the run has started.
    """
    config = locate_model(config)
    check_start(config)
    say("starting Ray" if cluster_address() is None else f"joining the cluster at {cluster_address()}")
    loading = threading.Thread(target=load_libraries, name="libraries")
    loading.start()
    with contextlib.ExitStack() as stack:
        with stop.held():
            stack.enter_context(ray_session(config.actors, config.learner, models_of(config).values()))
            loading.join()
        say("reading the model's config, the data and the rewards")
        inputs = prepare(config)
        collect_as_usual(leave_out=False)
        with kept_if_begun(inputs.run_dir, inputs.is_continued):
            return _run(inputs, stop)


def _run(inputs: Inputs, stop: StopSignal) -> dict[str, Any]:
    config, models = inputs.config, models_of(inputs.config).values()
    say(f"run directory {inputs.run_dir}")
    stop.end_in_order(f"the same command with run.dir={inputs.run_dir}")
    stop.raise_if_asked()
    say("starting the processes of the run")  # From here on a signal is answered with a summary.
    asked, nodes = placement.bundles(config.actors, config.learner, models), ask_ray()
    warnings = [*config.warnings(), *placement.check_for(config, asked, nodes)]
    check_cards(config, nodes)
    supervisor = _supervisor(inputs)
    try:
        warnings += placement.memory_warnings(config, asked, estimate_memory(config), with_shm(nodes))
        with Terminal() as terminal:
            supervisor.start(warnings, stop, terminal)
            totals = supervisor.watch(stop, terminal)
        return supervisor.finish(totals, stop.name)
    except (AgroError, RayError) as raised:
        error = supervisor.explained(raised)
        try:
            supervisor.finish([], Redactor(os.environ)(bounded(str(error))))
        except (
            AgroError,
            RayError,
            # What is left of the run cannot be closed in order: say so, but the first error is the cause.
        ) as second:
            raise type(error)(
                f"{error}\n(and the run's files could not be completed: {headline(str(second))})"
            ) from None
        raise error from None
    finally:
        supervisor.close()


def _supervisor(inputs: Inputs) -> Supervisor:
    """The driver's log begins, and its processes start. Raises ConfigError where the run directory cannot be
    written.
    """
    try:
        begin_driver_log(inputs.run_dir)
        return Supervisor(inputs)
    except OSError as error:
        if isinstance(error, AgroError):
            raise
        raise ConfigError(
            f"run.dir = {inputs.run_dir} cannot be written: {error.strerror}. Free space on its disk, or choose another."
        ) from None
