"""Whole runs whose actors come and go: scaled from another shell, killed all at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buffer.ledger import audit_run
from tests.support.clocks.machine import machine_s
from tests.support.runs import (
    ROOT,
    check_ends_in_order,
    environment,
    processes_of,
    rows_of,
    running_actors,
    start_train,
    wait_for_end,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """A command from another shell."""
    return subprocess.run(
        [sys.executable, "launch.py", *words],
        cwd=ROOT,
        env=environment(),
        timeout=120,
        capture_output=True,
        text=True,
    )


def wait_for_actors(
    process: subprocess.Popen[str], run_dir: Path, *names: str, timeout_s: float = 150
) -> None:
    """Until these run, and no other."""
    deadline_s = time.monotonic() + timeout_s
    while running_actors(run_dir).keys() != set(names):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, launch("status", str(run_dir)).stdout
        time.sleep(0.2)


def wait_for_status(run_dir: Path, pattern: str, timeout_s: float = 120) -> None:
    """Until a line of `launch.py status` is so: a run writes its status once a second."""
    deadline_s = time.monotonic() + timeout_s
    while not re.search(pattern, shown := launch("status", str(run_dir)).stdout, re.MULTILINE):
        assert time.monotonic() < deadline_s, shown


def check_nothing_is_lost(run_dir: Path) -> None:
    """The ledger has no contradiction, nothing is in flight after the end, and every step had its whole
    batch.
    """
    result = launch("audit", str(run_dir))
    assert result.returncode == 0, result.stdout
    assert "no violations" in result.stdout
    found = audit_run(run_dir)
    assert found["balance"].endswith(" 0 in flight")
    steps = [row["progress/step"] for row in rows_of(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    # learner.groups_per_step; a batch may have been handed out and not used.
    assert found["events"]["trained"] >= 8 * len(steps)
    assert found["max_staleness"] <= 16


def test_scaling_one_to_three_to_one_from_another_shell_and_sigterm_lose_nothing(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start_train(tiny_models["tied"], run_dir, 100_000)
    wait_for_step(process, run_dir, 2)
    wait_for_actors(process, run_dir, "actor-0")
    before = len(rows_of(run_dir))
    more = launch("scale", str(run_dir), "--actors", "3")
    assert more.returncode == 0, more.stderr
    assert "3 actors; 2 added, 0 retire" in more.stdout
    assert re.search(r"^\+ actor-2 +(waiting for placement|loading)", more.stdout, re.MULTILINE)
    wait_for_actors(process, run_dir, "actor-0", "actor-1", "actor-2")
    between = len(rows_of(run_dir))
    assert between > before + 1  # The learner went on while they loaded.
    fewer = launch("scale", str(run_dir), "--actors", "1")
    assert re.search(r"^- actor-2 +retiring", fewer.stdout, re.MULTILINE), fewer.stdout + fewer.stderr
    wait_for_actors(process, run_dir, "actor-0")
    wait_for_step(process, run_dir, len(rows_of(run_dir)) + 5)
    wait_for_status(run_dir, r"^ +actor-1 +gone for .* retired$")
    check_ends_in_order(process, run_dir, "SIGTERM", 143)
    check_nothing_is_lost(run_dir)
    events = " ".join(event["text"] for event in rows_of(run_dir, "events"))
    assert "scaled from 1 to 3 actors, as asked: actor-1, actor-2 added" in events
    assert "died" not in events
    assert "the run is over (SIGTERM)" in launch("scale", str(run_dir), "--actors", "2").stderr


def test_all_actors_killed_the_learner_waits_and_goes_on_and_a_killed_driver_leaves_no_process(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start_train(tiny_models["tied"], run_dir, 100_000, "actors.count=2")
    wait_for_step(process, run_dir, 2)
    wait_for_actors(process, run_dir, "actor-0", "actor-1")
    for pid in running_actors(run_dir).values():
        os.kill(pid, signal.SIGKILL)
    killed_s, deadline_s = machine_s(), time.monotonic() + 60
    while not any("actor-1 died" in event["text"] for event in rows_of(run_dir, "events")):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert machine_s() - killed_s < 3.0
    wait_for_actors(process, run_dir, "actor-0.1", "actor-1.1")
    wait_for_step(process, run_dir, len(rows_of(run_dir)) + 5)
    family = processes_of([process.pid])
    process.kill()
    process.communicate(timeout=120)
    assert wait_for_end(family) == []
    found, rows = audit_run(run_dir), rows_of(run_dir)
    assert found["violations"] == []
    assert [row["progress/step"] for row in rows] == list(range(1, len(rows) + 1))
    assert found["events"]["trained"] >= 8 * len(rows)
    assert found["max_staleness"] <= 16
    events = [event["text"] for event in rows_of(run_dir, "events")]
    assert sum(" died, restarted as " in text for text in events) == 2  # Each once.
    assert any("all actors are dead; the learner waits" in text for text in events)
    assert any(text.startswith("the learner goes on: step") for text in events)
