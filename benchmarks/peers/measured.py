"""Runs one system on one job and measures its processes from outside.

Whoever measures takes cores from what is measured, and more from a system of many processes than from one
of few. So rows are read once, CPU time is looked at when the window opens and when it closes, and memory
after that.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.peers.jobs import PeerJob
from benchmarks.processes import cpu_s_with_gone, tree_of

SMOOTHED = 5
"""So many steps in a row have the mean reward that counts."""
START_LIMIT_S, END_LIMIT_S = 120.0, 30.0
POLL_S = 0.1
MEMORY_LOOKS, MEMORY_EVERY_S = 5, 1.0


class Row(NamedTuple):
    """What a system says after an optimizer step: by its own clock, and in sums since its beginning."""

    wall_s: float
    samples: int
    tokens: int
    reward: float


class WrittenRows:
    """The rows that a system has written to its file, as far as they were read: `found`."""

    def __init__(self, path: Path, row_of: Callable[[dict[str, Any]], Row | None]) -> None:
        """Takes what makes a row of a line, or None of one that is none."""
        self.found: list[Row] = []
        self._path, self._row_of, self._read_bytes = path, row_of, 0

    def read(self) -> bool:
        """Reads what was written since the last time; returns whether there was a row."""
        before = len(self.found)
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):  # It is half written.
                    break
                self._read_bytes += len(line)
                if (row := self._row_of(json.loads(line))) is not None:
                    self.found.append(row)
        return len(self.found) > before


class Seen(NamedTuple):
    """A moment at which there was a new row, in seconds since the command began, and the rows by then."""

    at_s: float
    num_rows: int


class WindowCpu(NamedTuple):
    """CPU seconds of all processes in the window by what they are, and for how long that was."""

    cpu_s: Mapping[str, float]
    in_s: float


def cpu_s_of(pid: int) -> dict[str, float]:
    """Returns the CPU seconds that a process and all below it have spent by what they are; those that are
    gone count as what has started them.
    """
    found: dict[str, float] = collections.defaultdict(float)
    for process in tree_of(pid):
        with contextlib.suppress(psutil.Error):
            found[_kind_of(process)] += cpu_s_with_gone(process)
    return found


def memory_mib_of(pid: int) -> float:
    """Returns the memory of a process and all below it now; what several share is counted once (PSS)."""
    total = 0
    for process in tree_of(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**20


def end(pid: int) -> None:
    """Ends a command, and after END_LIMIT_S whatever is left of it."""
    processes = tree_of(pid)
    for process in processes[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):  # It may have ended by itself.
            process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=END_LIMIT_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _kind_of(process: psutil.Process) -> str:
    """Returns what a process is: Ray's actors by their class, others by their program or script."""
    words = [word for word in process.cmdline()[:3] if word]
    if not words:
        return process.name()
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0].split(":")[0]
    script = next((word for word in words[1:] if not word.startswith("-")), "")
    return Path(script if "python" in words[0] and script else words[0]).name


def measure(
    job: PeerJob,
    command: Sequence[str],
    rows: WrittenRows,
    log_path: Path,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Runs the command until the job's window is over, and it has reached what it is to reach, or the limit;
    returns its figures. Raises RuntimeError, with the end of its log, for one that ends by itself.
    """
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    start_s, found = time.perf_counter(), rows.found
    seen: list[Seen] = []
    opened_s, before = 0.0, dict[str, float]()
    try:
        for at_s in _clock(start_s):
            if process.poll() is not None:
                tail = log_path.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
            if rows.read():
                seen.append(Seen(at_s, len(found)))
                if not before and len(found) > job.warm_steps:
                    opened_s, before = at_s, cpu_s_of(process.pid)
            if is_over(job, at_s, seen, found):
                break
        after = cpu_s_of(process.pid)
        spent = WindowCpu({kind: after[kind] - before.get(kind, 0.0) for kind in after}, at_s - opened_s)
        memory_mib = max(_memory_looks(process.pid))
    finally:
        end(process.pid)
        process.wait(END_LIMIT_S)
    return {**figures_of(job, seen, found, spent), "peak_memory_mib": memory_mib}


def _memory_looks(pid: int) -> Iterator[float]:
    for _ in range(MEMORY_LOOKS):
        yield memory_mib_of(pid)
        time.sleep(MEMORY_EVERY_S)


def _clock(start_s: float) -> Iterator[float]:
    while True:
        time.sleep(POLL_S)
        yield time.perf_counter() - start_s


def is_over(job: PeerJob, at_s: float, seen: Sequence[Seen], found: Sequence[Row]) -> bool:
    """Returns whether nothing more is to be waited for, `at_s` seconds after the start; `seen` are the looks
    at which there were new rows.
    """
    if not seen:
        return at_s > START_LIMIT_S
    if at_s > seen[0].at_s + 3 * job.timeout_s:
        return True
    # A window ends with a step.
    is_news = seen[-1].at_s == at_s
    warm = next((one for one in seen if one.num_rows > job.warm_steps), None)
    if warm is None or not is_news:
        return False
    if at_s > seen[0].at_s + job.timeout_s and len(found) > job.warm_steps + 2:
        return True
    return at_s > warm.at_s + job.window_s and (
        job.solved is None or _solved_at(job.solved, found) is not None
    )


def _solved_at(solved: float, found: Sequence[Row]) -> int | None:
    """Returns after how many steps the mean reward of the last SMOOTHED is this high; None: not yet."""
    for count in range(SMOOTHED, len(found) + 1):
        if statistics.fmean(row.reward for row in found[count - SMOOTHED : count]) >= solved:
            return count
    return None


def _at(count: int, seen: Sequence[Seen]) -> float:
    """Returns when so many steps were done."""
    return next(one.at_s for one in seen if one.num_rows >= count)


def figures_of(job: PeerJob, seen: Sequence[Seen], found: Sequence[Row], spent: WindowCpu) -> dict[str, Any]:
    """Returns the figures of a system. Raises RuntimeError where it did too few steps for a steady state."""
    steady = [one for one in seen if one.num_rows > job.warm_steps]
    if len(steady) < 2:
        raise RuntimeError(f"{job.name}: only {len(found)} steps were done in the time that it has")
    first, last = steady[0], steady[-1]
    before, after = found[first.num_rows - 1], found[last.num_rows - 1]
    seconds, samples = after.wall_s - before.wall_s, after.samples - before.samples
    cores = sum(spent.cpu_s.values()) / spent.in_s
    ms_per_core = seconds / samples * 1000
    solved = None if job.solved is None else _solved_at(job.solved, found)
    return {
        "samples_per_s": samples / seconds,
        "tokens_per_s": (after.tokens - before.tokens) / seconds,
        "cpu_ms_per_sample": cores * ms_per_core,
        "cpu_ms_per_sample_by": {
            kind: cpu_s / spent.in_s * ms_per_core
            for kind, cpu_s in sorted(spent.cpu_s.items(), key=lambda one: -one[1])
            if cpu_s > 0
        },
        "cores_used": cores,
        "first_step_s": seen[0].at_s,
        "solved_s": math.nan if solved is None else _at(solved, seen) - seen[0].at_s,
        "steps": last.num_rows - first.num_rows,
        "reward": statistics.fmean(row.reward for row in found[-SMOOTHED:]),
    }


def rows_of_peers(path: Path) -> WrittenRows:
    """Returns the rows that benchmarks/peers/trl_grpo.py and plain_sync.py write."""
    return WrittenRows(path, lambda row: Row(row["wall_s"], row["samples"], row["tokens"], row["reward"]))


def rows_of_ours(run_dir: Path) -> WrittenRows:
    """Returns the rows of a run's metrics."""
    return WrittenRows(run_dir / "metrics.jsonl", _row_of_ours)


def _row_of_ours(row: dict[str, Any]) -> Row | None:
    if row.get("reward/mean") is None:
        return None
    samples, tokens = int(row["progress/samples"]), int(row["progress/sampled_tokens"])
    return Row(row["time/wall_s"], samples, tokens, row["reward/mean"])
