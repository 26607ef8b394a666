"""Connects the driver to Ray."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ray
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from cluster.cores import CoreKeeper
from cluster.guardian import guard
from cluster.preparation.prepare import repository_root
from cluster.preparation.surroundings import cluster_address
from cluster.progress import say
from core.config import ActorsConfig, LearnerConfig
from core.errors import PlacementError
from core.machine import LOADING_THRESHOLDS, available_cpus, collect_seldom
from core.processes import environment, forget_inherited, inherited
from rewards.hosted import HostedModel

ROOM_FOR_ACTORS = 8
PASSED_ON = ("HF_", "TRANSFORMERS_", "WANDB_", "VLLM_", "NCCL_", "TORCH_NCCL_", "GLOO_")
"""What the variables begin with that processes on other machines get from the driver: where models come from,
where curves go, how nodes speak.
"""
OF_A_NODE = ("VLLM_HOST_IP", "VLLM_PORT")
"""Of those, what is a machine's own: an engine elsewhere would look for its workers on the driver's."""
_HOOK = "worker_process_setup_hook"
_ONLOOKERS = ("start_monitor", "start_log_monitor", "start_api_server")


def logical_cpus(actors: ActorsConfig, learner: LearnerConfig, models: Iterable[HostedModel] = ()) -> int:
    """Returns the CPUs that a local Ray is told it has.

    A machine with fewer cores than asked for still runs it, only slower, and has room for scaling.
    """
    most_actors = max(actors.fewest, actors.most or ROOM_FOR_ACTORS)
    asked = learner.ranks * learner.reserved_cpus + most_actors * actors.num_cpus
    asked += sum(model.num_cpus for model in models)
    return max(os.cpu_count() or 1, int(asked + 0.999))


def first_at_once(num_ranks: int) -> float:
    """Returns how many actors may load at once before any of them runs: on one machine as many as the ranks
    leave cores, on a cluster all.
    """
    return max(1, int(available_cpus()) - num_ranks) if cluster_address() is None else math.inf


@contextlib.contextmanager
def ray_session(
    actors: ActorsConfig, learner: LearnerConfig, models: Iterable[HostedModel] = ()
) -> Iterator[None]:
    """Keeps a connection to the cluster that RAY_ADDRESS names, else to a local Ray of our own that ends with
    the run.

    `cluster_address` in cluster/preparation/surroundings.py reads the variable. Raises PlacementError when
    there is no connection.
    """
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    keep_no_call_events()
    address = cluster_address()
    try:
        with _our_signal_handlers():
            if address is not None:
                ray.init(address=address, runtime_env=_on_cluster(os.environ), **common)
            else:
                # It is empty or "local" here, which Ray's own processes would take for an address.
                os.environ.pop("RAY_ADDRESS", None)
                guard()
                cpus = logical_cpus(actors, learner, models)
                with inherited(_environment()), without_onlookers():
                    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
    except Exception as error:  # noqa: BLE001 -- Ray raises nothing more special where a node does not start
        forget_inherited()
        raise PlacementError(_why_not_connected(address, error)) from None
    _keep_deaths_to_ourselves()
    try:
        with contextlib.ExitStack() as stack:
            if address is None and _is_full(actors, learner, models):
                stack.enter_context(CoreKeeper(learner.ranks))
            yield
    finally:
        ray.shutdown()
        forget_inherited()


def keep_no_call_events() -> None:
    """Lets Ray, when it is started next, keep no event of every call: its control process would have lists of
    100,000 that nobody asks for.
    """
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")


@contextlib.contextmanager
def without_onlookers() -> Iterator[None]:
    """Lets `ray.init` start a local Ray without three processes that serve no run: the autoscaler of a
    cluster that cannot grow, the reader of logs that nobody is sent, and the server of a dashboard that there
    is not, for which it would wait. Nor are the libraries of that server imported here, only to see whether
    they are there.

    `ray start` has options against the first two, `ray.init` has none.
    """
    node, utils = ray._private.node.Node, ray._private.utils
    starts = {name: getattr(node, name) for name in _ONLOOKERS}
    look = utils.get_dashboard_dependency_error
    for name in starts:
        setattr(node, name, lambda self, **options: None)
    utils.get_dashboard_dependency_error = lambda: None
    try:
        yield
    finally:
        utils.get_dashboard_dependency_error = look
        for name, start in starts.items():
            setattr(node, name, start)


def _is_full(actors: ActorsConfig, learner: LearnerConfig, models: Iterable[HostedModel]) -> bool:
    """Returns whether this machine has a core for each thread of engines and ranks, and no more."""
    threads = max(actors.num_cpus, actors.tensor_parallel, learner.reserved_cpus)
    return threads <= 1 and not [*models] and available_cpus() == actors.fewest + learner.ranks


def _environment() -> dict[str, str]:
    """Returns the environment of all processes of a local Ray. Ray has a field for the hook, but only in a
    runtime environment.
    """
    path = [str(repository_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
    hook = f"{collect_seldom.__module__}.{collect_seldom.__qualname__}"
    return {
        **environment(),
        "PYTHONPATH": os.pathsep.join(path),
        WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook,
    }


def _on_cluster(variables: Mapping[str, str]) -> dict[str, Any]:
    """Returns the runtime environment of all processes of a run on a cluster: each begins with `prepare`."""
    submitted = json.loads(variables.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}").get("runtime_env") or {}
    if _HOOK in submitted:  # Ray takes one.
        say(f"the job was submitted with a {_HOOK}: the driver's {', '.join(PASSED_ON)}* are not passed on")
        return {}
    passed_on = {
        name: value
        for name, value in variables.items()
        if name.startswith(PASSED_ON) and name not in OF_A_NODE
    }
    return {_HOOK: _prepare(passed_on)}


def _prepare(variables: Mapping[str, str]) -> Callable[[], None]:
    """Returns what a process on a cluster does first: it takes those `variables` that its node does not have
    itself, or that the job was not submitted with, and collects seldom while it loads its libraries.

    They are no `env_vars` of Ray's: these would overrule the node, as where networks have other names there,
    and Ray writes them into its logs, tokens too. Ray sends a function that is made here whole: the process
    need not find this module.
    """

    thresholds = LOADING_THRESHOLDS

    def prepare() -> None:
        import gc
        import os

        for name, value in variables.items():
            os.environ.setdefault(name, value)
        gc.set_threshold(*thresholds)

    return prepare


def _why_not_connected(address: str | None, error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if address is None:
        return f"Ray did not start on this machine: {reason}. See `python launch.py doctor`."
    return (
        f"no connection to Ray at RAY_ADDRESS={address}: {reason}. Start a head (`ray start --head`) or "
        "unset RAY_ADDRESS to run "
        "alone; see `python launch.py doctor`."
    )


@contextlib.contextmanager
def _our_signal_handlers() -> Iterator[None]:
    """Keeps the handler of SIGTERM that was there before `ray.init`. Ray has no public switch for its own
    two.

    The one in Python ends the process without a word. The one in C++ prints its stack, calls the one before
    it, and sets an alarm that aborts the process three seconds later, in the middle of an orderly end.
    """
    setter = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = setter
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)
            signal.alarm(0)  # Ray's handler may have set it for a SIGTERM that came in between.


def _keep_deaths_to_ourselves() -> None:
    """Silences the paragraph that Ray prints for every worker that dies, also with log_to_driver off.

    Our events say it in a line. Ray has no public switch for that.
    """
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
