"""What no card can hold is refused with numbers and what to type; what is not known is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.preparation.cards import CARD_MEMORY, check_cards, largest_card, own_card_memory
from cluster.preparation.placement import bundles, fitting, most_actors
from core.config import Config
from core.errors import PlacementError
from tests.support.configs import changed, make_config

H100 = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama-8b")
    (path / "config.json").write_text(json.dumps(LLAMA_8B))
    return path


def config_of(path: Path, /, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": str(path), "dtype": "bfloat16"},
        "actors": {"num_gpus": 1},
        "learner": {"ranks": 4, "num_gpus": 1},
    }
    return make_config(changed(tree, sections))


def test_the_largest_card_is_that_of_the_kind_that_ray_tells() -> None:
    assert largest_card([H100, {"CPU": 8.0}]) == 80 * 2**30
    assert largest_card([H100, {"GPU": 1.0, "accelerator_type:L40S": 1.0}]) == 80 * 2**30
    assert largest_card([{"GPU": 1.0, CARD_MEMORY: 24e9}]) == 24e9
    assert largest_card([H100, {"GPU": 1.0, "accelerator_type:X7": 1.0}]) is None
    assert largest_card([{"CPU": 8.0}]) is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        # 18 bytes a parameter, with the reference in host memory.
        (
            {"learner": {"ranks": 1}},
            [
                "are 145 GB for each of learner.ranks = 1",
                "86 GB of the largest card's 86 GB",
                "learner.ranks=2,",
            ],
        ),
        (
            {"learner": {"ranks": 1, "num_gpus": 0.5}, "actors": {"num_gpus": 0.5}},
            ["43 GB of", "Set learner.num_gpus=1 learner.ranks=2,"],
        ),
        (
            {"actors": {"num_gpus": 0.2}},
            ["weights are 16 GB on each", "15 GB of the", "Set actors.num_gpus=1,"],
        ),
        (
            {"model": {"dtype": "float32"}, "actors": {"engine_memory": 0.3}, "learner": {"ranks": 8}},
            ["weights are 32 GB on each", "Set actors.tensor_parallel=2 actors.num_gpus=2,"],
        ),
    ],
)
def test_a_model_that_is_too_large_is_refused(
    model: Path, sections: dict[str, dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(PlacementError) as refused:
        check_cards(config_of(model, **sections), [H100])
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    "sections", [{}, {"learner": {"ranks": 1, "offload": "all"}}, {"learner": {"ranks": 2}}]
)
def test_one_that_may_be_held_is_not(model: Path, sections: dict[str, dict[str, Any]]) -> None:
    check_cards(config_of(model, **sections), [H100])


@pytest.mark.parametrize(
    ("gpus", "each", "held"),
    [
        (8, 0.3, 24),
        (2, 0.6, 2),
        (1, 0.1, 10),
        (1.4, 0.4, 3),
        (1.4, 0.5, 2),
        (7.4, 1, 7),
        (8, 3, 2),
        (0, 0.5, 0),
    ],
)
def test_a_fraction_is_of_one_card(gpus: float, each: float, held: int) -> None:
    assert fitting(gpus, each) == held
    if each < 1:
        tree = {"actors": {"count": 100, "num_gpus": each, "num_cpus": 0}, "learner": {"num_cpus": 0}}
        config = make_config(tree)
        assert most_actors([{"CPU": 1, "GPU": gpus}], bundles(config.actors, config.learner)) == held


def test_what_is_not_known_is_not_refused(model: Path) -> None:
    check_cards(config_of(model, learner={"ranks": 1}), [{"CPU": 64.0, "GPU": 8.0}])
    check_cards(config_of(Path("someone/of-no-size"), learner={"ranks": 1}), [H100])


def test_the_drivers_tool_is_asked_for_this_machines_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 24576\necho 49152\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_card_memory() == {CARD_MEMORY: 48 * 2**30}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert own_card_memory() == {}
    monkeypatch.setenv("PATH", "")
    assert own_card_memory() == {}
