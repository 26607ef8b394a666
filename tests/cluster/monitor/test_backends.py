"""Back-ends of the monitor: each gets the rows, and none of them can harm the run."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.monitor import backends as backends_module
from cluster.monitor import monitor as monitor_module
from cluster.monitor.backends import TOLD_TRACKIO, Backends, Opened, check_backends, gauge_name
from cluster.monitor.curves import CURVES, GRAFANA_FILE, grafana_dashboard
from cluster.monitor.monitor import Monitor
from cluster.monitor.wandb_writer import mode_of
from core.config import Config
from core.errors import ConfigError
from core.metrics import METRICS
from tests.support.clocks.waits import until
from tests.support.configs import make_config
from tests.support.house import ROOT
from tests.support.monitored import rows_of


def config_with(*names: str) -> Config:
    return make_config(run={"name": "unit", "steps": 2}, monitor={"backends": list(names)})


class Recorded:
    """A back-end that keeps what it is given, and fails at the rows of `fails_at`."""

    def __init__(self, fails_at: float | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.is_closed = False
        self._fails_at = fails_at

    def log(self, row: Any) -> None:
        if row["progress/step"] == self._fails_at:
            raise OSError("no space left")
        self.rows.append(dict(row))

    def await_rows(self, count: int) -> None:
        until(lambda: len(self.rows) >= count)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened("unit", tmp_path, {"a": 1}, "project")


def test_each_gets_all_rows_and_one_that_fails_is_left_alone(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Recorded(), Recorded(fails_at=2)
    monkeypatch.setattr(backends_module, "_OPENERS", {"one": lambda _: good, "other": lambda _: bad})
    found = Backends(("wandb", "one", "other"), opened)
    for step in (1, 2, 3):
        found.log({"progress/step": step})
    assert found.close(60.0)
    assert [row["progress/step"] for row in good.rows] == [1, 2, 3]
    assert [row["progress/step"] for row in bad.rows] == [1]
    assert (good.is_closed, bad.is_closed) == (True, False)
    (failure,) = found.failures()
    assert failure.startswith("the back-end other failed (OSError: no space left)")
    assert found.failures() == []


def test_one_that_does_not_open_or_hangs_costs_the_others_nothing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Opened) -> Any:
        raise RuntimeError("no account")

    release = threading.Event()
    hanging, good = SimpleNamespace(log=lambda row: release.wait(), close=lambda: None), Recorded()
    openers = {"one": refused, "other": lambda _: hanging, "good": lambda _: good}
    monkeypatch.setattr(backends_module, "_OPENERS", openers)
    monkeypatch.setattr(backends_module, "QUEUE_ROWS", 1)
    found = Backends(("one", "other", "good"), opened)
    for step in range(10):
        found.log({"progress/step": step})
        good.await_rows(step + 1)
    assert found.dropped >= 8
    assert not found.close(0.05)
    until(lambda: good.is_closed)
    release.set()
    assert found.close(60.0)
    assert [row["progress/step"] for row in good.rows] == [*range(10)]
    told = found.failures()
    assert sum("no account" in failure for failure in told) == 1
    assert sum(failure.startswith("the back-end other takes no rows: 1 wait") for failure in told) == 1


def test_a_monitor_tells_that_a_back_end_loses_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    hanging = SimpleNamespace(log=lambda row: release.wait(), close=lambda: None)
    monkeypatch.setattr(backends_module, "_OPENERS", {"tensorboard": lambda _: hanging})
    monkeypatch.setattr(backends_module, "QUEUE_ROWS", 1)
    monitor = Monitor(make_config(run={"steps": 9}, monitor={"backends": ["tensorboard"]}), str(tmp_path))
    for step in range(1, 6):
        monitor.log_step({"progress/step": step})
    told = [event["text"] for event in monitor.view()["events"]]
    assert sum("the back-end tensorboard takes no rows" in text for text in told) == 1
    release.set()
    monitor.close({})


def test_a_run_writes_tensorboards_files_beside_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "WANDB_FINISH_S", 60.0)
    monitor = Monitor(config_with("tensorboard"), str(tmp_path))
    for step in (1, 2):
        monitor.log_step({"progress/step": step, "reward/mean": 0.5})
    monitor.close({})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    assert content.count(b"reward/mean") == len(rows_of(tmp_path)) == 2
    assert not (tmp_path / "wandb").exists()


def test_trackio_gets_a_run_that_goes_on(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fake = SimpleNamespace(
        init=lambda **named: calls.append(("init", named)),
        log=lambda row, step: calls.append(("log", row, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    found = Backends(("trackio",), opened)
    found.log({"progress/step": 7, "reward/mean": 0.5, "eval/solve_rate": None})
    assert found.close(60.0)
    name = f"unit-{opened.run_dir.name}"
    expected = {"project": "project", "name": name, "config": {"a": 1}, "resume": "allow"}
    assert calls == [("init", expected), ("log", {"progress/step": 7, "reward/mean": 0.5}, 7), ("finish",)]
    again = Backends(("trackio",), opened)  # From a checkpoint before.
    for step in (6, 7, 8):
        again.log({"progress/step": step})
    assert again.close(60.0)
    assert [call[2] for call in calls if call[0] == "log"] == [7, 8]
    (opened.run_dir / TOLD_TRACKIO).write_text("")  # A disk lost what was in it.
    once_more = Backends(("trackio",), opened)
    once_more.log({"progress/step": 9})
    assert once_more.close(60.0)
    assert (once_more.failures(), calls[-2]) == ([], ("log", {"progress/step": 9}, 9))
    assert (opened.run_dir / TOLD_TRACKIO).read_text() == "9"


def test_what_is_not_installed_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # type: ignore[arg-type]
    check_backends(config_with("wandb", "tensorboard", "prometheus"))
    with pytest.raises(ConfigError, match="trackio is not installed here"):
        check_backends(config_with("trackio"))


@pytest.mark.parametrize("value", [["tensorbord"], "wandb", ["wandb", "wandb"], [1], None])
def test_names_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.backends.*each once"):
        make_config(monitor={"backends": value})


def test_wandb_is_off_where_it_is_no_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode_of(config_with("wandb")) == "offline"
    assert mode_of(config_with("tensorboard")) == "disabled"


def test_the_dashboard_shows_gauges_that_there_are() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    shown = re.findall(r"ray_(agro_\w+)\{run=~\"\$run\"\}", " ".join(expressions))
    assert len(shown) == len(expressions) > 15
    assert {*shown} <= {gauge_name(name) for name in METRICS}
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"])


def test_the_committed_dashboard_is_current() -> None:
    committed = json.loads(GRAFANA_FILE.read_text(encoding="utf-8"))
    assert committed == grafana_dashboard(), "python -m cluster.monitor.curves writes it"
    assert {metric for curves in CURVES.values() for each in curves.values() for metric in each} <= set(
        METRICS
    )


def test_gauges_have_names_of_their_own() -> None:
    names = {gauge_name(name) for name in METRICS}
    assert len(names) == len(METRICS)
    assert gauge_name("mismatch/share_above_0.1") == "agro_mismatch_share_above_0_1"
