"""A run's directory as the way in from another shell: requests in, status out, and what is said when
nobody is there.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buffer.ledger import Ledger
from cluster.cli import commands
from cluster.control import (
    CLOCKS_APART_S,
    MOST_ACTORS,
    Answer,
    Control,
    RunStatus,
    ask_for_actors,
    death_of_driver,
    read_status,
)
from core.errors import ConfigError, PeerTimeout
from core.machine import pid_space
from tests.support import ROOT
from tests.support.clocks.machine import machine_s

ACTORS = [
    {
        "name": "actor-0",
        "state": "running",
        "since_s": 61.2,
        "pid": 1,
        "note": "",
        "version": 12,
        "tokens_per_s": 1234.5,
    },
    {
        "name": "actor-1",
        "state": "waiting for placement",
        "since_s": 3.0,
        "pid": None,
        "note": "asks for 1 GPU; free now: 0 CPU",
    },
    {
        "name": "actor-2",
        "state": "gone",
        "since_s": 9.0,
        "pid": None,
        "note": "died: killed",
        "version": 3,
        "tokens_per_s": None,
    },
]


def status(state: str = "training", **changes: Any) -> RunStatus:
    given = {
        "name": "r",
        "state": state,
        "step": 7,
        "steps": 20,
        "actors": ACTORS,
        "buffer": {"buffer/groups": 5.0},
        "waits": {"x": 1.0},
    }
    return RunStatus(**{**given, **changes})


class Driver(threading.Thread):
    """Takes requests as the supervisor does, with a delay; `answers` makes the answer."""

    def __init__(self, run_dir: Path, answers: Callable[[Any], Answer]) -> None:
        super().__init__(daemon=True)
        self.told: list[str] = []
        self._control, self._answers, self._over = (
            Control(run_dir, self.told.append),
            answers,
            threading.Event(),
        )
        self._control.write(status())

    def run(self) -> None:
        while not self._over.wait(0.1):
            if request := self._control.take():
                self._control.answer(self._answers(request))
            if self._control.is_due():
                self._control.write(status())

    def __enter__(self) -> Driver:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self.join()


def test_a_request_is_taken_once_answered_by_its_id_and_shown_a_line_an_actor(
    tmp_path: Path, capsys: Any
) -> None:
    with Driver(
        tmp_path, lambda request: Answer(request.id, request.actors, ("actor-1",), ("actor-2",))
    ) as driver:
        start_s = machine_s()
        assert commands.scale(Namespace(run_dir=str(tmp_path), actors=2)) == 0
        assert machine_s() - start_s < 3
        first = read_status(tmp_path).answer
        answer, _ = ask_for_actors(tmp_path, 3)
        assert first is not None
        assert answer.id != first.id
        assert (answer.actors, answer.added) == (3, ("actor-1",))
    assert driver.told == []
    assert capsys.readouterr().out.splitlines() == [
        "r: 2 actors; 1 added, 1 retire",
        "  actor-0     running for 61 s, version 12, 1,234 tokens/s",
        "+ actor-1     waiting for placement for 3 s, asks for 1 GPU; free now: 0 CPU",
        "- actor-2     gone for 9 s, died: killed",
    ]


def test_a_refusal_is_one_error(tmp_path: Path) -> None:
    with (
        Driver(tmp_path, lambda request: Answer(request.id, request.actors, refused="the run is starting")),
        pytest.raises(ConfigError, match="not scaled: the run is starting"),
    ):
        commands.scale(Namespace(run_dir=str(tmp_path), actors=2))


@pytest.mark.parametrize("count", [0, -3, MOST_ACTORS + 1])
def test_a_count_that_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path: Path, count: int
) -> None:
    Control(tmp_path, print).write(status())
    with pytest.raises(ConfigError, match=f"--actors {count}: expected 1 to {MOST_ACTORS}"):
        ask_for_actors(tmp_path, count)
    assert not (tmp_path / "scale.json").exists()


def test_what_is_no_run_not_started_over_or_garbled_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        ask_for_actors(tmp_path / "nowhere", 2)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="has not started yet"):
        ask_for_actors(tmp_path, 2)
    Control(tmp_path, print).write(status("over", stopped="SIGTERM"))
    with pytest.raises(ConfigError, match=r"the run is over \(SIGTERM\)"):
        ask_for_actors(tmp_path, 2)
    (tmp_path / "status.json").write_text('{"name": 3')
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_status(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def write_as(run_dir: Path, **changes: Any) -> RunStatus:
    """A status written by another process, or host, or time."""
    known = {
        "pid": os.getpid(),
        "pid_space": pid_space(),
        "host": socket.gethostname(),
        "time": time.time(),
    }
    found = status(**{**known, **changes})
    (run_dir / "status.json").write_bytes(msgspec.json.encode(found))
    return found


def test_a_driver_that_is_gone_or_silent_is_named(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_as(tmp_path, pid=gone.pid)
    with pytest.raises(ConfigError, match=rf"its driver \(process {gone.pid}\) is gone"):
        ask_for_actors(tmp_path, 2)
    assert death_of_driver(tmp_path, write_as(tmp_path)) is None
    elsewhere = write_as(tmp_path, pid_space="another", host="another", pid=gone.pid)
    with pytest.raises(
        PeerTimeout, match=r"the driver of .* on another\) did not answer within 0 s"
    ) as caught:
        ask_for_actors(tmp_path, 2, timeout_s=0.3)
    assert "has not written status.json meanwhile; the request is taken back" in str(caught.value)
    assert not (tmp_path / "scale.json").exists()
    assert read_status(tmp_path) == elsewhere


def test_a_driver_is_judged_by_whether_its_status_changes_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.control.STALE_S", 0.3)
    monkeypatch.setattr("cluster.control.STALE_ELSEWHERE_S", 0.3)
    hangs = write_as(tmp_path, time=time.time() - 40)
    assert "has not written status.json for " in (death_of_driver(tmp_path, hangs) or "")
    another = {"pid_space": "another", "host": "another"}
    for behind_s in (-3000, 0, 3000):
        found = write_as(tmp_path, **another, time=time.time() - behind_s)
        assert "has not written status.json" in (death_of_driver(tmp_path, found) or "")
    long_ago = write_as(tmp_path, **another, time=time.time() - CLOCKS_APART_S - 5)
    monkeypatch.setattr("cluster.control.STALE_ELSEWHERE_S", float("inf"))
    assert "on another) has not written status.json for 36" in (death_of_driver(tmp_path, long_ago) or "")


def test_a_driver_elsewhere_is_waited_for_however_late_its_disk_shows_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = write_as(tmp_path, pid_space="another", time=time.time() - 3000, step=7)
    shown = iter([*[known] * 3, msgspec.structs.replace(known, step=8)])
    monkeypatch.setattr("cluster.control.read_status", lambda run_dir: next(shown))
    monkeypatch.setattr("cluster.control.POLL_S", 0.0)
    assert death_of_driver(tmp_path, known) is None
    assert not [*shown]


def test_a_request_meant_for_an_earlier_start_and_one_that_cannot_be_read_change_nothing(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    (tmp_path / "scale.json").write_text('{"id": "old", "actors": 4}')
    control = Control(tmp_path, told.append)
    assert control.take() is None
    new = tmp_path / "new"  # As `request_scaling` writes: in one go, another file each time.
    new.write_text('{"id": 3}')
    new.replace(tmp_path / "scale.json")
    assert control.take() is None
    assert len(told) == 1
    assert "scale.json is ignored" in told[0]
    new.write_text('{"id": "x", "actors": 4}')
    new.replace(tmp_path / "scale.json")
    request = control.take()
    assert request is not None
    assert request.actors == 4
    assert control.take() is None


def test_the_status_is_replaced_whole_every_second_and_an_answer_is_due_at_once(tmp_path: Path) -> None:
    now_s = [0.0]
    control = Control(tmp_path, print, clock=lambda: now_s[0])
    assert control.is_due()
    control.write(status(buffer={"buffer/groups": float("nan")}))
    assert not control.is_due()
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["pid"], found["host"], found["buffer"]) == (
        os.getpid(),
        socket.gethostname(),
        {"buffer/groups": None},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    control.answer(Answer("x", 2))
    assert control.is_due()
    control.write(status())
    now_s[0] = 1.0
    assert control.is_due()


def test_a_status_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "status.json").mkdir()
    control = Control(tmp_path, told.append)
    control.write(status())
    control.write(status())
    assert len(told) == 1


def test_status_shows_the_run_and_errs_when_nobody_drives_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as(tmp_path)
    assert commands.status(Namespace(run_dir=str(tmp_path))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"r training, step 7/20; driver {os.getpid()} on ")
    assert lines[3] == "  actor-2     gone for 9 s, died: killed"
    assert lines[4].startswith("buffer   groups 5,")
    monkeypatch.setattr("cluster.control.STALE_S", 0.1)
    write_as(tmp_path, time=time.time() - 100)
    with pytest.raises(ConfigError, match="has not written"):
        commands.status(Namespace(run_dir=str(tmp_path)))


def test_audit_prints_the_balance_and_fails_on_a_contradiction(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event, group_id in (("leased", 0), ("inserted", 0), ("leased", 1)):
        ledger.record(event, group_id, step=0)
    ledger.flush()
    command = [sys.executable, "launch.py", "audit", str(tmp_path)]
    clean = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert clean.returncode == 0, clean.stderr
    assert "2 generated = 0 trained + 1 buffered + 0 evicted + 0 failed + 1 in flight" in clean.stdout
    assert "no violations" in clean.stdout
    ledger.record("inserted", 0, step=0)
    ledger.close()
    broken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 1
    assert "1 violation\n" in broken.stdout
    assert "group 0 inserted when stored" in broken.stdout
    nowhere = subprocess.run(
        [*command[:-1], str(tmp_path / "no")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert nowhere.returncode == 2
    assert len(nowhere.stderr.splitlines()) == 1
