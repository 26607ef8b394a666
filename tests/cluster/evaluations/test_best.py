"""The best version by a metric of a suite is kept, whole, and outlives kills and lost snapshots."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cluster.evaluations.best import BestPolicy
from core.calls import Calls
from core.config import Config
from core.evaluation.records import EvalItem, EvalSample, Evaluation
from core.records import VersionSpan
from core.weights.board import BOARD, BoardClient
from learner.checkpoints import export
from learner.policy.file_weights import file_units
from learner.policy.lora import adapters_of, add_adapters, merged
from tests.support.configs import actor_config
from tests.support.in_process import Bench
from tests.support.learning.saved import load
from tests.support.simulated import rows


class Driver:
    """What the driver does about the best version, on a board in this process."""

    def __init__(self, model_dir: Path, directory: Path, **sections: Any) -> None:
        suites = {"math": {"path": "m", "samples": 1, "rows": 2}, "words": {"path": "w", "samples": 1}}
        keep = sections.pop("keep_best", "math/avg@1")
        sections = {
            "model": {"path": str(model_dir)},
            "eval": {"suites": suites, "keep_best": keep},
        } | sections
        self.config: Config = actor_config(**sections)
        self.run_dir = directory
        self.bench = Bench(self.config, directory, rows(2), suites={"math": rows(2), "words": rows(2)})
        self.told: list[str] = []
        self.calls = Calls(20.0)
        self.results: list[Evaluation] = []
        self.start()

    def start(self) -> None:
        """A start of the driver: what it knows is in the run directory."""
        board = BoardClient(self.bench.board, BOARD)
        self.best = BestPolicy(self.config, self.run_dir, self.calls, board, self.told.append)
        self.earlier = self.best.begin(self.results)

    def evaluate(self, version: int, reward: float | None, tensors: Any = None, suite: str = "math") -> None:
        """A version is published and evaluated, and the driver hears of it."""
        self.bench.publish(version, evaluate=[suite], tensors=tensors)
        span = (VersionSpan(version, 0, 1),)
        items = [EvalItem(suite, version, index, index) for index in range(2)]
        samples = [
            EvalSample(
                item=item,
                prompt="p",
                texts=("t",),
                rewards=(reward,),
                errors=("failed" if reward is None else None,),
                version_spans=(span,),
                lengths=(1,),
                truncated=(False,),
                answer_ids=(1,),
            )
            for item in items
        ]
        self.bench.board.get("finish", msgspec.msgpack.encode(samples))
        self.results = self.bench.board.get("evaluations")[1]

    def settle(self) -> None:
        """Turns until nothing is left to write."""
        self.best.consider(self.results)
        deadline_s = time.monotonic() + 60
        while self.best.is_busy:
            assert time.monotonic() < deadline_s, self.told
            self.best.poll()
            time.sleep(0.01)

    @property
    def note(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "best" / "evaluation.json").read_text())
        return found


@pytest.fixture
def driver(tiny_models: dict[str, Path], tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tiny_models["tied"], tmp_path / "run")
    yield made
    made.bench.close()


def weights_of(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [
        named
        for unit in file_units(model)
        for named in unit.named([weight.parameter.data for weight in unit.weights])
    ]


def changed(model_dir: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = load(model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def test_the_best_version_is_a_policy_directory_with_what_was_evaluated(
    driver: Driver, tiny_models: dict[str, Path]
) -> None:
    models = [changed(tiny_models["tied"], seed) for seed in range(3)]
    for version, (model, reward) in enumerate(zip(models, (0.25, 0.75, 0.5), strict=True)):
        driver.evaluate(version, reward, weights_of(model))
        driver.settle()
    driver.evaluate(3, 0.75, weights_of(models[0]))  # A tie does not replace.
    driver.evaluate(4, 1.0, weights_of(models[0]), suite="words")  # Nor does another suite.
    driver.settle()
    kept = load(driver.run_dir / "best")
    expected = models[1].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.state_dict().items())
    note = driver.note
    assert (note["policy_version"], note["metric"], note["value"]) == (1, "math/avg@1", 0.75)
    assert note["num_problems"] == 2
    assert any("holds version 1 (math/avg@1 0.7500" in text for text in driver.told)
    assert [path.name for path in driver.run_dir.glob(".best*")] == []
    assert driver.bench.board.get("snapshot", 0) is None, "it was let go"


def test_several_better_ones_while_one_is_written_end_with_the_best(
    driver: Driver, tiny_models: dict[str, Path]
) -> None:
    model = changed(tiny_models["tied"], 7)
    for version, reward in enumerate((0.1, 0.4, 0.2, 0.3)):
        driver.evaluate(version, reward, weights_of(model))
        driver.best.consider(driver.results)
        driver.best.poll()
    driver.settle()
    assert driver.note["policy_version"] == 1


def test_a_start_that_goes_on_beats_what_is_kept_and_evaluates_again_what_was_lost(
    driver: Driver, tiny_models: dict[str, Path]
) -> None:
    weights = weights_of(changed(tiny_models["tied"], 1))
    driver.evaluate(0, 0.5, weights)
    driver.settle()
    driver.evaluate(2, 0.9, weights)  # The driver is killed before it is written.
    (driver.run_dir / ".best.making-1").mkdir()
    (driver.run_dir / "best").rename(driver.run_dir / ".best.old-1")
    driver.start()
    assert "before version 2 (math/avg@1 0.9000" in driver.told[-1]
    assert "best holds version 0 (math/avg@1 0.5000" in driver.told[-1]
    assert [each.policy_version for each in driver.earlier] == [0], "2 is evaluated again"
    driver.evaluate(4, 0.4, weights)
    driver.settle()
    assert driver.note["policy_version"] == 2, "as it was evaluated again, and its snapshot was there"
    assert [path.name for path in driver.run_dir.glob(".best*")] == []


def test_every_version_that_is_lost_is_told(driver: Driver, tiny_models: dict[str, Path]) -> None:
    weights = weights_of(changed(tiny_models["tied"], 1))
    for version, reward in ((0, 0.5), (2, 0.9), (4, 0.5)):
        driver.evaluate(version, reward, weights)
    driver.start()
    assert [text.partition(" was ")[0] for text in driver.told] == [
        f"the run ended before version {version} (math/avg@1 {value}000 ± 0.000)"
        for version, value in ((0, 0.5), (2, 0.9), (4, 0.5))
    ]
    assert driver.earlier == []


def test_a_snapshot_that_is_lost_is_told_and_what_is_kept_stays(
    driver: Driver, tiny_models: dict[str, Path]
) -> None:
    weights = weights_of(changed(tiny_models["tied"], 1))
    driver.evaluate(0, 0.5, weights)
    driver.settle()
    driver.evaluate(1, 0.9, weights)
    driver.bench.board.get("forget_snapshots")
    driver.settle()
    assert driver.note["policy_version"] == 0
    assert "version 1 (math/avg@1 0.9000" in driver.told[-1]
    assert "could not be kept: snapshot 1 has been dropped" in driver.told[-1]


def test_a_version_without_a_value_is_not_kept_and_its_snapshot_is_let_go(
    driver: Driver, tiny_models: dict[str, Path]
) -> None:
    weights = weights_of(changed(tiny_models["tied"], 1))
    driver.evaluate(0, None, weights)
    driver.settle()
    for version in range(1, 5):
        driver.bench.publish(version, tensors=weights)
    assert driver.best.kept is None
    deadline_s = time.monotonic() + 60
    while driver.bench.board.get("snapshot", 0) is not None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_full_disk_is_told_and_leaves_what_is_kept(
    driver: Driver, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(changed(tiny_models["tied"], 1))
    driver.evaluate(0, 0.5, weights)
    driver.settle()

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_tensors", full)
        driver.evaluate(1, 0.9, weights)
        driver.settle()
    assert "No space left on device" in driver.told[-1]
    assert driver.note["policy_version"] == 0
    driver.evaluate(2, 0.7, weights)
    driver.settle()
    assert driver.note["policy_version"] == 2


def test_another_metric_begins_anew_and_says_so(driver: Driver, tiny_models: dict[str, Path]) -> None:
    driver.evaluate(0, 0.5, weights_of(changed(tiny_models["tied"], 1)))
    driver.settle()
    evaluation = driver.config.eval.model_copy(update={"keep_best": "words/avg@1"})
    driver.config = driver.config.model_copy(update={"eval": evaluation})
    driver.start()
    assert "eval.keep_best is words/avg@1 now" in driver.told[-1]
    assert driver.best.kept is None


def test_adapters_that_were_published_alone_are_added_to_the_base(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models["tied"]
    learner, weights = {"lora_rank": 8}, {"transport": "adapters"}
    driver = Driver(
        base, tmp_path / "run", learner={"micro_batch_tokens": 200_000, **learner}, weights=weights
    )
    model = load(base)
    add_adapters(model, driver.config.learner, seed=1)
    adapters = [(weight.name, weight.parameter.data) for weight in adapters_of(model)]
    for _, tensor in adapters:
        tensor += 0.01 * torch.randn_like(tensor)
    driver.evaluate(0, 0.5, adapters)
    driver.settle()
    driver.bench.close()
    kept = load(driver.run_dir / "best").state_dict()
    layer = model.model.layers[0].self_attn.q_proj
    a, b = (getattr(layer, part)["default"].weight.data for part in ("lora_A", "lora_B"))
    expected = merged(layer.base_layer.weight.data, a, b, driver.config.learner.lora_scale)
    assert torch.equal(kept["model.layers.0.self_attn.q_proj.weight"], expected)
