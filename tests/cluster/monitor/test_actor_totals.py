"""What environments and reward functions did is counted over all actors there ever were."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.monitor.actor_totals import ENVIRONMENT, REWARD, ActorTotals
from cluster.monitor.monitor import Monitor
from core.metrics import METRICS
from tests.support.configs import make_config


def test_sums_are_over_living_dead_and_started_again() -> None:
    metrics = ActorTotals(ENVIRONMENT)
    metrics.take("a", {"environment_errors": 2, "wait_environment_s": 1.5, "tool_errors": 7})
    metrics.take("b", {"environment_errors": 1, "environment_timeouts": 4})
    metrics.take("a", {"environment_errors": 3, "wait_environment_s": 2.0, "tool_errors": 7})
    metrics.take("a", {"environment_errors": 1})  # It was started again.
    metrics.forget("b")
    metrics.take("c", {"environment_crashes": 1, "cut_at_max_turns": 5})
    assert {name: value for name, value in metrics.row().items() if value} == {
        "environment/errors": 5.0,
        "environment/timeouts": 4.0,
        "environment/crashes": 1.0,
        "environment/tool_errors": 7.0,
        "environment/cut_at_max_turns": 5.0,
        "environment/wait_s": 2.0,
    }


def test_an_answer_takes_as_long_as_it_did_since_the_row_before() -> None:
    metrics = ActorTotals(ENVIRONMENT)
    assert "environment/answer_s" not in metrics.row()
    metrics.take("a", {"environment_s": 4.0, "environment_answers": 2})
    assert metrics.row()["environment/answer_s"] == 2.0
    assert "environment/answer_s" not in metrics.row(), "there was none"
    metrics.take("a", {"environment_s": 5.0, "environment_answers": 6})
    assert metrics.row()["environment/answer_s"] == 0.25


def test_every_metric_is_described() -> None:
    assert {*ENVIRONMENT.metrics, *REWARD.metrics} <= METRICS.keys()


def test_rewards_are_told_by_how_long_groups_wait_and_how_busy_workers_are(tmp_path: Path) -> None:
    monitor = Monitor(make_config(), str(tmp_path))
    counters = {"reward_groups": 4.0, "reward_queue_s": 2.0, "reward_busy_s": 3.0, "reward_worker_s": 12.0}
    monitor.log_actor("actor-0", {**counters, "reward_timeouts": 2.0, "wait_rewards_s": 5.0})
    monitor.log_actor("actor-1", {"reward_crashes": 1.0})
    monitor.log_step({"progress/step": 1})
    assert {name: value for name, value in monitor.view()["row"].items() if name in REWARD.metrics} == {
        "reward/timeouts": 2.0,
        "reward/crashes": 1.0,
        "reward/wait_s": 5.0,
        "reward/queue_s": 0.5,
        "reward/busy_share": 0.25,
    }


@pytest.mark.parametrize("environments", [None, "mine:Game"])
def test_rows_have_them_where_there_are_environments(tmp_path: Path, environments: str | None) -> None:
    monitor = Monitor(make_config(environments=environments), str(tmp_path))
    monitor.log_actor("actor-0", {"environment_errors": 3, "wait_environment_s": 2.0})
    monitor.log_step({"progress/step": 1})
    found = monitor.view()["row"]
    expected = (None, None) if environments is None else (3.0, 2.0)
    assert (found["environment/errors"], found["environment/wait_s"]) == expected
    assert monitor.view()["waits"].get("environment") == expected[1]
