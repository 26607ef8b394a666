"""avg@n, pass@k and majority@k against every subset counted, and what errors do to them."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from core.config.evaluation import sample_counts
from core.evaluation.estimates import STANDARD_ERROR, Problem, estimates, majority_at, pass_at


def problem(*rewards: float | None, answers: tuple[int | None, ...] | None = None) -> Problem:
    found = answers or tuple(None if reward is None else int(reward) for reward in rewards)
    return Problem(rewards, found, (3,) * len(rewards), (False,) * len(rewards))


@pytest.mark.parametrize("seed", range(5))
def test_pass_at_k_is_the_best_of_every_subset(seed: int) -> None:
    rng = random.Random(seed)
    rewards = [rng.choice([0.0, 0.5, 1.0, -1.0]) for _ in range(7)]
    for k in range(1, 8):
        best = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert pass_at(rewards, k) == pytest.approx(statistics.fmean(best), abs=1e-12)


def test_pass_at_k_of_right_and_wrong_is_the_estimator_of_chen_et_al() -> None:
    for right in range(9):
        rewards = [1.0] * right + [0.0] * (8 - right)
        for k in (1, 2, 4, 8):
            expected = 1 - math.comb(8 - right, k) / math.comb(8, k)
            assert pass_at(rewards, k) == pytest.approx(expected, abs=1e-12)


def test_the_estimators_are_unbiased_over_independent_samples() -> None:
    """Every outcome of four samples of three answers, weighted by its probability."""
    chances, worth = {0: 0.5, 1: 0.3, 2: 0.2}, {0: 0.0, 1: 1.0, 2: 0.25}

    def expected(value: object, n: int) -> float:
        total = 0.0
        for answers in itertools.product(chances, repeat=n):
            rewards = [worth[answer] for answer in answers]
            total += math.prod(chances[answer] for answer in answers) * value(rewards, answers)  # type: ignore[operator]
        return total

    best_of_two = expected(lambda rewards, _: max(rewards), 2)
    assert expected(lambda rewards, _: pass_at(rewards, 2), 4) == pytest.approx(best_of_two, abs=1e-12)
    vote_of_two = expected(lambda rewards, answers: majority_at(rewards, answers, 2), 2)
    vote = expected(lambda rewards, answers: majority_at(rewards, answers, 2), 4)
    assert vote == pytest.approx(vote_of_two, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "answers", "k", "expected"),
    [
        ([0.0, 0.0, 1.0], [7, 7, 8], 3, 0.0),
        ([1.0, 0.0, 1.0], [8, 7, 8], 3, 1.0),
        ([1.0, 0.0], [8, 7], 2, 0.5),  # A tie: both answers count alike.
        ([1.0, 0.0, 0.0, 1.0], [8, 7, 7, 8], 2, 0.5),
        ([1.0, 1.0, 0.0, 0.0], [8, 8, 7, 7], 2, 0.5),
        ([1.0, 0.0, 0.0], [None, None, None], 3, 1 / 3),  # Without a vote each stands alone.
        ([1.0, 0.5, 0.0], [8, 8, 7], 3, 0.75),  # Equal answers of unequal reward: their mean.
        ([1.0, 1.0, 0.0], [8, 8, 7], 2, 1.0),  # The third is no whole vote.
    ],
)
def test_votes(rewards: list[float], answers: list[int | None], k: int, expected: float) -> None:
    assert majority_at(rewards, answers, k) == pytest.approx(expected)


def test_the_standard_error_is_clustered_by_problem() -> None:
    """Copies of the same samples within each problem say nothing new, and leave the error as it is."""
    values = [1.0, 0.0, 1.0, 1.0]
    few = estimates([problem(value, value) for value in values], 2)
    many = estimates([problem(*[value] * 8) for value in values], 8)
    expected = statistics.stdev(values) / math.sqrt(4)
    assert few["avg@2" + STANDARD_ERROR] == many["avg@8" + STANDARD_ERROR] == pytest.approx(expected)
    assert "avg@2" + STANDARD_ERROR not in estimates([problem(1.0, 0.0)], 2), "one problem has none"


def test_errors_are_no_zeros_and_are_counted() -> None:
    found = estimates([problem(1.0, None, None, 1.0), problem(0.0, 0.0, 0.0, 0.0), problem(*[None] * 4)], 4)
    assert found["errors"] == 6
    assert found["avg@4"] == 0.5, "the mean of two problems; the third says nothing"
    assert found["pass@2"] == 0.5
    assert found["pass@4"] == 0.0, "only the second problem has four samples"
    assert "avg@2" not in found
    nothing = estimates([problem(None, None)], 2)
    assert not [name for name in nothing if "@" in name], "nothing is known, and nothing is zero"
    assert nothing["errors"] == 2


def test_lengths_and_cuts_are_of_what_was_sampled() -> None:
    found = estimates([Problem((1.0, None), (1, None), (4, 0), (False, True))], 2)
    assert (found["mean_length"], found["truncated_fraction"]) == (4.0, 0.5)


def test_k_doubles_up_to_n() -> None:
    assert [sample_counts(n) for n in (1, 2, 4, 5, 8)] == [
        (1,),
        (1, 2),
        (1, 2, 4),
        (1, 2, 4, 5),
        (1, 2, 4, 8),
    ]


def test_rewards_as_large_as_floats_have_finite_metrics() -> None:
    for size in (1e200, 1.7e308):
        found = estimates([problem(size, size, answers=(1, 1)), problem(-size, -size, answers=(1, 1))], 2)
        assert all(math.isfinite(value) for value in found.values())
        assert found["avg@2"] == 0.0
        assert found["avg@2" + STANDARD_ERROR] == pytest.approx(size, rel=1e-12)
    assert estimates([problem(1.7e308, 1.7e308, answers=(1, 1))], 2)["majority@2"] == 1.7e308
