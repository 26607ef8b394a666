"""How the supervisor makes actors: what all of them get is made bytes of once."""

from types import SimpleNamespace
from typing import Any

import cluster.supervisor
from cluster.supervisor import Supervisor
from tests.support.configs import make_config


def test_prompts_are_stored_once_for_all_actors_and_the_feeder(monkeypatch):
    stored: list[object] = []
    made: list[tuple[Any, ...]] = []

    def put(value: object) -> str:
        stored.append(value)
        return f"reference {len(stored)}"

    class Remote:
        def options(self, **options: object) -> "Remote":
            return self

        def remote(self, *arguments: Any, **named: object) -> None:
            made.append(arguments)

    monkeypatch.setattr(cluster.supervisor.ray, "put", put)
    monkeypatch.setattr(cluster.supervisor, "remote", lambda part, log: Remote())
    supervisor: Any = Supervisor.__new__(Supervisor)
    supervisor._config = make_config()
    supervisor._inputs = SimpleNamespace(prompts="the prompts", eval_prompts="those of the suites")
    supervisor._services = SimpleNamespace(log_of=lambda name: None, peers=("peer",), reward_models={})
    supervisor._spawn_rollout("actor-0", {})
    supervisor._spawn_rollout("actor-1", {})
    supervisor._spawn_feeder("feeder", {})
    assert stored == ["the prompts", "those of the suites"]
    assert [arguments[2:4] for arguments in made[:2]] == [("reference 1", "reference 2")] * 2
    assert made[2][2] == "reference 1"
