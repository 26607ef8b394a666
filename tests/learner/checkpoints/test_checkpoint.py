"""Checkpoints on disk: no kill, damage or full disk leaves a run without one. (Resuming from them:
tests/learner/checkpoints/test_checkpoint_resume.py.)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import CheckpointError
from learner.checkpoints import writer as checkpoint_writer
from learner.checkpoints.checkpoint import (
    Checkpoint,
    TensorPart,
    checkpoint_dirs,
    latest_checkpoint,
    partition,
    verify,
)
from learner.checkpoints.writer import CheckpointWriter, random_states, set_random_states
from tests.support import ROOT
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.scenarios.checkpoint_scenario import TENSORS, parts_of, value_of

SCENARIO = ROOT / "tests/support/scenarios/checkpoint_scenario.py"


# --- ranks without a model: kills ---


def run_scenario(what: str, directory: Path, *arguments: str) -> Any:
    subprocess.run([sys.executable, str(SCENARIO), what, str(directory), *arguments], check=True, timeout=500)
    return json.loads((directory / f"{what}.json").read_text())


@pytest.mark.slow
def test_fifty_kills_while_saving_always_leave_the_newest_acknowledged_checkpoint(tmp_path: Path) -> None:
    results = run_scenario("kills", tmp_path, "50")
    assert len(results) == 50
    assert any(result["aside"] for result in results)  # Kills did hit saves.
    best = 0
    for result in results:
        assert not result["problems"]  # Nothing under a checkpoint's name that is not one.
        best = max(best, result["acknowledged"])
        assert (result["step"] or 0) >= best
        assert result["step"] is None or result["right"]  # All of one step, on all ranks.
        assert result["kept"] <= 3
        best = max(best, result["step"] or 0)
    assert best >= 5


@pytest.mark.slow
def test_a_stopped_rank_costs_the_checkpoint_and_leaves_no_trusted_half(tmp_path: Path) -> None:
    result = run_scenario("stopped", tmp_path)
    (event,) = result["events"]
    assert "step 2" in event
    assert "rank 1 did not write its part" in event
    assert result["metrics"]["checkpoint/failed"] == 1
    for moment, step in (("while_stopped", 1), ("after", 1), ("next", 3)):
        assert result[moment] | {"kept": 0} == {
            "step": step,
            "acknowledged": 0,
            "problems": [],
            "aside": 0,
            "kept": 0,
            "right": True,
        }


# --- in this process ---


def save(
    directory: Path, step: int, *, world_size: int = 2, parts: Callable = parts_of, **options: Any
) -> list[CheckpointWriter]:
    """A checkpoint by `world_size` writers of this process."""
    writers = [
        CheckpointWriter(directory, rank, world_size, session="s", **options) for rank in range(world_size)
    ]
    for rank, writer in enumerate(writers):
        writer.save(step, parts(step, rank), {"step": step})
    for writer in writers:
        writer.close()
    return writers


FILES = ["rank-0.safetensors", "rank-1.safetensors", "state.json", "manifest.json"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(len(data)).randrange(len(data))] ^= 1 << 3
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "deleted"])
def test_a_damaged_checkpoint_is_passed_over_and_its_file_named(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step-000002" / name)
    problems: list[str] = []
    found = latest_checkpoint(tmp_path, problems.append)
    assert found is not None
    assert found[1].step == 1
    assert len(problems) == 1
    assert "step-000002" in problems[0]
    assert name in problems[0]


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-000001"
    good = (path / "manifest.json").read_bytes()
    for place in range(len(good)):
        (path / "manifest.json").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            verify(path, contents=False)
    (path / "manifest.json").write_bytes(good)
    assert verify(path).step == 1


def test_a_directory_without_a_manifest_or_of_another_step_is_never_trusted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints" / "step-000001", tmp_path / "checkpoints" / "step-000007")
    (tmp_path / "checkpoints" / "step-000008").mkdir()
    problems: list[str] = []
    found = latest_checkpoint(tmp_path, problems.append)
    assert found is not None
    assert found[1].step == 1
    assert ["step-000008: manifest.json is missing" in problems[0], "that of step 1" in problems[1]] == [
        True,
        True,
    ]
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_kills_between_a_rename_and_the_removal_of_the_old_leave_no_more_and_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(CheckpointWriter, "_drop_old", lambda self: [0])
        for step in range(1, 6):
            save(tmp_path, step)
    counts: list[int] = []
    replace = checkpoint_writer.replace_directory

    def counted(aside: Path, path: Path) -> None:
        replace(aside, path)
        counts.append(len(checkpoint_dirs(tmp_path)))

    monkeypatch.setattr(checkpoint_writer, "replace_directory", counted)
    save(tmp_path, 6)
    assert counts == [3]


def test_a_rank_that_is_a_checkpoint_ahead_keeps_what_it_has_written(tmp_path: Path) -> None:
    told: list[str] = []
    slow, fast = (
        CheckpointWriter(tmp_path, rank, 2, session="s", timeout_s=2.0, on_event=told.append)
        for rank in range(2)
    )
    for writer in (fast, slow):
        for step in (1, 2):
            writer.save(step, parts_of(step, writer is fast), {"step": step})
    for writer in (fast, slow):
        writer.close()
    assert told == []
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1, 2]


def test_the_newest_so_many_stay_and_the_watermark_is_the_oldest_of_them(tmp_path: Path) -> None:
    oldest: list[int] = []
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2, on_durable=oldest.append)
    (tmp_path / "checkpoints" / "step-000003" / "rank-1.safetensors").unlink()
    (tmp_path / "checkpoints" / ".step-000004.killed").mkdir()
    save(tmp_path, 4, keep=2, on_durable=oldest.append)
    assert oldest == [1, 1, 2, 2]  # A damaged one is not counted.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
        "step-000004",
    ]


def test_a_checkpoint_made_again_replaces_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def again(step: int, rank: int) -> Iterator[TensorPart]:
        return (TensorPart(part.key, part.shape, part.values + 100) for part in parts_of(step, rank))

    save(tmp_path, 5, parts=again)
    (_, path) = checkpoint_dirs(tmp_path)[0]
    assert float(Checkpoint(path, verify(path)).read("master/0", 0, 1)) == value_of(5, "master/0") + 100
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_tensor_is_refused_and_named(bad: float, tmp_path: Path) -> None:
    save(tmp_path, 1)
    events: list[str] = []
    writers = [CheckpointWriter(tmp_path, rank, 2, session="s", on_event=events.append) for rank in range(2)]

    def poisoned(rank: int) -> list[TensorPart]:
        parts = list(parts_of(2, rank))
        if rank == 1:
            parts[2].values[-1] = bad
        return parts

    writers[0].save(2, poisoned(0), {})
    with pytest.raises(CheckpointError, match="master/2 is not finite at step 2"):
        writers[1].save(2, poisoned(1), {})
    writers[0].close()
    assert "rank 1: master/2 is not finite" in events[0]
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1]
    assert not list((tmp_path / "checkpoints").glob(".step-*"))


def test_free_space_is_looked_at_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(rows * columns * 4 for rows, columns in TENSORS.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage(10**12, 10**12, needed))
    events: list[str] = []
    writers = save(tmp_path, 1, world_size=1, on_event=events.append)
    assert "8 are free" in events[0]
    assert "2 checkpoints are kept beside the one that is written. Make room there." in events[0]
    assert writers[0].metrics()["checkpoint/failed"] == 1
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_rank_that_cannot_write_says_so_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_writer.write_tensors

    def full(path: Path, *arguments: Any) -> Any:
        if path.name == "rank-1.safetensors":
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full)
    events: list[str] = []
    start_s = machine_s()
    writers = save(tmp_path, 1, on_event=events.append, timeout_s=60.0)
    assert machine_s() - start_s < 30
    assert "rank 1: OSError: [Errno 28] No space left on device" in events[0]
    assert [writer.metrics()["checkpoint/failed"] for writer in writers] == [1, 1]
    monkeypatch.undo()
    save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_saving_goes_on_beside_training_and_the_next_save_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), checkpoint_writer.write_tensors
    monkeypatch.setattr(
        checkpoint_writer, "write_tensors", lambda *arguments: go.wait(60) and write(*arguments)
    )
    writer = CheckpointWriter(tmp_path, 0, 1, session="s")
    values = torch.ones(1000)
    writer.save(1, [TensorPart("master/x", (1000,), values)], {})
    values.fill_(2.0)  # Training goes on while nothing is on disk yet.
    assert not checkpoint_dirs(tmp_path)
    threading.Timer(1.0, go.set).start()
    writer.save(2, [TensorPart("master/x", (1000,), values)], {})
    writer.close()
    assert writer.metrics()["checkpoint/stall_s"] > 0.2
    read = [Checkpoint(path, verify(path)).read("master/x") for _, path in checkpoint_dirs(tmp_path)]
    assert [float(tensor.mean()) for tensor in read] == [1.0, 2.0]


def test_a_checkpoint_is_there_once_what_comes_first_is_over(tmp_path: Path) -> None:
    first: Future[None] = Future()
    writer = CheckpointWriter(tmp_path, 0, 1, session="s")
    writer.save(1, [TensorPart("master/x", (2,), torch.ones(2))], {}, first=first)
    until(lambda: [*tmp_path.glob("checkpoints/.step-000001.s/manifest.json")])
    assert checkpoint_dirs(tmp_path) == []
    first.set_exception(OSError("whatever came of it"))
    writer.close()
    assert [step for step, _ in checkpoint_dirs(tmp_path)] == [1]


def test_an_error_of_ours_while_writing_is_raised_at_the_next_save(tmp_path: Path) -> None:
    def broken(step: int) -> None:
        raise KeyError("broken")

    writer = CheckpointWriter(tmp_path, 0, 1, session="s", on_durable=broken)
    writer.save(1, [TensorPart("master/x", (2,), torch.ones(2))], {})
    with pytest.raises(KeyError, match="broken"):
        writer.save(2, [TensorPart("master/x", (2,), torch.ones(2))], {})


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_slice_reads_the_same_whatever_the_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    tensors = {
        "master/a": torch.randn(5, 13),
        "master/b": torch.randn(1),
        "master/c": torch.randn(4),
        "proximal/a": torch.randn(5, 13).bfloat16(),
    }

    def parts(step: int, rank: int) -> list[TensorPart]:
        found = []
        for key, tensor in tensors.items():
            start, stop = partition(tensor.numel(), world_size, rank)
            found.append(TensorPart(key, tuple(tensor.shape), tensor.flatten()[start:stop]))
        return found

    save(tmp_path, 1, world_size=world_size, parts=parts)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    checkpoint = Checkpoint(*found)
    for key, tensor in tensors.items():
        assert torch.equal(checkpoint.read(key), tensor.flatten())
        for start in range(tensor.numel()):
            for stop in range(start, tensor.numel() + 1, 3):
                assert torch.equal(checkpoint.read(key, start, stop), tensor.flatten()[start:stop])
    with pytest.raises(CheckpointError, match="holds no tensor master/2"):
        checkpoint.read("master/2")


def test_random_states_survive_json() -> None:
    states = json.loads(json.dumps(random_states()))
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    set_random_states(states)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)) == drawn
