"""What the driver knows of evaluations, told to the boards of later starts: nothing is lost or done twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.evaluations.results import Evaluations
from core.calls import Calls
from core.evaluation.records import Evaluation
from core.weights.board import BOARD, BoardClient
from tests.support.clocks.waits import until
from tests.support.configs import actor_config
from tests.support.in_process import Bench
from tests.support.simulated import SimulatedActor, rows

SUITES = {name: {"path": "p", "samples": 1, "rows": 2, "every": 4} for name in ("math", "words")}
LAST = 12


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    config = actor_config(eval={"suites": SUITES})
    made = Bench(config, tmp_path / "run", rows(4), suites={name: rows(2) for name in SUITES})
    yield made
    made.close()


def done(suite: str, version: int) -> Evaluation:
    return Evaluation(
        suite=suite,
        policy_version=version,
        solve_rate=0.5,
        num_problems=2,
        num_samples=2,
        num_errors=0,
        metrics={"avg@1": 0.5},
    )


def driver(bench: Bench, *earlier: Evaluation) -> Evaluations:
    board, calls = BoardClient(bench.board, BOARD), Calls(20.0)

    def restore(results: Any, held: Any = ()) -> Any:
        return calls.start(board.restore(list(results), {}, list(held)))

    services: Any = SimpleNamespace(board=board, calls=calls, restore_board=restore)
    return Evaluations(services, earlier, SUITES, LAST)


def polled(evaluations: Evaluations, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        evaluations.poll()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_start_that_goes_on_evaluates_only_what_is_not_done(bench: Bench) -> None:
    evaluations = driver(bench, done("math", 0), done("words", 0), done("math", 4))
    polled(evaluations, lambda: len(bench.board.get("evaluations")[1]) == 3)
    bench.publish(4, evaluate=True)
    polled(evaluations, lambda: evaluations.open == {("words", 4)})
    bench.start(SimulatedActor(bench, num_tokens=(1, 2), step_s=0.001))
    polled(evaluations, lambda: ("words", 4) in evaluations.results)
    assert [(each.suite, each.policy_version) for each in evaluations.by_version()] == [
        ("math", 0),
        ("words", 0),
        ("math", 4),
        ("words", 4),
    ]
    assert len(bench.evaluations) == 1


def test_what_was_open_behind_the_checkpoint_is_made_up_for(bench: Bench) -> None:
    evaluations = driver(bench, done("math", 0), done("words", 0), done("math", 4))
    polled(evaluations, lambda: len(bench.board.get("evaluations")[1]) == 3)
    evaluations.make_up(bench.config.suites, 6, publish_every=2)
    until(lambda: bench.board.asked["owe"])
    bench.publish(6)
    polled(evaluations, lambda: evaluations.open == {("words", 6)})
    evaluations.make_up(bench.config.suites, 4, publish_every=2)
    assert len(bench.board.asked["owe"]) == 1, "version 4 is due by itself"


def test_the_last_version_is_open_until_all_of_its_suites_are_done(bench: Bench) -> None:
    evaluations = driver(bench)
    bench.publish(LAST, evaluate=True)
    polled(evaluations, lambda: len(evaluations.open) == 2)
    evaluations.take([], [done("math", LAST)])
    assert evaluations.open == {("words", LAST)}, "also while a board that died is told of it again"
    evaluations.take([], [done("words", LAST)])
    assert evaluations.open == set()
