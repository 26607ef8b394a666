"""`launch.py why`: on runs that go on, are over, were killed, and on what is no run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.cli.why import why
from cluster.control import RunStatus
from cluster.deaths import ACTOR, BOARD, Deaths
from core.causes import Cause
from core.errors import ConfigError
from core.machine import pid_space
from core.processes import Whereabouts
from core.text import bounded, headline
from tests.support import ROOT
from tests.support.clocks.machine import machine_s


def status(**changes: Any) -> RunStatus:
    fields: dict[str, Any] = {
        "name": "unit",
        "state": "training",
        "step": 12,
        "steps": 100,
        "actors": [{"name": "actor-1", "state": "running", "since_s": 3.0}],
        "buffer": {},
        "waits": {},
        "pid": os.getpid(),
        "pid_space": pid_space(),
        "host": socket.gethostname(),
        "time": time.time(),
    }
    return RunStatus(**{**fields, **changes})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("run: {}\n")
    (tmp_path / "logs").mkdir()
    header = "===== actor-0: process 71 on node7 since now\n"
    (tmp_path / "logs" / "actor-0.log").write_text(f"{header}CUDA error: out of memory\n")
    (tmp_path / "logs" / "actor-1.log").write_text(
        "===== actor-1: process 72 on node7 since now\nall is well\n"
    )
    (tmp_path / "logs" / "driver.log").write_text(
        "===== driver: process 1 on node7 since now\nthe last event\n"
    )
    return tmp_path


def die(run_dir: Path) -> None:
    deaths = Deaths(run_dir)
    deaths.step = 7
    deaths.note(
        ACTOR,
        "actor-0",
        Cause("exit code", "its process ended with exit code 3 (pid 71)", 3),
        where=Whereabouts("node", 71, "node7"),
        noticed="its run() ended",
        held="4 leases on prompts",
        done="its leases were handed out again; actor-0.1 took its place",
    )
    deaths.note(BOARD, "board", Cause("signal", "its process was killed", 9))


def write(run_dir: Path, status: RunStatus) -> None:
    (run_dir / "status.json").write_bytes(msgspec.json.encode(status))


def test_a_run_that_goes_on_tells_its_deaths_in_order_with_their_words(run_dir: Path) -> None:
    write(run_dir, status())
    die(run_dir)
    text = "\n".join(why(run_dir))
    wanted = [
        "unit: training, step 12/100",
        "after step 7: actor-0, a rollout actor, died: its process ended with exit code 3 (pid 71).",
        "Noticed: its run() ended.",
        "It held: 4 leases on prompts.",
        "What was done: its leases were handed out again; actor-0.1 took its place. This was death 1 of the 5 within 5 min",
        "Its last words, in logs/actor-0.log:\n     | CUDA error: out of memory",
        "board died: its process was killed.",
        "The run goes on; its driver",
    ]
    places = [text.find(words) for words in wanted]
    assert -1 not in places, text
    assert places == sorted(places)


def test_one_process_its_successors_and_a_kind_are_found_by_name(run_dir: Path) -> None:
    write(run_dir, status())
    die(run_dir)
    assert "1. " in why(run_dir, "actor-0")[0]
    assert len(why(run_dir, "rollout actor")) == len(why(run_dir, "actor-0"))
    assert "board died" in why(run_dir, "board")[0]
    alive = "\n".join(why(run_dir, "actor-1"))
    assert "actor-1 has not died" in alive
    assert "all is well" in alive
    with pytest.raises(
        ConfigError, match="no actor-9 has died or is there; known are actor-0, actor-1, board"
    ):
        why(run_dir, "actor-9")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state": "over", "step": 100}, "The run finished in order at step 100."),
        (
            {"state": "over", "stopped": "SIGTERM"},
            "The run was ended by SIGTERM, in order, after step 12. The same command with run.dir=",
        ),
        (
            {"state": "over", "stopped": "board died 5 times"},
            "ended with an error after step 12: board died 5 times.\nMend the cause first",
        ),
        ({"pid": 2**22 + 1}, "The run did not end in order: its driver (process 4194305) is gone"),
        ({"host": "elsewhere", "pid_space": "", "time": 1.0}, "has not written status.json for"),
    ],
)
def test_how_a_run_ended_is_said(run_dir: Path, changes: dict[str, Any], expected: str) -> None:
    write(run_dir, status(**changes))
    text = "\n".join(why(run_dir))
    assert "No process of this run has died." in text
    assert expected in text
    assert ("the last event" in text) == ("state" not in changes)


def test_the_cause_of_an_error_is_told_whole_and_is_to_be_mended_first(run_dir: Path) -> None:
    cause = "30 of the last 64 samples got no reward. The last errors:\n  f raised A\n  f raised B"
    write(run_dir, status(state="over", stopped=cause))
    text = "\n".join(why(run_dir))
    assert (
        "after step 12: 30 of the last 64 samples got no reward. The last errors:\n  | f raised A\n" in text
    )
    assert "  | f raised B\nMend the cause first; then the same command with run.dir=" in text
    assert text.endswith("begins at step 0: it has no checkpoint yet.")
    (run_dir / "config.yaml").write_text("checkpoint:\n  every: 0\n")
    assert why(run_dir)[-1].endswith(
        "with another run.dir begins anew: this run keeps no checkpoints (checkpoint.every = 0)."
    )
    (run_dir / "checkpoints" / "step-000010").mkdir(parents=True)
    Deaths(run_dir).note_end(cause)
    text = "\n".join(why(run_dir))
    assert (
        "the run ended: 30 of the last 64 samples got no reward. The last errors:\n     | f raised A\n"
        in text
    )
    assert "samples got no reward. The last errors: f raised A ...\nMend the cause first" in text
    assert text.endswith("goes on from the newest checkpoint.")


def test_a_cause_is_bounded_and_its_line_is_a_whole_one() -> None:
    cause = "no reward. The last errors:\n  f raised A\n  f raised B"
    assert bounded(cause) == cause
    assert headline(cause) == "no reward. The last errors: f raised A ..."
    assert headline("no reward. The last errors:") == "no reward. The last errors."
    assert [headline(text) for text in ("boom\nits last words", "")] == ["boom", ""]
    assert bounded("line\n" * 50) == "line\n" * 11 + "line ..."
    assert len(bounded("x" * 5000)) == 1004


def test_a_run_that_was_refused_or_has_not_begun_says_so(run_dir: Path) -> None:
    assert "It has not written a status yet." in why(run_dir)
    (run_dir / "config.yaml").rename(run_dir / "config-refused.yaml")
    assert "It was refused before anything was done." in why(run_dir)


def test_what_is_no_run_or_is_garbled_is_one_line_and_fast(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "deaths.jsonl").write_bytes(b'\xff\xfe nothing\n{"kind": 3}\n[]\n')
    assert "No process of this run has died." in why(run_dir)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (run_dir / "status.json").write_text("{")
    for directory, words in (
        (foreign, "is no run directory"),
        (tmp_path / "none", "is no run"),
        (run_dir, "cannot be read"),
    ):
        command = [sys.executable, "launch.py", "why", str(directory)]
        start_s = machine_s()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert machine_s() - start_s < 5.0
        assert done.returncode == 2
        assert done.stdout == ""
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_neither_ray_nor_torch_is_loaded_for_it(run_dir: Path) -> None:
    write(run_dir, status())
    die(run_dir)
    program = "import sys, launch; sys.argv[1:] = ['why', sys.argv[1]]; launch.main(); print({'ray', 'torch'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
