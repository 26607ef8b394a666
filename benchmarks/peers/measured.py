"""Runs one system on one job and measures its processes from outside."""

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

SMOOTHED = 5
"""So many steps in a row have the mean reward that counts."""
START_LIMIT_S, END_LIMIT_S = 120.0, 30.0
POLL_S, MEMORY_EVERY_S = 0.1, 1.0


class Row(NamedTuple):
    """What a system says after an optimizer step: by its own clock, and in sums since its beginning."""

    wall_s: float
    samples: int
    tokens: int
    reward: float


class Seen(NamedTuple):
    """A look from outside: seconds since the start of the command, CPU seconds of all its processes so far,
    by what they are, and the rows by then.
    """

    at_s: float
    cpu_s: dict[str, float]
    num_rows: int


class Tree:
    """All processes below one of ours, those that are gone included."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._spent: dict[tuple[int, float], tuple[str, float]] = {}

    def cpu_s(self) -> dict[str, float]:
        """Returns the CPU seconds that they have spent by what they are, as of the last look at each."""
        for process in self._living():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._spent[process.pid, process.create_time()] = (
                    _kind_of(process),
                    times.user + times.system,
                )
        found: dict[str, float] = collections.defaultdict(float)
        for kind, seconds in self._spent.values():
            found[kind] += seconds
        return found

    def memory_mib(self) -> float:
        """Returns their memory now; what several share is counted once (PSS)."""
        total = 0
        for process in self._living():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 2**20

    def end(self) -> None:
        """Ends the command, and after END_LIMIT_S whatever is left of it."""
        processes = self._living()
        with contextlib.suppress(psutil.NoSuchProcess):  # It may have ended by itself.
            self._root.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(processes, timeout=END_LIMIT_S)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _living(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


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
    rows: Callable[[], list[Row]],
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
    tree, start_s = Tree(process.pid), time.perf_counter()
    seen: list[Seen] = []
    found: list[Row] = []
    peak_mib = memory_at_s = 0.0
    try:
        for at_s in _clock(start_s):
            if process.poll() is not None:
                tail = log_path.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
            if at_s >= memory_at_s:
                peak_mib, memory_at_s = max(peak_mib, tree.memory_mib()), at_s + MEMORY_EVERY_S
            if len(new := rows()) > len(found):
                found = new
                seen.append(Seen(at_s, tree.cpu_s(), len(found)))
            if is_over(job, at_s, seen, found):
                break
    finally:
        tree.end()
        process.wait(END_LIMIT_S)
    return {**figures_of(job, seen, found), "peak_memory_mib": peak_mib}


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


def figures_of(job: PeerJob, seen: Sequence[Seen], found: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures of a system. Raises RuntimeError where it did too few steps for a steady state."""
    steady = [one for one in seen if one.num_rows > job.warm_steps]
    if len(steady) < 2:
        raise RuntimeError(f"{job.name}: only {len(found)} steps were done in the time that it has")
    first, last = steady[0], steady[-1]
    before, after = found[first.num_rows - 1], found[last.num_rows - 1]
    seconds, samples = after.wall_s - before.wall_s, after.samples - before.samples
    spent = {kind: last.cpu_s[kind] - first.cpu_s.get(kind, 0.0) for kind in last.cpu_s}
    cores = sum(spent.values()) / (last.at_s - first.at_s)
    ms_per_core = seconds / samples * 1000
    solved = None if job.solved is None else _solved_at(job.solved, found)
    return {
        "samples_per_s": samples / seconds,
        "tokens_per_s": (after.tokens - before.tokens) / seconds,
        "cpu_ms_per_sample": cores * ms_per_core,
        "cpu_ms_per_sample_by": {
            kind: cpu_s / (last.at_s - first.at_s) * ms_per_core
            for kind, cpu_s in sorted(spent.items(), key=lambda one: -one[1])
            if cpu_s > 0
        },
        "cores_used": cores,
        "first_step_s": seen[0].at_s,
        "solved_s": math.nan if solved is None else _at(solved, seen) - seen[0].at_s,
        "steps": last.num_rows - first.num_rows,
        "reward": statistics.fmean(row.reward for row in found[-SMOOTHED:]),
    }


def rows_of_peers(path: Path) -> list[Row]:
    """Returns the rows that benchmarks/peers/trl_grpo.py and plain_sync.py write."""
    return [Row(row["wall_s"], row["samples"], row["tokens"], row["reward"]) for row in _json_lines(path)]


def rows_of_ours(run_dir: Path) -> list[Row]:
    """Returns the rows of a run's metrics."""
    return [
        Row(
            row["time/wall_s"],
            int(row["progress/samples"]),
            int(row["progress/sampled_tokens"]),
            row["reward/mean"],
        )
        for row in _json_lines(run_dir / "metrics.jsonl")
        if row.get("reward/mean") is not None
    ]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # The last one may be half written.
