"""Measures whether a long run becomes larger or slower: `make bench-soak`, 20,000 steps, ten minutes at most.

Monitor, buffer and board are processes of their own, as in a run; this one makes the calls of two actors and
of a learner, without an engine and without training. Memory of every process and the time of a step are
compared between step 1,000 and the end, and the files of the run are counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.growth.growth import SAMPLES, make_config, make_group
from benchmarks.results import save
from buffer.client import connect_buffer
from buffer.server import ReplayBuffer
from cluster.monitor.monitor import Monitor
from cluster.session import ray_session
from core.calls import Calls
from core.config import Config
from core.metrics import METRICS, shows_samples
from core.monitor_client import MONITOR, MonitorClient
from core.processes import remote, whereabouts
from core.records import WorkItem
from core.weights.board import BOARD, Board, BoardClient

STEPS, FROM_STEP, WINDOW_STEPS = 20_000, 1_000, 500
GROUPS_PER_STEP, ACTORS = 2, 2
LIMIT_S = 570.0
SHOWN = 4


class SoakedParts:
    """Monitor, buffer and board of a run in processes of their own."""

    def __init__(self, config: Config, run_dir: str) -> None:
        self.calls = Calls(120.0)
        monitor = remote(Monitor).options(num_cpus=0).remote(config, run_dir)
        self.monitor = MonitorClient(monitor, MONITOR)
        shard = remote(ReplayBuffer).options(num_cpus=0, max_concurrency=1000).remote(config, run_dir, 1000)
        self.buffer = connect_buffer([shard])
        board = remote(Board).options(num_cpus=0, max_concurrency=1000).remote(config.run, {}, print)
        self.board = BoardClient(board, BOARD)
        clients = {"monitor": self.monitor, "buffer": self.buffer.shards[0], "board": self.board}
        places = {name: self.calls.ask(client.inside(whereabouts)) for name, client in clients.items()}
        self._processes = {name: psutil.Process(place.pid) for name, place in places.items()}
        self._processes["driver"] = psutil.Process()
        for process in psutil.Process().children(recursive=True):
            if process.name() in ("gcs_server", "raylet"):
                self._processes[process.name()] = process

    def memory_mib(self) -> dict[str, float]:
        """Returns what each process holds for itself, in MiB."""
        return {name: process.memory_full_info().uss / 2**20 for name, process in self._processes.items()}


class Soak:
    """The calls of actors and learner, one step after another."""

    def __init__(self, config: Config, parts: SoakedParts) -> None:
        self._config, self._parts = config, parts
        self._row = dict.fromkeys(METRICS, 0.123456789)
        shown = ("version", "staleness", "prompt", "completion", "reward", "error", "advantage")
        self._samples = [dict.fromkeys(shown, "1 + 2 = 3") for _ in range(SHOWN)]

    def take_step(self, step: int) -> None:
        """Does all that a step of a run asks of these processes."""
        parts, ask = self._parts, self._parts.calls.ask
        share = GROUPS_PER_STEP // ACTORS
        for name in (f"actor-{number}" for number in range(ACTORS)):
            ask(parts.board.poll(name, step - 1, 0, 0.0))
            items = ask(parts.buffer.lease(name, share, 5.0, step, [])) or []
            for payload in items:
                group = make_group(msgspec.msgpack.decode(payload, type=WorkItem), step, name)
                ask(parts.buffer.insert(name, [group]))
            ask(parts.monitor.log_actor(name, {"generated_tokens": 100.0 * step, "busy_s": float(step)}))
        if ask(parts.buffer.sample(step, GROUPS_PER_STEP, 5.0)) is None:
            raise RuntimeError(f"no batch came at step {step}")
        ask(parts.board.publish(b"", [], step + 1, evaluate=()))
        ask(parts.monitor.log_buffer(ask(parts.buffer.stats())))
        ask(parts.monitor.log_step({**self._row, "progress/step": step + 1}))
        if shows_samples(step + 1):
            ask(parts.monitor.log_samples(step + 1, self._samples))
        if (step + 1) % self._config.checkpoint.every == 0:
            ask(parts.buffer.set_watermark(step + 1))
        ask(parts.monitor.view())


def _window_ms(take_step: Callable[[int], None], first: int, count: int) -> float:
    """Returns the median time of `count` steps, in milliseconds."""
    times_s = []
    for step in range(first, first + count):
        start_s = time.perf_counter()
        take_step(step)
        times_s.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times_s)


def measure(config: Config, num_steps: int, run_dir: Path) -> dict[str, Any]:
    """Returns memory and step time at `FROM_STEP` and at the end, and the files of the run."""
    parts = SoakedParts(config, str(run_dir))
    soak, start_s = Soak(config, parts), time.monotonic()
    first, window = min(FROM_STEP, num_steps // 4), min(WINDOW_STEPS, num_steps // 8)
    for step in range(first - window):
        soak.take_step(step)
    began_ms = _window_ms(soak.take_step, first - window, window)
    began_mib, began_bytes = parts.memory_mib(), _sizes(run_dir)
    step = first
    while step < num_steps - window and time.monotonic() - start_s < LIMIT_S:
        soak.take_step(step)
        step += 1
    ended_ms = _window_ms(soak.take_step, step, window)
    ended_mib, num_done = parts.memory_mib(), step + window
    files = _sizes(run_dir)
    grown = {name: size - began_bytes.get(name, 0) for name, size in files.items()}
    return {
        "steps": num_done,
        "from_step": first,
        "step_ms": [began_ms, ended_ms],
        "step_time_grew_by": ended_ms / began_ms - 1,
        "memory_mib": {name: [began_mib[name], ended_mib[name]] for name in began_mib},
        "memory_grew_by": {name: ended_mib[name] / began_mib[name] - 1 for name in began_mib},
        "files": len(files),
        "files_mb": {name: size / 1e6 for name, size in files.items()},
        "bytes_a_step": {name: size / (num_done - first) for name, size in grown.items()},
    }


def _sizes(run_dir: Path) -> dict[str, int]:
    """Returns the bytes of each file of the run, by its name."""
    return {path.name: path.stat().st_size for path in sorted(run_dir.rglob("*")) if path.is_file()}


def main() -> None:
    """Measures, prints what came of it, and writes it to benchmarks/results/."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="learner steps (default: %(default)s)")
    num_steps = parser.parse_args().steps
    config = make_config(GROUPS_PER_STEP, 1)
    with ray_session(config.actors, config.learner), tempfile.TemporaryDirectory() as directory:
        result = measure(config, num_steps, Path(directory))
    print(
        f"{result['steps']} steps; a step took {result['step_ms'][0]:.1f} ms at step {result['from_step']} and "
        f"{result['step_ms'][1]:.1f} ms at the end ({result['step_time_grew_by']:+.1%})"
    )
    for name, (began_mib, ended_mib) in result["memory_mib"].items():
        print(f"  {name:<12}{began_mib:7.1f} -> {ended_mib:7.1f} MiB ({result['memory_grew_by'][name]:+.1%})")
    print(
        f"{result['files']} files of {GROUPS_PER_STEP * SAMPLES} samples a step: MB, and bytes more each step"
    )
    for name, size_mb in result["files_mb"].items():
        print(f"  {name:<24}{size_mb:9.1f} {result['bytes_a_step'][name]:9.0f}")
    if num_steps == STEPS:
        print(f"written to {save('soak', result)}")


if __name__ == "__main__":
    main()
