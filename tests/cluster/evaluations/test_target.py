"""A run ends at its target, whichever start of it evaluated that."""

from __future__ import annotations

import math
from pathlib import Path

from cluster.evaluations.target import Target
from cluster.monitor.monitor import Monitor
from core.evaluation.records import Evaluation
from tests.support.configs import make_config
from tests.support.monitored import monitored, rows_of


def evaluated(version: int, value: float | None, suite: str = "held_out") -> Evaluation:
    metrics = {} if value is None else {"avg@4": value}
    return Evaluation(
        suite=suite,
        policy_version=version,
        solve_rate=math.nan if value is None else value,
        num_problems=1,
        num_samples=4,
        num_errors=0,
        metrics=metrics,
    )


def test_it_is_reached_once_by_the_first_value_that_is_enough() -> None:
    told: list[str] = []
    target = Target(make_config(eval={"stop_at": ("held_out/avg@4", 0.9)}).eval, told.append)
    few = [evaluated(0, 0.4), evaluated(2, None), evaluated(2, 0.95, suite="other")]
    assert not target.consider(few)
    assert (target.is_reached, told) == (False, [])
    assert target.consider([*few, evaluated(4, 0.9)])
    assert not target.consider([*few, evaluated(4, 0.9), evaluated(6, 0.92)]), "it was told already"
    assert target.is_reached
    assert told == ["version 4 reached held_out/avg@4 0.9000, of 0.9 asked for (eval.stop_at): the run ends"]


def test_without_one_nothing_reaches_it() -> None:
    target = Target(make_config().eval, lambda text: None)
    assert not target.consider([evaluated(4, 1.0)])
    assert not target.is_reached


def test_the_final_evaluation_of_a_run_that_ends_at_its_target_is_in_its_last_row(tmp_path: Path) -> None:
    monitor = Monitor(monitored(steps=9, eval={"stop_at": ("held_out/avg@4", 0.9)}), str(tmp_path))
    for step in (1, 2):
        monitor.log_step({"progress/step": step})
    monitor.log_evaluation(evaluated(2, 0.95), [])
    monitor.close({})
    rows = rows_of(tmp_path)
    assert [(row["progress/step"], row["eval/solve_rate"]) for row in rows] == [(1, None), (2, 0.95)]
