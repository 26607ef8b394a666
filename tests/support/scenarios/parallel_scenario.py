"""What tests/actors/test_engine_parallel.py looks at: one engine with two worker processes on CPUs, taken
through updates, until one of the two is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from core.errors import SnapshotError
from core.weights.shared import share
from tests.support.scenarios.engine_scenario import (
    SHORT,
    SLOTS,
    Generated,
    Scenario,
    updates_in_flight,
    weights,
)

LIMIT_S = 120.0
_PR_GET_PDEATHSIG = 2


class Report(msgspec.Struct):
    """Samples by phase, and what else was seen."""

    phases: dict[str, list[Generated]]
    num_workers: int = 0
    incomplete_error: str = ""
    death: str = ""
    num_left: int = -1
    memory_names: list[str] = []
    death_signals: list[int] = []


def workers(scenario: Scenario) -> list[psutil.Process]:
    """The processes that hold a part of the model."""
    executor = scenario.engine._engine.engine_core.engine_core.model_executor
    return [psutil.Process(worker.proc.pid) for worker in executor.workers]


def death_signal(worker: Any) -> int:
    """The signal that the kernel sends a worker when its parent dies (called where the worker is)."""
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(found))
    return found.value


def shared_memory() -> list[str]:
    """The files in memory that this process holds for its workers."""
    links = (os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path))
    return [link for link in links if "agro-weights" in link]


def main(model_dir: Path, out: Path) -> None:
    scenario = Scenario(model_dir, tensor_parallel=2)
    victims = workers(scenario)
    report = Report(scenario.phases, len(victims))
    scenario.fresh("version 0")
    scenario.submit_seeded("seeded", SHORT)
    scenario.submit_seeded("seeded again", SHORT)
    scenario.finish()
    updates_in_flight(scenario)
    scenario.fresh("version 1")
    shared = share(weights(model_dir, 2).items())
    scenario.engine.load_weights(2, shared)
    del shared
    scenario.fresh("version 2")
    report.memory_names = shared_memory()
    incomplete = [named for named in weights(model_dir, 6).items() if "layers.1.mlp" not in named[0]]
    try:
        scenario.engine.load_weights(6, incomplete)
    except SnapshotError as raised:
        report.incomplete_error = str(raised)
    report.death_signals = scenario.engine._engine.collective_rpc(death_signal)
    scenario.submit("killed", SHORT, SLOTS)
    os.kill(victims[0].pid, signal.SIGKILL)
    deadline_s = time.monotonic() + LIMIT_S
    try:
        while time.monotonic() < deadline_s:
            scenario.step(1)
    except Exception as raised:  # noqa: BLE001 -- whatever vLLM raises is what the test is about
        report.death = f"{type(raised).__name__}: {raised}"
    _, left = psutil.wait_procs(victims, timeout=LIMIT_S)
    report.num_left = len(left)
    out.write_bytes(msgspec.json.encode(report))
