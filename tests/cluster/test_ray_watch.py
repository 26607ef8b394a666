"""Calls to peers: what fails is told in its own words, when it begins and when it ends, and nothing
that was started is lost.
"""

from __future__ import annotations

import collections
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from actors.prompts import PromptRow, PromptSet
from cluster import ray_watch, train
from cluster.deaths import Deaths
from cluster.health import FullDisk
from cluster.preparation.prepare import Inputs
from cluster.ray_watch import RayWatch
from cluster.session import without_onlookers
from cluster.signals import StopSignal
from cluster.summary import run_summary
from cluster.supervisor import Supervisor
from core.calls import Calls, Local
from core.errors import TrainingError
from core.monitor_client import MONITOR, MonitorClient
from core.troubles import QUIET_S, Troubles
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.configs import make_config

pytestmark = pytest.mark.timed


def test_what_fails_again_and_again_is_told_when_it_begins_and_when_it_has_been_well_for_a_while() -> None:
    now_s, told = 0.0, list[str]()
    troubles = Troubles(told.append, lambda: now_s)
    for _ in range(40):
        now_s += 1.0
        troubles.note("the disk refuses", "no space left\n")
        troubles.well("the disk refuses")  # It takes what is small, and refuses the next.
    assert told == ["the disk refuses: no space left"]
    now_s += QUIET_S
    troubles.well("another")
    troubles.well("the disk refuses")
    troubles.well("the disk refuses")
    assert told[1:] == ["the disk refuses: no more, after 40 failures in 39 s"]
    troubles.note("the disk refuses", "again")
    assert told[2:] == ["the disk refuses: again"]


def test_a_disk_that_takes_no_summary_is_an_event_not_a_traceback(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor: Any = object.__new__(Supervisor)
    supervisor._inputs, supervisor._ray = SimpleNamespace(run_dir=tmp_path), SimpleNamespace(cause="")
    monitor = MonitorClient(Local(SimpleNamespace(close=lambda summary: None)), MONITOR)
    supervisor._services = SimpleNamespace(monitor=monitor, calls=Calls(5.0), event=told.append)
    (tmp_path / "summary.json").mkdir()  # Cannot be removed as a file, as on a disk that went read-only.
    (tmp_path / "report.html").mkdir()
    supervisor._write_summary({"stopped": None})
    assert len(told) == 1
    assert "was not written" in told[0]


@pytest.mark.parametrize(
    ("first", "named"), [({"policy_written": 1.0}, True), ({"policy_written": 0.0}, False), ({}, False)]
)
def test_a_policy_that_an_earlier_start_wrote_is_not_called_this_ones(
    first: dict[str, float], named: bool, tmp_path: Path
) -> None:
    (tmp_path / "policy").mkdir()
    summary = run_summary(
        inputs(tmp_path),
        1.0,
        totals={"samples": 8.0, **first} if first else {},
        evaluations=[],
        stats=collections.defaultdict(float),
        deaths=Deaths(tmp_path),
        stopped=None,
    )
    assert summary["policy_dir"] == (str(tmp_path / "policy") if named else None)
    assert summary["environments"] == []


def test_a_full_disk_is_one_line_when_it_begins_and_one_with_the_count_when_it_ends(tmp_path: Path) -> None:
    now_s, told = 0.0, list[str]()
    disk = FullDisk(tmp_path, told.append, lambda: now_s)
    disk.judge({"buffer/disk_errors": 5.0, "buffer/changes_unwritten": 0.0})  # Of an earlier start.
    assert disk.sentence == ""
    for second in range(1, 90):
        now_s += 1.0
        disk.judge({"buffer/disk_errors": 5.0 + 3 * second, "buffer/changes_unwritten": float(second % 3)})
        assert str(tmp_path) in disk.sentence
    assert len(told) == 1
    assert "MB free" in told[0]
    for _ in range(10):
        now_s += 1.0
        disk.judge({"buffer/disk_errors": 272.0, "buffer/changes_unwritten": 0.0})
    assert told[1:] == [f"the disk of {tmp_path} takes all again: 267 writes were refused in 88 s"]
    assert disk.sentence == ""


def test_what_ray_raises_when_it_is_gone_is_told_by_who_watches_it(monkeypatch: Any) -> None:
    watch: Any = object.__new__(RayWatch)
    watch.cause, watch._is_obeyed = "", threading.Event()
    failure = RaySystemError("IOError: Broken pipe")
    monkeypatch.setattr(ray_watch, "LOOK_S", 0.1)
    assert str(watch.explained(failure)).startswith("Ray died: System error: IOError: Broken pipe")
    monkeypatch.setattr(ray_watch, "LOOK_S", 5.0)
    threading.Timer(0.05, lambda: setattr(watch, "cause", "the raylet is gone")).start()
    assert str(watch.explained(failure)) == "the raylet is gone"
    assert watch._is_obeyed.is_set()


def test_a_run_in_which_ray_fails_ends_with_a_sentence(monkeypatch: Any, tmp_path: Path) -> None:
    class Unlucky(Supervisor):
        def __init__(self, inputs: Inputs) -> None:
            self._ray: Any = SimpleNamespace(explained=lambda error: TrainingError("the raylet is gone"))

        def start(self, *arguments: Any) -> None:
            raise RaySystemError("IOError: Broken pipe")

        def finish(self, totals: list[dict[str, float]], stopped: str | None) -> dict[str, Any]:
            raise RaySystemError(f"once more after {stopped}")

        def close(self) -> None:
            pass

    monkeypatch.setattr(train, "Supervisor", Unlucky)
    monkeypatch.setattr(train, "begin_driver_log", lambda run_dir: None)
    monkeypatch.setattr(train, "ray_session", lambda *parts: contextlib.nullcontext())
    monkeypatch.setattr(train, "ask_ray", list)
    monkeypatch.setattr(train.placement, "check", lambda bundles, free: [])
    with pytest.raises(TrainingError, match=r"^the raylet is gone\n.*once more after the raylet is gone"):
        train._run(inputs(tmp_path), StopSignal())


# --- Over Ray ---


def inputs(run_dir: Path) -> Inputs:
    tree = {}
    prompts = PromptSet(
        [PromptRow(source_row=0, text="1+1=", token_ids=(1, 2), columns={"answer": "2"})], 0, "test"
    )
    config = make_config(tree)
    return Inputs(
        config=config,
        prompts=prompts,
        eval_prompts={"held_out": prompts},
        pad_id=0,
        run_dir=run_dir,
        wandb_mode="disabled",
    )


@pytest.fixture
def local_ray() -> Iterator[None]:
    with without_onlookers():
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


class NeverObeyed(threading.Event):
    """Of a watch whose main thread hangs, without the wait for it."""

    def wait(self, timeout: float | None = None) -> bool:
        return False


@pytest.fixture
def watches(local_ray: None) -> Iterator[list[RayWatch]]:
    """Stops what a test puts here: when Ray ends behind a failed test, a watch would end this process."""
    made: list[RayWatch] = []
    yield made
    for watch in made:
        watch.stop()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_a_dead_ray_ends_the_run_in_time_with_one_sentence_a_summary_and_a_report(
    victim: str, watches: list[RayWatch], tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    abandoned, codes = list[str](), list[int]()
    monkeypatch.setattr("cluster.supervisor.os._exit", codes.append)
    hanging = RayWatch(abandoned.append)
    hanging._is_obeyed = NeverObeyed()
    supervisor = Supervisor(inputs(tmp_path))
    watches.extend([hanging, supervisor._ray])
    while supervisor._services.stats.value is None or supervisor._services.view.value is None:
        supervisor.turn()
        time.sleep(0.1)
    assert supervisor._ray.cause == hanging.cause == ""
    node: Any = ray._private.worker._global_node
    node.all_processes[victim][0].process.kill()
    start_s = machine_s()
    until(lambda: supervisor._ray.cause, 60.0)
    with pytest.raises(TrainingError, match=victim) as caught:
        supervisor.turn()
    supervisor.finish([], str(caught.value))
    supervisor.close()
    assert machine_s() - start_s < 25.0
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] == str(caught.value)
    assert (tmp_path / "report.html").stat().st_size > 1000
    events = [json.loads(line)["text"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events.count(str(caught.value)) == 1
    assert len(str(caught.value).splitlines()) == 1
    until(lambda: abandoned, 60.0)  # Nobody obeyed: as when the main thread hangs.
    assert (abandoned, codes) == ([str(caught.value)], [])

    (tmp_path / "summary.json").unlink()
    supervisor._abandon("Ray is gone")
    assert codes == [2]
    assert capfd.readouterr().err.endswith("error: Ray is gone\n")
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] == "Ray is gone"
