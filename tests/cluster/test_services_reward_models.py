"""A reward model over Ray: hosted once, killed, there again, and its death noted as any service's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.deaths import REWARD_MODEL, Deaths, read_deaths
from cluster.preparation.placement import bundles, check
from cluster.services import Services
from cluster.session import without_onlookers
from core.calls import Calls
from core.errors import PlacementError
from core.process_log import ProcessLog, make_log_folder
from rewards.hosted import HostedModel
from tests.support.classifiers import make_classifier
from tests.support.configs import make_config

CONVERSATION = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def local_ray() -> Iterator[None]:
    with without_onlookers():
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_reward_model_is_started_again_and_its_death_noted(local_ray: None, tmp_path: Path) -> None:
    make_log_folder(tmp_path)
    path = make_classifier(tmp_path / "model")
    services: Any = object.__new__(Services)
    services.calls, services._deaths, told = Calls(240.0), Deaths(tmp_path), []
    services.stats = SimpleNamespace(value={})
    services.event = told.append
    services.log_of = lambda name: ProcessLog(str(tmp_path), name, name, "")
    client = services._host(0, f"reward_model:{path}", HostedModel())
    life = services._life("reward-model-0", REWARD_MODEL, client)
    services._lives = [life]
    assert services.num_models_loading == 1

    def restarted() -> bool:
        return bool(services._is_another(life))

    (before,) = services.calls.ask(client.score([CONVERSATION]))
    deadline_s = time.monotonic() + 240
    while services.num_models_loading and time.monotonic() < deadline_s:
        assert not restarted()
        time.sleep(0.05)
    os.kill(life.known.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 240
    # Asked while it is gone: Ray repeats the call.
    (after,) = services.calls.ask(client.score([CONVERSATION]))
    assert after == pytest.approx(before)
    while not restarted():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    (death,) = read_deaths(tmp_path)
    assert (death.kind, death.name, death.what) == ("reward model", "reward-model-0", "signal")
    assert told
    assert told[0].startswith("reward-model-0 restarted (1st time): ")


def test_reward_models_are_placed_before_actors_and_said_where_they_do_not_fit() -> None:
    config = make_config(actors={"count": 2, "num_cpus": 1}, learner={"ranks": 1, "num_cpus": 1})
    on_cpu, on_gpu = HostedModel(num_cpus=1), HostedModel(num_gpus=1)
    placement = bundles(config.actors, config.learner, [on_cpu])
    assert placement.total() == {"CPU": 4.0, "GPU": 0.0}
    assert check(placement, {"CPU": 4}) == []
    (warning,) = check(placement, {"CPU": 3})
    assert warning.startswith("1 of actors.count = 2 actors fit")
    with pytest.raises(PlacementError, match=r"reward models of \(1 CPU, 0 GPU\)"):
        check(placement, {"CPU": 2})
    with pytest.raises(PlacementError, match=r"GPU 0 of 1"):
        check(bundles(config.actors, config.learner, [on_gpu]), {"CPU": 8})
