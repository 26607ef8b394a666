"""GPUs that an engine's model is divided among, and ranks that share a row: as many as there are."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import ConfigError
from tests.support.configs import make_config


@pytest.mark.parametrize(
    ("actors", "words"),
    [
        ({"tensor_parallel": 4, "num_gpus": 2}, ["actors.num_gpus = 2", "Set actors.num_gpus=4, or 0"]),
        ({"tensor_parallel": 2, "num_gpus": 0.5}, ["actors.num_gpus = 0.5", "Set actors.num_gpus=2"]),
        ({"tensor_parallel": 1, "num_gpus": 3}, ["actors.num_gpus = 3", "actors.tensor_parallel=3."]),
        ({"tensor_parallel": 1, "num_gpus": 1.5}, ["actors.tensor_parallel=2 actors.num_gpus=2."]),
        ({"tensor_parallel": 0}, ["actors.tensor_parallel = 0", "greater than or equal to 1"]),
    ],
)
def test_gpus_that_do_not_fit_the_division_are_refused_with_a_remedy(
    actors: dict[str, float], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config(actors=actors)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(("num_gpus", "parallel", "processes"), [(0, 1, 1), (1, 1, 1), (0, 2, 3), (4, 4, 5)])
def test_a_divided_engine_has_a_process_for_each_part(num_gpus: int, parallel: int, processes: int) -> None:
    actors = make_config(actors={"num_gpus": num_gpus, "tensor_parallel": parallel}).actors
    assert actors.num_processes == processes


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"learner": {"ranks": 4, "sequence_parallel": 3}},
            ["learner.ranks = 4", "one of 1, 2, 4", "learner.ranks=6"],
        ),
        ({"learner": {"ranks": 1, "sequence_parallel": 2}}, ["learner.ranks = 1", "learner.ranks=2"]),
        (
            {"learner": {"ranks": 2, "sequence_parallel": 2, "layout": "padded"}},
            ["learner.layout = padded", "Set learner.layout=packed model.attention=sdpa"],
        ),
        (
            {"learner": {"ranks": 2, "sequence_parallel": 2}, "model": {"attention": "eager"}},
            ["model.attention = eager", "learner.sequence_parallel=1"],
        ),
    ],
)
def test_rows_that_cannot_be_shared_are_refused_with_a_remedy(
    sections: dict[str, dict[str, object]], words: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"learner\.sequence_parallel = \d") as refused:
        make_config(sections)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"actors": {"num_gpus": 0.00001}},
            ["actors.num_gpus = 1e-05", "no less than 0.0001", "Set it to 0"],
        ),
        ({"actors": {"num_cpus": 0.00001}}, ["actors.num_cpus = 1e-05"]),
        ({"learner": {"num_gpus": 0.00001}}, ["learner.num_gpus = 1e-05"]),
        ({"learner": {"num_cpus": 0.00001}}, ["learner.num_cpus = 1e-05"]),
        (
            {"actors": {"num_gpus": 1, "engine_memory": 1.0}},
            ["actors.engine_memory = 1 with actors.num_gpus = 1", "Set it to 0.95 or less"],
        ),
        (
            {
                "actors": {"num_gpus": 1},
                "learner": {"num_gpus": 1},
                "weights": {"transport": "nccl", "full_every": 4},
            },
            ["weights.transport = nccl with weights.full_every = 4", "Set weights.full_every=1, or"],
        ),
    ],
)
def test_shares_that_cannot_be_and_deltas_that_are_not_are_refused(
    sections: dict[str, dict[str, object]], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_config(sections)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"learner": {"ranks": 8, "groups_per_step": 4}}, "so that 4 ranks have nothing to train"),
        ({"learner": {"ranks": 8, "groups_per_step": 4, "sequence_parallel": 2}}, ""),
        ({"weights": {"full_every": 4}}, "weights.full_every = 4 with model.dtype = float32"),
        ({"weights": {"full_every": 4}, "model": {"dtype": "bfloat16"}}, ""),
    ],
)
def test_what_costs_and_brings_nothing_is_told(sections: dict[str, dict[str, object]], told: str) -> None:
    config = make_config({"buffer": {"capacity": 64}}, **sections)
    found = [text for text in config.warnings() if "groups_per_step" in text or "full_every" in text]
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_adapters_alone_are_of_16_bits_on_a_gpu() -> None:
    """vLLM's kernels for them assert it, at the first request."""
    sections: dict[str, Any] = {
        "weights": {"transport": "adapters"},
        "learner": {"lora_rank": 8},
        "actors": {"num_gpus": 1},
    }
    with pytest.raises(
        ConfigError, match=r"model\.dtype = float32: .* Set model\.dtype=bfloat16, or weights"
    ):
        make_config(sections)
    for given in ({"model": {"dtype": "bfloat16"}}, {"actors": {"num_gpus": 0}}):
        assert make_config(sections | given).weights.transport == "adapters"
