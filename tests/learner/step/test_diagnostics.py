"""What the objective saw in a step, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from core.metrics import METRICS, bucket_metrics
from learner.step.diagnostics import COLUMNS, objective_metrics

SAMPLES = {
    "group": [1, 1, 2, 2],
    "prompt_index": [0, 0, 5, 5],
    "index": [0, 1, 0, 1],
    "reward": [1.0, 0.0, 1.0, 1.0],
    "advantage": [1.0, -1.0, 0.5, -0.25],
    "weight": [1.0, 0.5, 1.0, 1.0],
    "log_ratio": [0.2, -0.2, 0.0, -2.0],
    "log_importance": [0.0, math.log(3), 0.0, 0.0],
    "staleness": [0.0, 2.0, 70.0, math.nan],
    "loss": [0.1, 0.2, 0.3, 0.4],
    "ref_logprob": [-1.0, -2.0, -3.0, -4.0],
}


def columns(**changes):
    return {name: np.array(values, dtype=np.float64) for name, values in {**SAMPLES, **changes}.items()}


def test_every_column_is_declared_and_every_metric_described():
    assert tuple(SAMPLES) == COLUMNS
    assert objective_metrics(columns(), 0.5).keys() <= METRICS.keys()
    assert bucket_metrics().keys() <= objective_metrics(columns(), 0.5).keys()


def test_spreads_are_within_groups_and_the_brake_is_their_ratio():
    found = objective_metrics(columns(), 0.5)
    # Residuals 0.9, 0.1 | 1, 2: deviations 0.4, 0.4, 0.5, 0.5 with two degrees of freedom.
    assert found["objective/residual_mean"] == pytest.approx(1.0)
    assert found["objective/residual_std"] == pytest.approx(math.sqrt((2 * 0.16 + 2 * 0.25) / 2))
    assert found["objective/reward_std"] == pytest.approx(0.5)
    assert found["objective/kl_std"] == pytest.approx(math.sqrt((2 * 0.01 + 2 * 0.25) / 2))
    assert found["objective/brake_share"] == pytest.approx((0.1 + 0.1 + 0.5 + 0.5) / 1.0)
    assert found["objective/kl_ref"] == pytest.approx(-0.5)
    assert found["objective/kl_policy"] == pytest.approx((0.2 - 3 * 0.2 + 0.0 - 2.0) / 6)
    assert found["objective/log_ratio_min"] == -2.0
    assert found["objective/importance_weight_mean"] == pytest.approx(0.875)
    assert found["objective/ess_fraction"] == pytest.approx((1 + 3 + 1 + 1) ** 2 / (4 * (1 + 9 + 1 + 1)))


def test_buckets_hold_the_samples_that_belong_there_and_empty_ones_are_unknown():
    found = objective_metrics(columns(), 0.5)
    assert found["by_staleness/loss_0"] == pytest.approx(0.1)
    assert found["by_staleness/advantage_1-3"] == pytest.approx(1.0)
    assert found["by_staleness/loss_64+"] == pytest.approx(0.3)
    assert math.isnan(found["by_staleness/loss_4-15"])
    assert found["by_solve_rate/loss_some"] == pytest.approx(0.15)
    assert found["by_solve_rate/advantage_all"] == pytest.approx(0.375)
    assert math.isnan(found["by_solve_rate/loss_none"])


def test_without_rewards_that_differ_or_known_ratios_shares_are_unknown_not_zero():
    found = objective_metrics(columns(reward=[1.0] * 4, log_importance=[math.nan] * 4), 0.5)
    assert math.isnan(found["objective/brake_share"])
    assert math.isnan(found["objective/ess_fraction"])


def test_huge_ratios_do_not_overflow():
    assert objective_metrics(columns(log_importance=[5000.0, 0.0, 0.0, 0.0]), 0.5)[
        "objective/ess_fraction"
    ] == pytest.approx(0.25)
