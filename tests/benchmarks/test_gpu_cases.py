"""A case of benchmarks/gpu that takes too long is ended, with all that it has started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import psutil

from benchmarks.gpu.__main__ import Case, run_case
from benchmarks.processes import end_session

STARTS_OTHERS = """
trap '' TERM
setsid sleep 600 & echo $! >> "$1"
sleep 600 & echo $! >> "$1"
echo $$ >> "$1"
while true; do sleep 1; done
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_ignores_sigterm_or_has_a_session_of_its_own_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    process = subprocess.Popen(
        ["bash", "-c", STARTS_OTHERS, "bash", str(pids)],
        env={**os.environ, "AGRO_MARK": str(tmp_path)},
        text=True,
        start_new_session=True,
    )
    deadline_s = time.monotonic() + 60
    while not pids.exists() or len(pids.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    started = [int(line) for line in pids.read_text().splitlines()]
    assert all(map(lives, started))
    end_session(process, f"AGRO_MARK={tmp_path}", grace_s=0.2)
    deadline_s = time.monotonic() + 60
    while any(map(lives, started)):  # The kernel ends them when it gets to it.
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert process.returncode == -9


def test_what_ends_at_sigterm_is_not_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"], text=True, start_new_session=True)
    end_session(process, f"AGRO_MARK={tmp_path}", grace_s=600.0)
    assert process.returncode == -15
    end_session(process, f"AGRO_MARK={tmp_path}", grace_s=600.0)


def test_a_case_that_takes_too_long_says_so_and_is_gone() -> None:
    found = run_case(Case("row-softmax", "", timeout_s=0.0), on_cpu=True)
    assert found == {"ok": False, "found": "it took more than 0 s"}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert "row-softmax" not in child.cmdline()
