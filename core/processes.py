"""Processes of a run as Ray actors: where they are put, and what is said, in a few lines, when one fails."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from core.errors import AgroError, PeerTimeout, TrainingError

_LOG_LINES = 4
_SILENT_END = "connection error code 2. End of file"  # Ray follows it up with a paragraph of guesses.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_RAY_MARKS = re.compile(r"^:(job_id|actor_name|task_name):.*$", re.MULTILINE)
_MEMORY_WORDS = re.compile(r"out of memory|outofmemory|memoryerror|low on memory", re.IGNORECASE)


def remote(part: type) -> Any:
    """Returns the class as a Ray actor class; untyped, as its handles are."""
    return ray.remote(part)


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
    return f"asks for {times}; free now: {in_words(ray.available_resources())}"


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


def threads(num_cpus: float, *, engine: bool = False) -> dict[str, Any]:
    """Returns the environment of a worker process, read before torch is imported: one thread per process
    where cores are shared.
    """
    env = {"OMP_NUM_THREADS": str(max(1, int(num_cpus))), "TOKENIZERS_PARALLELISM": "false"}
    if engine:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return {"env_vars": env}


def whereabouts(_: object = None) -> tuple[str, int]:
    """Returns node id and process id of the caller (called inside an actor)."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


# --- Ends ---


def answer(calls: Any, who: str, timeout_s: float) -> Any:
    """Returns what `ray.get` returns; its error names who did not answer, or why it failed or died. Raises
    AgroError.
    """
    try:
        return ray.get(calls, timeout=timeout_s)
    except GetTimeoutError:
        raise PeerTimeout(f"{who} did not answer within {timeout_s:.0f} s (run.timeout_s)") from None
    except RayError as error:
        raise explained(error, who) from None


def explained(error: RayError, who: str) -> AgroError:
    """Returns what failed as an error of ours: the one raised there when it is one of ours, else a
    TrainingError of two lines.
    """
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, AgroError):
            return error.cause
        # Ray adds paragraphs.
        what = str(error.cause).partition("\n")[0] if isinstance(error.cause, RayError) else error.cause
        return TrainingError(f"{who} failed: {type(error.cause).__name__}: {what}{_where(str(error))}")
    if not could_not_start(error):
        return TrainingError(f"{who} died: {death_cause(error)}")
    # Ray gives the text only of what a constructor raised.
    return _stated_error(str(error)) or TrainingError(f"{who} could not start:\n{last_lines(str(error), 3)}")


def could_not_start(error: BaseException) -> bool:
    """Returns whether the actor's constructor raised."""
    return isinstance(error, RayActorError) and "error raised in its creation task" in str(error)


def death_cause(error: RayError) -> str:
    """Says in a few lines what was raised, or what Ray knows, with the end of the process's log where it is
    on this machine.
    """
    if isinstance(error, RayTaskError):
        lines = str(error.cause).strip().splitlines() or ["no message"]
        return "\n".join(
            [f"{type(error.cause).__name__}: {lines[-1][:300]}", last_lines(str(error), _LOG_LINES)]
        )
    reason = str(error)
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    known = next(
        (line for line in lines if "worker exit" in line.lower()), lines[0] if lines else type(error).__name__
    )
    if _SILENT_END in known:
        known = "its process was killed (kill -9, or the kernel for lack of memory) or crashed"
    if (pid := re.search(r"\bpid[:=] ?(\d+)", reason)) is None:
        return known[:300]
    return "\n".join([f"{known[:300]} (pid {pid[1]})", *log_tail(int(pid[1]))])


def log_tail(pid: int) -> list[str]:
    """Returns the last lines that a worker of this node wrote to its error log; none for a worker of another
    node.
    """
    logs = Path(_ray_node().get_session_dir_path()) / "logs"
    texts = [path.read_text(errors="replace") for path in logs.glob(f"worker-*-{pid}.err")]
    tails = [last_lines(_RAY_MARKS.sub("", text), _LOG_LINES) for text in texts]
    return [tail for tail in tails if tail]


def memory_hint(cause: str) -> str:
    """Says what to lower when `cause` may be a lack of memory."""
    likely = "This looks like" if _MEMORY_WORDS.search(cause) else "If it is"
    knobs = "actors.slots and actors.kv_cache_gib (on a GPU actors.gpu_memory_utilization)"
    return f"{likely} a lack of memory: lower {knobs}, or run fewer actors."


def _where(traceback_text: str) -> str:
    """Returns a line that says where that was raised; none where the text does not tell."""
    frames = _FRAME.findall(traceback_text)
    return f"\n  in {frames[-1][2]} ({frames[-1][0]}:{frames[-1][1]})" if frames else ""


def last_lines(text: str, count: int) -> str:
    """Returns the last `count` lines of `text` that are not empty, without colours, indented and cut."""
    text = _COLOURS.sub("", text)
    return "\n".join(
        "  " + line[:200] for line in [line for line in text.splitlines() if line.strip()][-count:]
    )


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


def _ray_node() -> Any:
    """Returns Ray's record of this node; it is private, but there is no public way to a worker's log."""
    return ray._private.worker._global_node
