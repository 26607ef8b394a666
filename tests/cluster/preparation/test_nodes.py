"""Memory of each node: what Ray may put there against what it has, and what is said with the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.preparation.memory import GIB, MemoryEstimate, MemoryUse
from cluster.preparation.nodes import KEEP, MEMORY, SHM, STORE, memory_warnings, name_of, published_bytes
from cluster.preparation.placement import bundles, spread
from cluster.preparation.placement import memory_warnings as warnings_of
from core.config import Config
from tests.support.configs import make_config

ESTIMATE = MemoryEstimate(
    "made up",
    num_params=10**9,
    learner=(
        MemoryUse("gathered parameters", 8 * GIB),
        MemoryUse("checkpoint buffers", 10 * GIB, on_host=True),
    ),
    actor=(MemoryUse("weights", 2 * GIB), MemoryUse("process", 3 * GIB, on_host=True)),
)
"""Of a rank 10 GiB in host memory, of an actor 3."""


def config_of(**sections: Any) -> Config:
    tree = {
        "model": {"dtype": "bfloat16"},
        "learner": {"ranks": 4, "num_gpus": 1},
        "actors": {"count": 4, "num_gpus": 1},
    }
    return make_config(tree, **sections)


def node(**changes: float) -> dict[str, float]:
    return {"CPU": 32.0, "GPU": 4.0, MEMORY: 100.0 * GIB, STORE: 50e9, SHM: 60e9, **changes}


def warnings(nodes: list[dict[str, float]], **sections: Any) -> list[str]:
    config = config_of(**sections)
    return warnings_of(config, bundles(config.actors, config.learner), ESTIMATE, nodes)


def test_ranks_fill_a_node_and_actors_take_the_emptiest() -> None:
    config = config_of()
    asked = bundles(config.actors, config.learner)
    assert spread(asked, [node(), node()]) == [(4, 0), (0, 4)]
    assert spread(asked, [node(GPU=3.0), node(GPU=3.0), node(GPU=2.0)]) == [(3, 0), (1, 2), (0, 2)]
    assert spread(asked, [node(GPU=1.0), node(GPU=5.0), node(GPU=0.0)]) == [(0, 1), (4, 1), (0, 0)]


def test_enough_in_sum_is_not_enough_on_each_node() -> None:
    assert warnings([node(), node()]) == []
    little, much = node(**{MEMORY: 41.0 * GIB, "node:10.0.0.7": 1.0, "node:__internal_head__": 1.0}), node()
    (warning,) = warnings([little, much])
    # Rank 0 holds a snapshot of 2 GB besides.
    assert warning.startswith("node 1 (10.0.0.7): 4 learner ranks and 0 actors there want about 41.9 GiB")
    assert "there are 41.0 GiB beside the object store" in warning
    (twice,) = warnings([node(**{MEMORY: 43.0 * GIB}), much], weights={"full_every": 4})
    assert "43.7 GiB" in twice, "what deltas are told from is held too"
    assert warnings([node(**{MEMORY: 43.0 * GIB}), much]) == []


def test_versions_that_do_not_fit_a_node_s_object_store_are_told_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (warning,) = warnings([node(), node(**{STORE: 5e9})])
    assert f"node 2: {KEEP} versions of the weights, 2.00 GB each, want 6.00 GB" in warning
    assert "has 5.00 GB there" in warning
    assert "Give `ray start` there --object-store-memory=7200000000" in warning
    unused = node(**{STORE: 5e9, "GPU": 0.0})
    assert warnings([node(GPU=8.0), unused]) == []
    monkeypatch.delenv("RAY_ADDRESS")
    (warning,) = warnings([node(**{STORE: 5e9, "GPU": 8.0})])
    assert "`ray start --head` here" in warning


def test_a_small_dev_shm_is_told_where_something_needs_it() -> None:
    (warning,) = warnings([node(), node(**{SHM: 64.0 * 2**20, STORE: 9e9})])
    assert "object store of 9.00 GB lies on disk, for /dev/shm has 0.07 GB" in warning
    assert "--shm-size" in warning
    cramped = node(**{SHM: 64.0 * 2**20, STORE: 60e6})
    few = {"weights": {"transport": "adapters"}, "learner": {"lora_rank": 8, "ranks": 4, "num_gpus": 1}}
    (warning,) = warnings([cramped, node()], **few)
    assert "64 MiB there, in which NCCL and vLLM's workers meet: it wants 1 GiB" in warning
    unknown = {key: value for key, value in cramped.items() if key != SHM}
    assert warnings([unknown, node()], **few) == []


def test_without_a_model_nothing_is_said_of_it_and_without_room_for_anything_the_sum_is_told() -> None:
    config = config_of()
    unknown = MemoryEstimate("no model")
    assert published_bytes(config, unknown) == 0
    assert memory_warnings(config, unknown, [node(**{STORE: 1e6})], [(4, 4)]) == []
    (warning,) = warnings([{"CPU": 0.0, "GPU": 0.0, MEMORY: 1.0 * GIB}])
    assert warning == "learner and actors want about 52.0 GiB of host memory, there are 1.0 GiB."


def test_a_node_is_called_by_its_address_where_ray_tells_it() -> None:
    assert name_of({"CPU": 1.0}, 3) == "node 3"
    assert name_of({"node:__internal_head__": 1.0, "node:10.1.2.3": 1.0}, 1) == "node 1 (10.1.2.3)"
