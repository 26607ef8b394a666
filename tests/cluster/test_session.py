"""A Ray of our own: what its workers have in their processes before anything else runs there."""

import gc
import os
import re
from typing import Any

import psutil
import pytest
import ray

from cluster.session import first_at_once, ray_session
from core.machine import collect_as_usual, collect_seldom
from core.processes import (
    environment,
    forget_inherited,
    inherited,
    remote,
    threads,
)
from tests.support.configs import make_config


class Worker:
    """A process that says what it is."""

    def found(self) -> tuple[dict[str, str | None], tuple[int, int, int], str]:
        return (
            {name: os.environ.get(name) for name in environment()},
            gc.get_threshold(),
            ray.get_runtime_context().get_runtime_env_string(),
        )


def command_of(process: psutil.Process) -> str:
    """Its command line, "" when it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def onlookers() -> list[Any]:
    node = ray._private.node.Node
    return [node.start_monitor, node.start_log_monitor, node.start_api_server]


@pytest.mark.slow
def test_workers_inherit_their_environment_and_collect_seldom_while_they_load_and_nobody_looks_on():
    config, starts = make_config(), onlookers()
    with ray_session(config.actors, config.learner):
        assert onlookers() == starts, "the next ray.init of this process starts what it always did"
        lines = [command_of(each) for each in psutil.Process().children(recursive=True)]
        assert [line for line in lines if re.search(r"/(monitor|log_monitor|dashboard)\.py", line)] == []
        assert "OMP_NUM_THREADS" not in threads(1).get("env_vars", {})
        alike = remote(Worker).options(runtime_env=threads(1)).remote()
        other = remote(Worker).options(runtime_env=threads(2)).remote()
        found, thresholds, own = ray.get(alike.found.remote())
        assert found == environment(1)
        assert thresholds[0] > 10_000
        assert own == "{}"
        assert ray.get(other.found.remote())[0] == environment(2)
    assert threads(1)["env_vars"] == environment(1)


def test_as_many_actors_load_at_first_as_the_ranks_leave_cores(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.session.available_cpus", lambda: 8.0)
    assert first_at_once(2) == 6
    monkeypatch.setattr("cluster.session.available_cpus", lambda: 1.5)
    assert first_at_once(1) == 1
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert first_at_once(1) == float("inf")


def test_a_worker_asks_only_for_what_it_would_not_inherit(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert threads(2)["env_vars"] == environment(2)
    with inherited(environment()):
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    # Those that were started in between have it still.
    assert threads(0.5) == threads(1) == {}
    assert threads(2.5) == {"env_vars": {"OMP_NUM_THREADS": "2"}}
    forget_inherited()
    assert threads(1)["env_vars"] == environment(1)


def test_the_collector_rests_while_libraries_load_and_leaves_out_what_is_there_afterwards():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    collect_seldom()
    assert gc.isenabled()
    assert gc.get_threshold()[0] > before[0]
    loaded = [[] for _ in range(1000)]
    collect_as_usual()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() >= frozen + len(loaded)
