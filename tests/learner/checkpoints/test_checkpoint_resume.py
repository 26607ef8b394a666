"""Runs of real ZeRO-3 ranks that go on from a checkpoint: exactly, through kills, on other numbers of
ranks, with a full disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from actors.heartbeat import Heartbeat
from learner.catalogue import parse_text
from learner.checkpoints.checkpoint import checkpoint_dirs
from learner.checkpoints.export import export
from learner.step.frozen import FrozenPolicies
from learner.worker import LearnerRank
from tests.support.configs import quickstart
from tests.support.learning.resumed import STEPS, Run, run_config
from tests.support.learning.updates import spied
from tests.support.scenarios.checkpoint_scenario import LIMIT_BYTES

TOLERANCE = 4e-5  # As in tests/learner/policy/test_zero.py: sums over other ranks are taken in another order.


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def straight(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Two ranks, all steps without an interruption."""
    run = Run(
        tmp_path_factory.mktemp(request.param) / "run", run_config(tiny_models["untied"], dtype=request.param)
    )
    run.start()
    run.finish()
    return run


@pytest.mark.slow
def test_a_run_killed_in_every_part_of_a_step_equals_the_uninterrupted_one_bit_for_bit(
    straight: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", straight.config)
    aside = run.dir / "checkpoints"
    if straight.config.model.dtype == "float32":
        run.start(hold=8)
        # In save, or just after.
        run.kill_when(lambda: any(aside.glob(".step-000006.*")) or (aside / "step-000006").exists())
        for where in ("forward", "backward", "step", "gather"):
            run.die_in(where)
    run.start(hold=9)
    run.kill_when(lambda: 9 in run.notes("sampled"))  # While step 9 is saved, or just after.
    killed_at, (newest, _) = max(run.rows()), checkpoint_dirs(run.dir)[-1]
    run.start(hold=None)
    run.finish()
    assert newest <= killed_at
    resumed = [*run.notes("sampled")]
    assert len(resumed) > len(set(resumed)) == STEPS  # Steps were repeated, with the batches they had before.
    assert run.rows() == straight.rows()
    mine, theirs = run.checkpoint(STEPS), straight.checkpoint(STEPS)
    of_ranks = [
        [file for file in each.manifest.files if file.name.startswith("rank")] for each in (mine, theirs)
    ]
    # Sizes and sha256: fp32 weights, Adam's moments, moved policies, random states.
    assert of_ranks[0] == of_ranks[1]
    assert mine.state["progress"] == theirs.state["progress"]
    digests = [
        hashlib.sha256((each.dir / "policy" / "model.safetensors").read_bytes()).hexdigest()
        for each in (run, straight)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_run_publishes_first_and_keeps_the_batches_since_its_oldest_checkpoint(straight: Run) -> None:
    published, watermarks = straight.notes("published"), straight.notes("watermark")
    assert published == [0, 2, 4, 6, 8, 10, 12]
    assert (
        watermarks == [3] * 4
    )  # 10 are kept: step 3 is what it would go on from if all others were damaged.
    state = straight.checkpoint(6).state
    assert state["progress"]["step"] == 6
    assert state["adam_steps"] == 6
    assert parse_text(state["config"], "the checkpoint") == straight.config
    assert state["wandb_run_id"] == "a1b2c3"
    assert state["code_version"]
    last = straight.notes("row")[-1]
    assert float(last["checkpoint/saved"]) == 3
    assert float(last["checkpoint/failed"]) == 0
    assert 0 < float(last["checkpoint/stall_s"]) < 60
    assert 0 < float(last["checkpoint/write_s"]) < 60


@pytest.mark.slow
def test_an_exported_checkpoint_is_the_trained_policy_byte_for_byte(straight: Run, tmp_path: Path) -> None:
    exported, policy = export(straight.dir, STEPS, tmp_path / "out"), straight.dir / "policy"
    assert (exported / "model.safetensors").read_bytes() == (policy / "model.safetensors").read_bytes()
    assert (exported / "config.json").read_text() == (policy / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("straight", ["float32"], indirect=True)
def test_a_run_goes_on_with_another_number_of_ranks_within_rounding(
    straight: Run, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    alone = Run(tmp_path / "run", run_config(tiny_models["untied"], ranks=1), stop=7, target=True)
    shutil.copytree(straight.dir / "checkpoints" / "step-000003", alone.dir / "checkpoints" / "step-000003")
    alone.start()
    alone.finish()
    assert alone.notes("published")[0] == 3
    # Its target was reached: it evaluates its last version, although that is not of its last step.
    assert (alone.notes("published")[-1], alone.notes("evaluate")[-1]) == (7, ["held_out"])
    # Asked to stop, it saved, although 7 is no multiple of 3.
    assert alone.checkpoint(7).manifest.world_size == 1
    both = Run(alone.dir, straight.config)
    both.start()
    both.finish()
    mine, theirs = both.checkpoint(STEPS), straight.checkpoint(STEPS)
    assert mine.manifest.world_size == 2
    assert mine.tensors == theirs.tensors
    for key in mine.tensors:
        difference = (mine.read(key).float() - theirs.read(key).float()).abs()
        assert float(difference.max()) < TOLERANCE, key
    assert both.rows().keys() == set(range(4, STEPS + 1))


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_not_the_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", run_config(tiny_models["untied"], ranks=1, steps=9), limited=[4, 7])
    run.start()
    run.finish()
    assert run.rows().keys() == set(range(1, 10))
    assert [step for step, _ in checkpoint_dirs(run.dir)] == [3, 9]
    assert not list((run.dir / "checkpoints").glob(".step-*"))
    (event,) = run.notes("event")
    assert "step 6" in event
    assert "File too large" in event
    last = run.notes("row")[-1]
    assert (float(last["checkpoint/saved"]), float(last["checkpoint/failed"])) == (1, 1)
    assert run.checkpoint(9).manifest.files[0].size > LIMIT_BYTES


def test_what_the_updater_keeps_survives_json(tiny_models: dict[str, Path]) -> None:
    _, _, updater = spied(tiny_models["untied"], 3, moving=True)
    state = json.loads(json.dumps(updater.get_state()))
    assert state["moved"] == ["proximal", "reference"]
    assert len(state["variances"]) == 5
    _, _, other = spied(tiny_models["untied"], 0, moving=True)
    assert other.get_state() == {"variances": [], "moved": []}
    other.set_state(state)
    assert other.get_state() == updater.get_state()


def test_a_rank_says_where_its_threads_are(tiny_models: dict[str, Path]) -> None:
    rank = LearnerRank(1, run_config(tiny_models["tied"]), pad_id=0)
    assert rank.ping() == 1
    stacks = Heartbeat.stacks(rank)  # As the watchdog asks, of any actor.
    assert "test_a_rank_says_where_its_threads_are" in stacks
    assert "MainThread:" in stacks


def test_a_run_goes_on_with_an_objective_that_needs_less_than_the_one_before() -> None:
    frozen = FrozenPolicies({}, quickstart(), needs=())
    frozen.set_moved(["proximal", "reference"])
    assert not frozen.moved
