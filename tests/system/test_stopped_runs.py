"""Whole runs that are stopped by signals: they end in order, and leave no process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support.clocks.machine import machine_s
from tests.support.runs import check_ends_in_order, processes_of, start_train, wait_for_end, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def test_ctrl_c_ends_the_run_in_order_and_leaves_no_process(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    process = start_train(tiny_models["tied"], tmp_path / "run", 5000)
    wait_for_step(process, tmp_path / "run", 3)
    check_ends_in_order(process, tmp_path / "run", "SIGINT", 130)


def test_a_hangup_while_the_processes_load_is_answered_at_once_and_ends_in_order(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    process = start_train(tiny_models["tied"], tmp_path / "run", 5000)
    assert process.stdout is not None
    assert process.stderr is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("starting the processes"):
            break
    assert [line.split()[0] for line in told] == [
        "reading",
        "loading",
        "starting",
        "reading",
        "run",
        "starting",
    ], told
    family = processes_of([process.pid])
    process.send_signal(signal.SIGHUP)
    start_s = machine_s()
    line = next(line for line in process.stderr if line.startswith("SIGHUP"))
    assert machine_s() - start_s < 1.0
    assert "ending in order" in line
    out, err = process.communicate(timeout=120)
    assert process.returncode == 129, out + err
    assert "stopped: SIGHUP" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "SIGHUP"
    assert wait_for_end(family) == []
