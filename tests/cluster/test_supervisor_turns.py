"""A turn of the supervisor waits for nobody, not even while a checkpoint is verified, byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.prompts import PromptRow, PromptSet
from cluster.deaths import read_deaths
from cluster.preparation.prepare import Inputs
from cluster.session import without_onlookers
from cluster.supervisor import Supervisor
from core.config import Config
from learner.checkpoints.checkpoint import (
    STATE_NAME,
    CheckpointManifest,
    FileEntry,
    checkpoint_root,
    latest_checkpoint,
    rank_file,
    write_file,
    write_manifest,
)
from tests.support.configs import make_config
from tests.support.fleet_actors import IdleActor, IdleRank

pytestmark = [pytest.mark.slow, pytest.mark.timed]
GIB = 2**30


class Silent:
    """In place of terminal and stop signal."""

    name = None

    def update(self, view: Any) -> None:
        pass


def inputs_of(config: Config, prompts: PromptSet, run_dir: Path) -> Inputs:
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
            address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


@pytest.fixture
def supervisor(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr("cluster.supervisor.RolloutActor", IdleActor)
    monkeypatch.setattr("cluster.gang.LearnerRank", IdleRank)
    config = make_config(run={"timeout_s": 180.0, "steps": 100}, actors={"count": 1})
    prompts = PromptSet([PromptRow(0, "1+1=", (1, 2), {"answer": "2"})], 0, "test")
    made = Supervisor(inputs_of(config, prompts, tmp_path))
    yield made
    made.close()


def write_checkpoint(run_dir: Path, step: int, sha256: str) -> None:
    """A checkpoint of a GiB of zeros, which take no room on the disk; it verifies if `sha256` is theirs."""
    directory = checkpoint_root(run_dir) / f"step-{step:06d}"
    directory.mkdir(parents=True)
    with (directory / rank_file(0)).open("wb") as file:
        file.truncate(GIB)
    files = (FileEntry(rank_file(0), GIB, sha256), write_file(directory / STATE_NAME, b"{}"))
    write_manifest(directory, CheckpointManifest(format=1, step=step, world_size=1, tensors=(), files=files))


def turn_until(supervisor: Supervisor, is_so: Any, timeout_s: float = 180.0) -> tuple[float, float]:
    """Turns until it is so; the longest turn, and the longest time for which the status was not written."""
    deadline_s, longest_s, stale_s = time.monotonic() + timeout_s, 0.0, 0.0
    status = supervisor._inputs.run_dir / "status.json"
    while not is_so():
        start_s = time.monotonic()
        supervisor.turn()
        longest_s = max(longest_s, time.monotonic() - start_s)
        stale_s = max(stale_s, time.time() - json.loads(status.read_text())["time"])
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    return longest_s, stale_s


def test_a_learner_whose_checkpoint_is_verified_keeps_neither_status_nor_actors_waiting(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = threading.Event()

    def verified(*arguments: Any) -> Any:
        """As long as its bytes take, and at least until the actor is replaced."""
        found = latest_checkpoint(*arguments)
        assert replaced.wait(180)
        return found

    supervisor.start([], Silent(), Silent())  # type: ignore[arg-type]
    turn_until(supervisor, lambda: supervisor._fleet.names("running") == ["actor-0"])
    learner, zeros = supervisor._learner, hashlib.sha256()
    assert learner is not None
    for _ in range(1024):
        zeros.update(bytes(2**20))
    monkeypatch.setattr("cluster.learner.latest_checkpoint", verified)
    write_checkpoint(tmp_path, 5, zeros.hexdigest())
    write_checkpoint(tmp_path, 7, "0" * 64)  # As long, and damaged: only its bytes tell.
    (place,) = [asked.wait() for asked in learner._gang._where]  # type: ignore[union-attr]
    os.kill(place.pid, signal.SIGKILL)
    turn_until(supervisor, lambda: learner.state == "verifying a checkpoint")
    start_s = time.monotonic()
    os.kill(supervisor._fleet.status()[0]["pid"], signal.SIGKILL)

    def is_replaced() -> bool:
        assert learner.state == "verifying a checkpoint"
        return supervisor._fleet.names() == ["actor-0.1"]

    first = turn_until(supervisor, is_replaced)
    replaced.set()
    second = turn_until(supervisor, lambda: learner.state != "verifying a checkpoint")
    third = turn_until(supervisor, lambda: learner.state == "training")
    verified_s = time.monotonic() - start_s
    longest_s, stale_s = (max(values) for values in zip(first, second, third, strict=True))
    print(f"{verified_s:.1f} s from the death to training; the longest turn took {longest_s:.3f} s")
    # A turn that waited for the bytes of a checkpoint would take half of that time, or more.
    assert longest_s < max(0.5, verified_s / 8)
    assert stale_s < max(3.0, verified_s / 3)
    assert [(death.kind, death.name) for death in read_deaths(tmp_path)] == [
        ("learner rank", "learner-rank-0"),
        ("rollout actor", "actor-0"),
    ]
    log = (tmp_path / "events.jsonl").read_text()
    assert "step-000007: rank-0.safetensors has the sha256 49bc20df15e4" in log
    assert "going on from step-000005" in log
