"""A run that is continued: each step once, in metrics.jsonl and in what `wandb sync` uploads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from cluster.monitor import wandb_file
from cluster.monitor.monitor import Monitor
from cluster.monitor.wandb_writer import WandbMode
from core import metrics
from core.evaluation.records import Evaluation
from core.json_lines import read_json_lines
from tests.support import ROOT
from tests.support.configs import make_config

DRIVER = """
import sys, time, pathlib, tests.cluster.monitor.test_wandb_writer_continued as this
monitor = this.log_steps(pathlib.Path(sys.argv[1]), 1, 9)
print(flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "SAMPLES_EVERY_STEPS", metrics.SAMPLES_EVERY_STEPS)  # Is set back.
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "run" / "wandb" / "data"))


def make_monitor(run_dir: Path, mode: WandbMode) -> Monitor:
    metrics.SAMPLES_EVERY_STEPS = 4  # Also in the process that a test starts.
    return Monitor(make_config(run={"name": "unit", "steps": 100}), str(run_dir), wandb=mode)


def log_steps(
    run_dir: Path, first: int, last: int, offset: float = 0.0, mode: WandbMode = "offline"
) -> Monitor:
    """A monitor that was told of these steps, and of samples at the first and every fourth."""
    monitor = make_monitor(run_dir, mode)
    for step in range(first, last + 1):
        monitor.log_step({"progress/step": step, "reward/mean": step / 10 + offset})
        if step == 1 or step % 4 == 0:
            monitor.log_samples(
                step,
                [{"version": 0, "prompt": f"p{step}", "completion": "c", "reward": offset, "error": None}]
                * 2,
            )
    return monitor


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def synced(run_dir: Path) -> list[dict[str, Any]]:
    """What `wandb sync` finds in the run directory, in its order."""
    return [
        row
        for file in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
        for row in wandb_file.history(file)
    ]


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["progress/step"] for row in rows]


@pytest.mark.slow
def test_an_offline_run_that_was_killed_and_continued_is_one_curve_in_every_file(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        deadline_s = time.monotonic() + 60
        while steps_of(synced(run_dir)) != list(range(1, 10)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        driver.kill()
    assert steps_of(synced(run_dir)) == list(range(1, 10))  # On disk soon, not when the run ends.
    earlier = list(run_dir.glob("wandb/offline-run-*"))

    log_steps(run_dir, 6, 12, offset=100.0).close({})  # From a checkpoint of step 5: 6 to 9 are done again.
    assert steps_of(synced(run_dir)) == list(range(1, 13))
    assert [row["reward/mean"] for row in synced(run_dir)] == [
        step / 10 + 100.0 * (step > 5) for step in range(1, 13)
    ]
    assert [row["_step"] for row in synced(run_dir)] == list(range(12))
    assert steps_of([row for row in synced(run_dir) if "samples/path" in row]) == [1, 4, 8, 12]
    assert steps_of(rows_of(run_dir)) == list(range(1, 13))
    samples = read_json_lines(run_dir / "samples.jsonl")[0]
    assert [(sample["step"], sample["reward"]) for sample in samples] == [(1, 0.0)] * 2 + [(4, 0.0)] * 2 + [
        (8, 100.0)
    ] * 2 + [(12, 100.0)] * 2
    assert not any(directory.exists() for directory in earlier)

    # Stopped before its first step, and without the run's own files: W&B's are enough, and nothing is lost.
    (run_dir / "metrics.jsonl").unlink()
    make_monitor(run_dir, "offline").close({})
    assert steps_of(synced(run_dir)) == list(range(1, 13))


class FakeRun:
    """A W&B run that notes what it is given; with `newest_step` one that a server knows up to there."""

    def __init__(self, newest_step: int | None = None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.resumed = newest_step is not None
        self.summary: dict[str, Any] = {"progress/step": newest_step}

    def define_metric(self, *args: Any, **options: Any) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        pass

    def steps(self) -> list[int]:
        return steps_of(self.logged)


def test_an_online_run_that_is_continued_gets_what_it_lacks_and_no_step_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_steps(tmp_path, 1, 4, mode="disabled").close({})
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run, seen = FakeRun(newest_step=3), {}
    monkeypatch.setattr(wandb, "init", lambda **options: seen.update(options) or run)
    log_steps(tmp_path, 3, 6, mode="online").close({})
    assert seen["resume"] == "allow"
    assert run.steps() == [4, 5, 6]


def test_what_the_server_lacks_of_earlier_starts_is_sent_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_steps(tmp_path, 1, 4, mode="disabled").close({})
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = FakeRun(newest_step=2)
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    log_steps(tmp_path, 5, 6, mode="online").close({})
    assert run.steps() == [3, 4, 5, 6]


def test_a_learner_that_goes_back_to_a_checkpoint_within_a_run_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    monitor = log_steps(tmp_path, 1, 6)
    for step in (3, 4, 5, 6, 7):
        monitor.log_step({"progress/step": step, "reward/mean": 9.0})
    monitor.close({})
    assert [row["reward/mean"] for row in rows_of(tmp_path)] == [0.1, 0.2, 9.0, 9.0, 9.0, 9.0, 9.0]
    assert run.steps() == [1, 2, 3, 4, 5, 6, 7]
    assert steps_of([row for row in run.logged if "samples" in row]) == [1, 4]


def test_an_evaluation_is_a_table_of_its_suite_with_whole_conversations_once_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(monitor: Monitor, version: int) -> None:
        evaluation = Evaluation(
            suite="sums",
            policy_version=version,
            solve_rate=0.5,
            num_problems=1,
            num_samples=1,
            num_errors=0,
            metrics={},
        )
        talk = [["assistant", "2+3"], ["tool", "5"], ["assistant", f"5 at {version}"]]
        sample = {"suite": "sums", "step": version, "prompt": "q", "completion": "5", "transcript": talk}
        monitor.log_evaluation(evaluation, [{**sample, "turns": 2, "tool_calls": 1}])

    def tables(run: FakeRun) -> dict[int, str]:
        name = "eval/sums/samples"
        found = {row["progress/step"]: row[name] for row in run.logged if name in row}
        return {step: table.data[0][table.columns.index("conversation")] for step, table in found.items()}

    first, second = FakeRun(), FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: first)
    monitor = log_steps(tmp_path, 1, 2)
    evaluated(monitor, 2)
    monitor.log_step({"progress/step": 3, "reward/mean": 0.3})
    evaluated(monitor, 3)  # No row comes any more.
    monitor.close({})
    assert list(tables(first)) == [3]
    last = tables(first)[3]
    assert last.startswith("[assistant]\n2+3\n\n[tool]\n5\n\n")

    monkeypatch.setattr(wandb, "init", lambda **options: second)
    log_steps(tmp_path, 4, 5).close({})
    assert tables(second) == {3: last.replace("at 3", "at 2"), 4: last}
