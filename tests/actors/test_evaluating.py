"""Suites in the actor's loop: each with its samples, temperature and scores, whoever dies in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from actors.evaluating import LateScorer
from core.errors import RewardError
from tests.support.clocks.waits import until
from tests.support.configs import actor_config
from tests.support.in_process import Bench
from tests.support.simulated import STEP_S, SimulatedActor, benches, rows


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with benches(tmp_path) as make:
        yield make


SUITES = {
    "math": {"path": "m", "samples": 4, "rows": 6},
    "words": {"path": "w", "samples": 1, "temperature": 0.0, "rows": 5, "functions": {"exact_match": 3.0}},
}


def of_suites(bench: Any, **actors: Any) -> Bench:
    config = actor_config(actors=actors, eval={"suites": SUITES})
    run: Bench = bench(config, suites={"math": rows(6), "words": rows(5)})
    return run


def results(run: Bench) -> dict[tuple[str, int], Any]:
    found = [result for result, _ in run.evaluations]
    assert len({(each.suite, each.policy_version) for each in found}) == len(found), "none twice"
    return {(each.suite, each.policy_version): each for each in found}


def test_each_suite_has_its_samples_and_its_scores_and_training_goes_on(bench):
    run = of_suites(bench)
    actor = SimulatedActor(run, num_tokens=(1, 3), step_s=0.001)
    run.publish(0, evaluate=True)
    run.start(actor)
    until(lambda: len(run.evaluations) == 2)
    math, words = results(run)["math", 0], results(run)["words", 0]
    assert (math.num_problems, math.num_samples, words.num_problems, words.num_samples) == (6, 24, 5, 5)
    assert {"avg@4", "pass@4", "majority@4"} <= math.metrics.keys()
    assert words.solve_rate in {3.0 * right / 5 for right in range(6)}, "of its own weight"
    assert run.train(0, 4)


def test_an_actor_that_dies_in_the_middle_of_suites_loses_and_repeats_nothing(bench):
    run = of_suites(bench, max_new_tokens=64)
    run.publish(0, evaluate=True)
    stuck = SimulatedActor(run, "actor-0", num_tokens=(64, 64), step_s=STEP_S)
    ended = run.start(stuck)
    until(lambda: len(stuck._evaluating) and stuck.engine.num_tokens_under_way > 10)
    run.board.get("retire", ["actor-0"], "now")
    ended.result(60)
    run.board.get("release_actor", "actor-0")
    run.start(SimulatedActor(run, "actor-1", num_tokens=(2, 3), step_s=0.001))
    until(lambda: len(run.evaluations) == 2)
    assert {result.num_errors for result in results(run).values()} == {0}


def test_several_versions_of_several_suites_by_several_actors_are_each_measured_once(bench):
    run = of_suites(bench)
    for name in ("actor-0", "actor-1", "actor-2"):
        run.start(SimulatedActor(run, name, num_tokens=(1, 9), step_s=0.002))
    for version in range(0, 6, 2):
        run.publish(version, evaluate=True)
        time.sleep(0.1)
    until(lambda: len(run.evaluations) == 6)
    expected = {(suite, version) for suite in SUITES for version in (0, 2, 4)}
    assert results(run).keys() == expected


def test_what_a_late_scorer_is_asked_before_it_is_there_is_answered_then():
    gate: Future[None] = Future()

    class Made:
        def score(self, prompt: Any, samples: Any, attributes: Any = ()) -> Future[Any]:
            answered: Future[Any] = Future()
            answered.set_result(list(samples))
            return answered

        def close(self) -> None:
            pass

    def make() -> Any:
        gate.result(60)
        return Made()

    scorer = LateScorer(make)
    asked = scorer.score(rows(1)[0], ["a"])  # type: ignore[list-item]
    assert not asked.done()
    gate.set_result(None)
    assert asked.result(60) == ["a"]
    scorer.close()


def test_functions_of_a_suite_that_cannot_be_loaded_are_errors_of_its_samples():
    def make() -> Any:
        raise RewardError("my:judge cannot be imported")

    scorer = LateScorer(make)
    (scored,) = scorer.score(rows(1)[0], ["a"]).result(60)  # type: ignore[list-item]
    assert (scored.reward, scored.error) == (None, "my:judge cannot be imported")
    scorer.close()


class CountingActor(SimulatedActor):
    """Counts the tokens of its engine and the steps that they took."""

    num_steps = num_tokens = 0

    def _make_engine(self) -> Any:
        engine = super()._make_engine()
        step = engine.step

        def counted() -> Any:
            self.num_steps += 1
            before = engine.num_tokens_under_way
            done = step()
            ended = sum(len(generation.tokens) for _, generation in done)
            self.num_tokens += engine.num_tokens_under_way + ended - before
            return done

        engine.step = counted
        return engine


@pytest.mark.timed
def test_an_evaluation_takes_its_share_of_tokens_and_leaves_the_slots_as_full(bench):
    """Steps of the engine per token are the same with evaluations as without: no slot waits for them."""

    def filled(*, is_evaluated: bool) -> tuple[float, int]:
        suites = {"math": {"path": "m", "samples": 4, "rows": 16}}
        actors = {"slots": 16, "max_new_tokens": 64}
        run = bench(actor_config(actors=actors, eval={"suites": suites}), suites={"math": rows(16)})
        made = [
            CountingActor(run, f"actor-{number}", num_tokens=(8, 40), step_s=0.005) for number in range(2)
        ]
        for actor in made:
            run.start(actor)
        for step in range(30):
            if step % 2 == 0:
                run.publish(step, evaluate=is_evaluated and step % 10 == 0)
            run.train(step, 4)
        until(lambda: len(run.evaluations) == 3 * is_evaluated)
        num_steps = sum(actor.num_steps for actor in made)
        return sum(actor.num_tokens for actor in made) / num_steps, num_steps

    without, num_without = filled(is_evaluated=False)
    filled_with, num_with = filled(is_evaluated=True)
    assert num_with > num_without
    assert filled_with > 0.9 * without, f"tokens a step: {filled_with:.1f} against {without:.1f}"


def test_whatever_keeps_a_scorer_from_being_made_or_asked_is_told_by_its_samples() -> None:
    class Broken:
        def score(self, *_: Any) -> Any:
            raise ZeroDivisionError("when it was asked")

    def make() -> Any:
        raise OSError("no process to be had")

    (found,) = LateScorer(make).score(rows(1)[0], ["a"]).result(60)
    assert found.error == "OSError: no process to be had"
    (found,) = LateScorer(Broken).score(rows(1)[0], ["a"]).result(60)
    assert found.error == "ZeroDivisionError: when it was asked"
