"""The run directory: new, in use, finished, continued, contradicted."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.preparation import run_dir
from cluster.preparation.run_dir import check_run_dir, kept_if_begun, open_run_dir
from core.config import Config
from core.errors import ConfigError, PlacementError
from learner.catalogue import load_config
from learner.checkpoints.checkpoint import (
    STATE_NAME,
    CheckpointManifest,
    FileEntry,
    checkpoint_name,
    checkpoint_root,
    rank_file,
    write_file,
    write_manifest,
)
from tests.support import ROOT
from tests.support.configs import quickstart

EXAMPLE = ROOT / "configs" / "quickstart.yaml"


def config_at(path: Path, *overrides: str) -> Config:
    return quickstart(f"run.dir={path}", *overrides)


@pytest.fixture(autouse=True)
def locks_end_with_the_test() -> Any:
    yield
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())


def reopened(path: Path, *overrides: str) -> run_dir.RunDir:
    """As a new process would: the lock of the first one is gone."""
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())
    return open_run_dir(config_at(path, *overrides))


def test_a_new_directory_holds_the_resolved_config(tmp_path: Path) -> None:
    opened = open_run_dir(config_at(tmp_path / "run"))
    assert (opened.is_continued, opened.notes) == (False, ())
    assert load_config(opened.path / "config.yaml") == config_at(tmp_path / "run")


def test_an_unfinished_run_is_continued_and_changes_are_told_and_kept(tmp_path: Path) -> None:
    open_run_dir(config_at(tmp_path / "run"))
    opened = reopened(tmp_path / "run", "learner.lr=1e-3", "run.steps=900")
    assert opened.is_continued
    (note,) = opened.notes
    assert "with changes: learner.lr 0.00015 -> 0.001 (before: config-1.yaml)" in note
    assert load_config(opened.path / "config.yaml").learner.lr == 1e-3
    assert load_config(opened.path / "config-1.yaml").learner.lr == 1.5e-4
    assert "changes" not in reopened(tmp_path / "run", "learner.lr=1e-3").notes[0]


def test_a_run_that_goes_on_with_another_objective_says_so(tmp_path: Path) -> None:
    open_run_dir(config_at(tmp_path / "run"))
    (note,) = reopened(tmp_path / "run", "objective.name=grpo").notes
    assert "objective.name 'agro' -> 'grpo'" in note
    assert "objective.target 'mean' -> None" in note
    assert "objective.clip_low None -> 0.2" in note


def test_another_process_is_kept_out_until_the_holder_has_died(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold() -> None:
        open_run_dir(config_at(tmp_path / "run"))
        there.send("open")
        there.recv()

    process = context.Process(target=hold)
    process.start()
    assert here.recv() == "open"
    with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on"):
        open_run_dir(config_at(tmp_path / "run"))
    process.kill()
    process.join()
    assert open_run_dir(config_at(tmp_path / "run")).is_continued


@pytest.mark.parametrize(
    ("summary", "steps", "refused"),
    [
        ({"steps": 800, "stopped": None}, 800, True),
        ({"steps": 800, "stopped": None}, 1000, False),
        ({"steps": 300, "stopped": "SIGTERM"}, 800, False),
        ({"steps": None, "stopped": "a learner rank died"}, 800, False),
    ],
)
def test_only_a_finished_run_is_not_continued(
    tmp_path: Path, summary: dict[str, Any], steps: int, refused: bool
) -> None:
    open_run_dir(config_at(tmp_path / "run"))
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    if refused:
        with pytest.raises(
            ConfigError,
            match=r"already holds a finished run of 800 steps\. Raise "
            r"run\.steps",
        ):
            reopened(tmp_path / "run", f"run.steps={steps}")
    else:
        assert reopened(tmp_path / "run", f"run.steps={steps}").is_continued


def save_checkpoint(run_dir: Path, step: int, manifest_step: int | None = None) -> Path:
    """A checkpoint of one rank whose bytes are not those written, of the same size."""
    directory = checkpoint_root(run_dir) / checkpoint_name(step)
    directory.mkdir(parents=True)
    (directory / rank_file(0)).touch()
    entry = FileEntry(rank_file(0), 0, "of other bytes")
    files = (entry, write_file(directory / STATE_NAME, b"{}"))
    manifest = CheckpointManifest(format=1, step=manifest_step or step, world_size=1, tensors=(), files=files)
    write_manifest(directory, manifest)
    return directory


@pytest.mark.parametrize("ask", [open_run_dir, check_run_dir])
def test_fewer_steps_than_a_stopped_run_has_done_are_refused_and_leave_its_record_as_it_is(
    tmp_path: Path, ask: Any
) -> None:
    path = tmp_path / "run"
    open_run_dir(config_at(path, "run.steps=3000"))
    save_checkpoint(path, 686)
    (path / "summary.json").write_text(json.dumps({"steps": 686, "stopped": "SIGINT"}))
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix in (".json", ".yaml")}
    with pytest.raises(ConfigError, match=r"run\.steps = 600, but the run in .* has done 686 steps already"):
        ask(config_at(path, "run.steps=600"))
    assert before == {
        file.name: file.read_bytes() for file in path.iterdir() if file.suffix in (".json", ".yaml")
    }
    assert reopened(path, "run.steps=686").is_continued


def test_the_steps_done_are_those_of_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    open_run_dir(config_at(tmp_path / "run", "run.steps=3000"))
    save_checkpoint(tmp_path / "run", 500)
    save_checkpoint(tmp_path / "run", 650, manifest_step=640)
    (save_checkpoint(tmp_path / "run", 686) / STATE_NAME).unlink()
    with pytest.raises(ConfigError, match="has done 500 steps already"):
        reopened(tmp_path / "run", "run.steps=499")
    assert reopened(tmp_path / "run", "run.steps=600").is_continued


def test_a_run_that_ended_at_its_target_goes_on_with_another_one(tmp_path: Path) -> None:
    reached, higher = ("eval.stop_at=[held_out/avg@4, 0.9]", "eval.stop_at=[held_out/avg@4, 0.95]")
    open_run_dir(config_at(tmp_path / "run", reached))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": 300, "stopped": None}))
    with pytest.raises(ConfigError, match=r"ended after 300 steps at its target, eval\.stop_at = \['held"):
        reopened(tmp_path / "run", reached)
    assert reopened(tmp_path / "run", higher).is_continued


def test_a_run_that_did_not_reach_its_target_in_all_its_steps_goes_on_with_more(tmp_path: Path) -> None:
    target = "eval.stop_at=[held_out/avg@4, 0.9]"
    open_run_dir(config_at(tmp_path / "run", target, "run.steps=300"))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": 300, "stopped": None}))
    assert reopened(tmp_path / "run", target, "run.steps=400").is_continued


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=7", "already holds a run with run.seed = 0, now 7"),
        ("model.path=elsewhere", "model.path = '.cache/arithmetic-base', now 'elsewhere'"),
        ("buffer.num_shards=2", "buffer.num_shards = 1, now 2"),
        ("actors.top_p=0.9", "actors.top_p = 1.0, now 0.9"),
    ],
)
def test_what_the_run_is_about_cannot_change(tmp_path: Path, override: str, message: str) -> None:
    open_run_dir(config_at(tmp_path / "run"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        reopened(tmp_path / "run", override)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_curriculum_may_come_and_go_unless_prompts_are_dealt_to_shards_for_it(tmp_path: Path) -> None:
    open_run_dir(config_at(tmp_path / "one"))
    assert "data.curriculum None -> 2" in str(reopened(tmp_path / "one", "data.curriculum=2").notes)
    open_run_dir(config_at(tmp_path / "two", "buffer.num_shards=2", "data.curriculum=2"))
    notes = reopened(tmp_path / "two", "buffer.num_shards=2", "data.curriculum=3").notes
    assert "data.curriculum 2 -> 3" in str(notes)
    with pytest.raises(ConfigError, match=r"data\.curriculum = 3, now None"):
        reopened(tmp_path / "two", "buffer.num_shards=2")


def test_a_run_without_checkpoints_is_not_continued(tmp_path: Path) -> None:
    open_run_dir(config_at(tmp_path / "run", "checkpoint.every=0"))
    with pytest.raises(ConfigError, match="without checkpoints"):
        reopened(tmp_path / "run")


# --- Which directory ---


def checked_and_opened(config: Config) -> str:
    check_run_dir(config)  # As a start does, before it loads anything.
    return open_run_dir(config).path.name


def open_fresh(root: Path) -> str:
    os.environ["AGRO_RUNS"] = str(root)
    return checked_and_opened(quickstart())


def test_runs_that_start_in_the_same_second_have_a_directory_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGRO_RUNS", str(tmp_path / "of threads"))
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(checked_and_opened, [quickstart()] * 8))
    assert sorted(names) == [
        "quickstart-20260101-000000",
        *(f"quickstart-20260101-000000-{number}" for number in range(2, 9)),
    ]
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        names = list(pool.map(open_fresh, [tmp_path / "of processes"] * 8))
    assert len(set(names)) == 8


def make_place(kind: str, path: Path) -> Path:
    """A place of which only the name says what it is."""
    path.mkdir()
    if kind == "a file":
        (path / "f").write_text("")
    elif kind == "a dangling link":
        (path / "f").symlink_to(path / "nowhere")
    elif kind == "links in a circle":
        (path / "f").symlink_to(path / "g")
        (path / "g").symlink_to(path / "f")
    elif kind == "a checkout":
        (path / "f" / ".git").mkdir(parents=True)
    elif kind == "somebody else's config":
        (path / "f").mkdir()
        (path / "f" / "config.yaml").write_text("base_model: x\nmicro_batch_size: 2\n")
    elif kind == "a config of our own":
        (path / "f").mkdir()
        (path / "f" / "config.yaml").write_text(EXAMPLE.read_text())
    elif kind == "a torn run":
        (path / "f").mkdir()
        (path / "f" / "run.lock").touch()
        (path / "f" / "config.yaml").write_text("run:\n  name: 'x")
        (path / "f" / "config-1.yaml").write_text("run:\n")
    return path / "f"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("a file", ["is a file", "new or empty directory"]),
        ("a dangling link", ["is a link that leads nowhere"]),
        ("links in a circle", ["is a link that leads nowhere"]),
        ("a checkout", ["other things than a run: .git", "an empty directory"]),
        ("somebody else's config", ["other things than a run: config.yaml"]),
        ("a config of our own", ["other things than a run: config.yaml"]),
        ("a torn run", ["cannot be read", "not YAML: line 2", "config-1.yaml"]),
        ("/", ["run.dir = / holds other things than a run", "..."]),
        (
            "~nobody-of-this-name/run",
            ["run.dir = ~nobody-of-this-name/run", "there is no user 'nobody-of-this-name'"],
        ),
        ("x" * 300, ["cannot be used: File name too long"]),
        ("/".join(["long"] * 100), ["bytes as an absolute path, at most 400"]),
        ("/proc/nothing/run", ["run.dir = /proc/nothing/run cannot be used"]),
    ],
)
def test_a_place_where_no_run_can_be_is_refused_by_a_start_and_by_a_dry_run(
    tmp_path: Path, kind: str, words: list[str]
) -> None:
    path = Path(kind) if "/" in kind or kind.startswith("x") else make_place(kind, tmp_path / "place")
    before = sorted(tmp_path.rglob("*"))
    for function in (open_run_dir, check_run_dir):
        with pytest.raises(ConfigError) as caught:
            function(config_at(path if path.is_absolute() or "~" in str(path) else tmp_path / path))
        assert all(word in str(caught.value) for word in words), caught.value
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", [[], ["train.log", "nohup.out"], ["lost+found"], ["run.lock"]])
def test_an_empty_directory_will_do_also_one_with_what_a_shell_wrote(
    tmp_path: Path, names: list[str]
) -> None:
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).touch()
    assert check_run_dir(config_at(tmp_path / "run")).endswith("no run is in it")
    assert not open_run_dir(config_at(tmp_path / "run")).is_continued


def test_a_dry_run_says_what_a_start_would_do_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert check_run_dir(config_at(path)) == f"{path} would be made"
    assert list(tmp_path.iterdir()) == []
    open_run_dir(config_at(path))
    with pytest.raises(ConfigError, match="is in use by process"):
        check_run_dir(config_at(path))
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())
    assert check_run_dir(config_at(path, "learner.lr=1e-3")) == f"the run in {path} would be continued"
    assert sorted(found.name for found in path.iterdir()) == ["config.yaml", "run.lock"]
    with pytest.raises(ConfigError, match=r"run\.seed = 0, now 1"):
        check_run_dir(config_at(path, "run.seed=1"))


def test_a_copy_of_a_run_without_its_lock_is_continued(tmp_path: Path) -> None:
    opened = open_run_dir(config_at(tmp_path / "run"))
    (opened.path / "metrics.jsonl").touch()
    (opened.path / "run.lock").unlink()
    assert reopened(tmp_path / "run").is_continued


def test_text_and_small_numbers_are_no_changes_of_a_run_that_goes_on(tmp_path: Path) -> None:
    changes = [
        "data.chat_template=true",
        "data.system_prompt=It's \\boxed{} # 1\n",
        "learner.lr=1e-5",
        "run.name=0600",
    ]
    open_run_dir(config_at(tmp_path / "run", *changes))
    assert reopened(tmp_path / "run", *changes).notes == (f"continuing the run in {tmp_path / 'run'}",)


# --- Starts that fail ---


def test_a_start_that_is_refused_leaves_no_directory(tmp_path: Path) -> None:
    opened = open_run_dir(config_at(tmp_path / "run"))
    with pytest.raises(PlacementError), kept_if_begun(opened.path, opened.is_continued):
        raise PlacementError("no GPU")
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_before_work_was_handed_out_leaves_its_logs_and_nothing_to_continue(
    tmp_path: Path,
) -> None:
    opened = open_run_dir(config_at(tmp_path / "run"))
    for name in ("events.jsonl", "buffer.sqlite", "buffer.sqlite-wal", "ledger.jsonl"):
        (opened.path / name).touch()
    with pytest.raises(KeyboardInterrupt), kept_if_begun(opened.path, opened.is_continued):
        raise KeyboardInterrupt
    assert sorted(path.name for path in opened.path.iterdir()) == [
        "config-refused.yaml",
        "events.jsonl",
        "run.lock",
    ]
    assert not reopened(tmp_path / "run", "run.seed=1", "buffer.num_shards=2").is_continued


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_run_that_had_begun_is_kept_whatever_ends_it(tmp_path: Path, has_begun: bool) -> None:
    opened = open_run_dir(config_at(tmp_path / "run"))
    (opened.path / "ledger.jsonl").write_text("{}\n" * has_begun)
    with pytest.raises(PlacementError), kept_if_begun(opened.path, is_continued=not has_begun):
        raise PlacementError("no GPU")
    assert reopened(tmp_path / "run").is_continued


def test_a_place_that_cannot_be_written_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir = /proc/nothing/run cannot be used"):
        open_run_dir(config_at(Path("/proc/nothing/run")))


def test_the_runs_of_a_user_lie_in_the_home_that_is_meant_and_under_a_path_that_sqlite_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AGRO_RUNS", "~/runs")
    assert check_run_dir(quickstart()).startswith(str(tmp_path / "home" / "runs" / "quickstart-"))
    assert open_run_dir(quickstart()).path.parent == tmp_path / "home" / "runs"
    for root, part in (("~nobodyx/runs", "there is no user 'nobodyx'"), ("a/" * 200, "at most 400")):
        monkeypatch.setenv("AGRO_RUNS", root)
        for ask in (check_run_dir, open_run_dir):
            with pytest.raises(ConfigError, match=part):
                ask(quickstart())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
