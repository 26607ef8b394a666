"""What weights on their way take of host memory; the rest of the estimate is held by test_placement.py."""

from __future__ import annotations

from typing import Any

import pytest

import cluster.plan.workload
from cluster.plan.fit import fit_of, fullest_host_bytes
from cluster.plan.rates import DEVICES
from cluster.preparation.memory import ModelShape, estimate_memory
from tests.support.configs import make_config

SHAPE = ModelShape(2**30, layers=16, hidden=2048, mlp=8192, kv_width=512, vocabulary=32_000, adapted=10**6)


@pytest.mark.parametrize(
    ("sections", "copies", "snapshots"),
    [
        ({}, 0, 1),
        ({"actors": {"tensor_parallel": 2, "num_gpus": 2}}, 1, 1),
        ({"weights": {"full_every": 8}}, 1, 2),
        ({"weights": {"full_every": 8}, "actors": {"tensor_parallel": 2, "num_gpus": 2}}, 2, 2),
    ],
)
def test_an_actor_holds_what_it_puts_together_and_what_its_workers_share(
    sections: dict[str, Any], copies: int, snapshots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "actors": {"num_gpus": 1},
        "learner": {"num_gpus": 1},
    }
    config = make_config(tree | sections)
    estimate = estimate_memory(config, SHAPE)
    whole = 2 * SHAPE.num_params
    arriving = [part for part in estimate.actor if part.name == "new weights"]
    assert sum(part.num_bytes for part in arriving) == copies * whole
    assert all(part.on_host for part in arriving)
    said = f"{snapshots * whole / 2**30:.1f} GiB of host memory beside learner rank 0"
    assert any(said in note for note in estimate.notes)
    monkeypatch.setattr(cluster.plan.workload, "find_shape", lambda config: (SHAPE, "a test"))
    machines = cluster.plan.workload.Machines(DEVICES["h100"], gpus_per_node=8, network_bytes_per_s=50e9)
    job, _ = cluster.plan.workload.workload_of(config, machines)
    fit = fit_of(job, estimate)
    assert fullest_host_bytes(job, fit) == fit.rank_host + fit.actor_host + snapshots * whole + fit.store
