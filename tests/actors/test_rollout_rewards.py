"""The actor's real loop while rewards are slow: it holds back, says so, and loses no lease."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.records import Sample
from tests.support.clocks.waits import until
from tests.support.configs import actor_config
from tests.support.rewards.judge_server import Say, judge_server, port_of_nobody
from tests.support.simulated import Feeder, SimulatedActor, benches, ledger, rows

pytestmark = pytest.mark.timed

LEASE_S = 4.0


@pytest.fixture
def port() -> Iterator[int]:
    """Returns the port of a judge that is down."""
    with port_of_nobody() as port:
        yield port


def test_a_judge_that_is_down_for_longer_than_a_lease_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    lines = f'from rewards.judge import Judge\nhelpful = Judge("Good?", "m", "http://127.0.0.1:{port}/v1")\n'
    (tmp_path / "judge_that_is_down.py").write_text(lines)
    monkeypatch.chdir(tmp_path)
    functions = {"judge_that_is_down:helpful": 1.0}
    config = actor_config(
        run={"timeout_s": LEASE_S}, rewards={"functions": functions, "max_pending": 3, "timeout_s": 1.0}
    )
    with benches(tmp_path) as bench:
        run = bench(config)
        actor = SimulatedActor(run, num_tokens=(2, 5), step_s=0.001)
        run.publish(0)
        run.start(actor)
        until(lambda: actor._scoring.is_full)
        until(lambda: not actor.engine.num_unfinished)
        # The last step's groups are submitted a moment after the engine has ended them, before the actor
        # waits.
        stepped_s = actor._counters["wait_rewards_s"]
        until(lambda: actor._counters["wait_rewards_s"] > stepped_s)
        waited_s, pending = actor._counters["wait_rewards_s"], len(actor._scoring)
        time.sleep(2 * LEASE_S)
        assert len(actor._scoring) == pending, "no group is started that would have to wait"
        assert actor._counters["wait_rewards_s"] - waited_s > LEASE_S
        until(lambda: actor.ping() < 1)  # The loop goes on.
        assert not [event for event in ledger(run) if event["event"] in ("expired", "failed")]
        with judge_server(lambda number, request: Say("Score: 10"), port):
            groups = run.train(0, 4) + run.train(1, 4)
        assert {sample.reward for group in groups for sample in group.samples} == {1.0}
        assert run.stats()["reissued"] == run.stats()["samples_error"] == 0


def test_a_feeders_leases_live_while_its_samples_are_scored(tmp_path: Path) -> None:
    slow = {"tests.support.rewards.asynchronous:for_5_s": 1.0}
    config = actor_config(
        run={"timeout_s": LEASE_S},
        data={"offline": "none"},
        objective={"importance_weight": "none"},
        rewards={"functions": slow},
    )
    samples = tuple(
        Sample.one_turn((5, 0), (7, 8 + number), version_spans=(), text=str(number), finish_reason="length")
        for number in range(4)
    )
    with benches(tmp_path) as bench:
        run = bench(config, rows=rows(offline=samples))
        feeder = Feeder("offline", run.config, run.prompts, *run.peers())
        run.publish(0)
        ended = run.start(feeder)
        assert len(run.train(0, 2)) == 2
        until(lambda: feeder.ping() < 3)
        run.board.get("retire", ["offline"], "drain")
        ended.result(60)
        assert run.stats()["reissued"] == 0
