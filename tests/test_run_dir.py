"""The run directory: new, in use, finished, continued, contradicted."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from cluster import run_dir
from cluster.config import Config
from cluster.config_file import load_config
from cluster.errors import ConfigError
from cluster.run_dir import open_run_dir

EXAMPLE = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def make_config(path: Path, *overrides: str) -> Config:
    return load_config(EXAMPLE, [f"run.dir={path}", *overrides])


@pytest.fixture(autouse=True)
def locks_end_with_the_test() -> Any:
    yield
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())


def reopened(path: Path, *overrides: str) -> run_dir.RunDir:
    """As a new process would: the lock of the first one is gone."""
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())
    return open_run_dir(make_config(path, *overrides))


def test_a_new_directory_holds_the_resolved_config(tmp_path: Path) -> None:
    opened = open_run_dir(make_config(tmp_path / "run"))
    assert (opened.is_continued, opened.notes) == (False, ())
    assert load_config(opened.path / "config.yaml") == make_config(tmp_path / "run")


def test_an_unfinished_run_is_continued_and_changes_are_told_and_kept(tmp_path: Path) -> None:
    open_run_dir(make_config(tmp_path / "run"))
    opened = reopened(tmp_path / "run", "learner.lr=1e-3", "run.steps=900")
    assert opened.is_continued
    (note,) = opened.notes
    assert "with changes: learner.lr 0.00015 -> 0.001 (before: config-1.yaml)" in note
    assert load_config(opened.path / "config.yaml").learner.lr == 1e-3
    assert load_config(opened.path / "config-1.yaml").learner.lr == 1.5e-4
    assert "changes" not in reopened(tmp_path / "run", "learner.lr=1e-3").notes[0]


def test_another_process_is_kept_out_until_the_holder_has_died(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold() -> None:
        open_run_dir(make_config(tmp_path / "run"))
        there.send("open")
        there.recv()

    process = context.Process(target=hold)
    process.start()
    assert here.recv() == "open"
    with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on"):
        open_run_dir(make_config(tmp_path / "run"))
    process.kill()
    process.join()
    assert open_run_dir(make_config(tmp_path / "run")).is_continued


@pytest.mark.parametrize(
    ("summary", "steps", "refused"),
    [
        ({"steps": 800, "stopped": None}, 800, True),
        ({"steps": 800, "stopped": None}, 1000, False),
        ({"steps": 300, "stopped": "SIGTERM"}, 800, False),
        ({"steps": None, "stopped": "a learner rank died"}, 800, False),
    ],
)
def test_only_a_finished_run_is_not_continued(tmp_path: Path, summary: dict[str, Any], steps: int, refused: bool) -> None:
    open_run_dir(make_config(tmp_path / "run"))
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    if refused:
        with pytest.raises(ConfigError, match=r"already holds a finished run of 800 steps\. Raise run\.steps"):
            reopened(tmp_path / "run", f"run.steps={steps}")
    else:
        assert reopened(tmp_path / "run", f"run.steps={steps}").is_continued


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=7", "already holds a run with run.seed = 0, now 7"),
        ("model.path=elsewhere", "model.path = '.cache/arithmetic-base', now 'elsewhere'"),
        ("buffer.num_shards=2", "buffer.num_shards = 1, now 2"),
    ],
)
def test_what_the_run_is_about_cannot_change(tmp_path: Path, override: str, message: str) -> None:
    open_run_dir(make_config(tmp_path / "run"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        reopened(tmp_path / "run", override)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_run_without_checkpoints_is_not_continued(tmp_path: Path) -> None:
    open_run_dir(make_config(tmp_path / "run", "checkpoint.every=0"))
    with pytest.raises(ConfigError, match="without checkpoints"):
        reopened(tmp_path / "run")


def test_a_place_that_cannot_be_written_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir = /proc/nothing/run cannot be used"):
        open_run_dir(make_config(Path("/proc/nothing/run")))
