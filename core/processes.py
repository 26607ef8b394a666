"""Processes of a run as Ray actors: where they are put, where they write, and how one has ended."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from core.causes import Cause, cause_from
from core.errors import AgroError, TrainingError
from core.machine import collect_as_usual
from core.process_log import ProcessLog, last_lines, tail, words_of_process

WARN_TIMEOUT_S = 10.0
_NO_MEMORY = "low on memory"  # Of Ray's own memory monitor, which kills before the kernel has to.
_NODE_LOST = re.compile(r"because its node has died|node was terminated|node is dead", re.IGNORECASE)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_ADDRESS = re.compile(r"\bip[:=] ?([\w.:]+)")
_RAY_LOG_BYTES = 2**16
_inherited: dict[str, str] = {}  # What every process of the Ray that this one started has in its environment.


def remote(part: type, log: ProcessLog | None = None) -> Any:
    """Makes a Ray actor class of the class, whose processes write into `log`; untyped, as its handles are."""
    return ray.remote(part) if log is None else _Logged(_logged(part), log)


@dataclass(frozen=True)
class _Logged:
    """An actor class and the log of the one process that will be made of it."""

    actor_class: Any
    log: ProcessLog

    def options(self, **options: Any) -> _Logged:
        return _Logged(self.actor_class.options(**options), self.log)

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.actor_class.remote(self.log, *arguments, **named)


@functools.cache
def _logged(part: type) -> Any:
    """The actor class whose instances begin a log in their process before their own constructor runs.

    There is one for each part, however often it is started again: Ray keeps every class it was ever given.
    """

    def begin(self: Any, log: ProcessLog, *arguments: Any, **named: Any) -> None:
        see_own_gpus()
        log.begin(functools.partial(_send_warnings, log.monitor))
        part.__init__(self, *arguments, **named)  # type: ignore[misc]
        collect_as_usual()

    return ray.remote(type(part.__name__, (part,), {"__init__": begin, "__doc__": part.__doc__}))


def see_own_gpus() -> None:
    """Lets this process see the GPUs that Ray gave it, and no other; before its CUDA starts.

    Ray leaves the GPUs of the node in sight of an actor that asked for none, and of every actor where
    RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set, as other systems want it on a cluster: all ranks and
    engines would take the first one.
    """
    given = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given)


def _send_warnings(monitor: str, name: str, counts: Mapping[str, int]) -> bool:
    """Tells the monitor, by the name that Ray knows it by; in its own process it has none at first. Returns
    whether it took them.
    """
    if not monitor:
        return True
    try:
        ray.get(ray.get_actor(monitor).warn.remote(name, dict(counts)), timeout=WARN_TIMEOUT_S)
    except (ValueError, RuntimeError, RayError):  # It is not there yet, or dies, or Ray is going down.
        return False
    return True


# --- Places ---


def bundle_of(num_cpus: float, num_gpus: float) -> dict[str, float]:
    """Returns what one process asks for. Ray takes no empty bundle: nothing becomes next to nothing."""
    return {key: amount for key, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount} or {"CPU": 0.001}


def make_group(bundles: list[dict[str, float]]) -> PlacementGroup:
    """Returns a placement group; nothing waits for it here."""
    return placement_group(bundles, "PACK")


def is_placed(group: PlacementGroup) -> bool:
    """Returns whether the cluster has made room for the whole group."""
    return placement_group_table(group)["state"] == "CREATED"


def shortage(group: PlacementGroup) -> str:
    """Says what a group that is not placed asks for, and what is free now."""
    asked = [in_words(bundle) for bundle in group.bundle_specs]
    times = f"{len(asked)} x ({asked[0]})" if len(asked) > 1 else asked[0]
    free = ray.available_resources()
    wanted = {key: sum(one.get(key, 0) for one in group.bundle_specs) for key in ("CPU", "GPU")}
    is_short = any(wanted[key] > free.get(key, 0) for key in wanted)
    # Else no node has all of it, or Ray is about to place it.
    yet = "" if is_short else ", which Ray has not placed yet"
    return f"asks for {times}{yet}; free now: {in_words(free)}"


def in_words(resources: Mapping[str, float]) -> str:
    """Writes resources as words: `0.5 CPU, 1 GPU`."""
    return ", ".join(
        f"{resources.get(key, 0):g} {key}" for key in ("CPU", "GPU") if key == "CPU" or resources.get(key)
    )


def on_bundle(group: PlacementGroup, index: int, num_cpus: float, num_gpus: float) -> dict[str, Any]:
    """Returns the options of an actor that runs in bundle `index` of the group."""
    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "scheduling_strategy": strategy}


def on_this_node() -> dict[str, Any]:
    """Returns the options of an actor that writes into the run directory.

    It stays where the driver is, also when it is started again.
    """
    strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def environment(num_cpus: float = 1.0) -> dict[str, str]:
    """Returns what a process reads before torch and vllm are imported: one thread per process where cores are
    shared, and threads that sleep while they wait for one another. Those that spin take the core from who
    would be waited for.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, int(num_cpus))),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


@contextlib.contextmanager
def inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment for what is started in the meantime, Ray's own processes and all
    workers below them; `threads` asks for none of these again, until `forget_inherited`.

    A worker with an environment of its own imports Ray twice, once only to set it.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _inherited.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forget_inherited() -> None:
    """Takes note that the processes that would start others are gone."""
    _inherited.clear()


def threads(num_cpus: float) -> dict[str, Any]:
    """Returns the runtime environment of a worker with so many threads: what of `environment` it would not
    have anyway.
    """
    wanted = environment(num_cpus)
    own = {name: value for name, value in wanted.items() if _inherited.get(name) != value}
    return {"env_vars": own} if own else {}


class Whereabouts(NamedTuple):
    """A process's place: Ray's id of its node, its process id there, and the name of the machine."""

    node_id: str
    pid: int
    host: str


def whereabouts(_: object = None) -> Whereabouts:
    """Says where the caller is (called inside an actor)."""
    return Whereabouts(ray.get_runtime_context().get_node_id(), os.getpid(), socket.gethostname())


# --- Ends ---


def cause_of(error: RayError, where: Whereabouts | None = None) -> Cause:
    """Why the process behind a call is gone, or what the call raised there. `where` it was, None where it had
    not said so.
    """
    if isinstance(error, RayTaskError):
        lines = str(error.cause).strip().splitlines() or ["no message"]
        words = tuple(last_lines(str(error)))
        return Cause("exception", f"{type(error.cause).__name__}: {lines[-1][:300]}", last_words=words)
    # Said of a connection that ended when Ray had not heard of a death within a second, as on a busy machine.
    if isinstance(error, ActorUnavailableError) and where is not None and _is_gone(where):
        return cause_of_end(where)
    reason = str(error)
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    known = next((line for line in lines if "worker exit" in line.lower()), [*lines, type(error).__name__][0])
    pid = re.search(r"\bpid[:=] ?(\d+)", reason)
    if isinstance(error, OutOfMemoryError) or _NO_MEMORY in reason:
        return Cause("out of memory", known[:300])
    if _NODE_LOST.search(reason):
        return Cause("node lost", known[:300])
    if pid is None:
        return cause_from(known, "", None)
    host = _host_in(reason) if where is None else where.host
    return cause_from(known, words_of_worker(int(pid[1]), host), int(pid[1]))


def cause_of_end(where: Whereabouts) -> Cause:
    """Why the process that was there is gone, whose place Ray has given to another."""
    return cause_from(_exit_detail(where), words_of_worker(where.pid, where.host), where.pid)


def words_of_worker(pid: int, host: str) -> str:
    """What process `pid` of machine `host` wrote into its log; into Ray's, where it has none (yet). '' where
    that is on another machine: there is another process of that number here.
    """
    if words := words_of_process(pid, host):
        return words
    session = ray._private.worker._global_node  # Private, but there is no public way to a worker's log.
    if session is None or host != socket.gethostname():
        return ""
    paths = (Path(session.get_session_dir_path()) / "logs").glob(f"worker-*-{pid}.err")
    return "".join(tail(path, _RAY_LOG_BYTES).decode(errors="replace") for path in paths)


def _host_in(reason: str) -> str:
    """Returns this machine's name, '' where Ray's text on a process says that it was on another one."""
    address = _ADDRESS.search(reason)
    is_here = address is None or not ray.is_initialized() or address[1] == ray.util.get_node_ip_address()
    return socket.gethostname() if is_here else ""


def _is_gone(where: Whereabouts) -> bool:
    """Whether the process has ended: as this machine says of its own, and Ray of others'."""
    if where.host != socket.gethostname():
        return bool(_exit_detail(where))
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(where.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return True


def _exit_detail(where: Whereabouts) -> str:
    """Ray's sentence on how a worker ended; '' where it has none. Private: the public way is the
    dashboard's.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import WorkerTableData

    with contextlib.suppress(RayError, RuntimeError, AttributeError):
        table = state._connect_and_get_accessor().get_worker_table()
        ended = [
            entry
            for entry in map(WorkerTableData.FromString, table)
            if (entry.worker_address.node_id.hex(), entry.pid) == where[:2] and not entry.is_alive
        ]
        return str(ended[-1].exit_detail) if ended else ""
    return ""


def explained(error: RayError, who: str) -> AgroError:
    """What failed, as an error of ours: the one raised there when it is one of ours, else a TrainingError of
    two lines.
    """
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, AgroError):
            return error.cause
        what: Any = error.cause
        if isinstance(error.cause, RayError):
            what = str(error.cause).partition("\n")[0]  # Ray adds paragraphs.
        return TrainingError(f"{who} failed: {type(error.cause).__name__}: {what}{_where(str(error))}")
    if not could_not_start(error):
        return TrainingError(f"{who} died: {cause_of(error)}")
    # Ray gives the text only of what a constructor raised.
    last = "\n".join(f"  {line}" for line in last_lines(str(error), 3))
    return _stated_error(str(error)) or TrainingError(f"{who} could not start:\n{last}")


def could_not_start(error: BaseException) -> bool:
    """Returns whether the actor's constructor raised."""
    return isinstance(error, RayActorError) and "error raised in its creation task" in str(error)


def _where(traceback_text: str) -> str:
    """Returns a line that says where that was raised; none where the text does not tell."""
    frames = _FRAME.findall(traceback_text)
    return f"\n  in {frames[-1][2]} ({frames[-1][0]}:{frames[-1][1]})" if frames else ""


def _stated_error(traceback_text: str) -> AgroError | None:
    """Returns the error of ours that a traceback ends with; None when it ends with another."""
    kinds = {kind.__name__: kind for kind in _with_subclasses(AgroError)}
    stated = [
        match
        for match in re.finditer(r"^(?:\w+\.)*(\w+): ", traceback_text, re.MULTILINE)
        if match[1] in kinds
    ]
    return kinds[stated[-1][1]](traceback_text[stated[-1].end() :].strip()) if stated else None


def _with_subclasses(kind: type[AgroError]) -> list[type[AgroError]]:
    return [kind, *(found for subclass in kind.__subclasses__() for found in _with_subclasses(subclass))]
