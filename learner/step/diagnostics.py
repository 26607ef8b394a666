"""What the objective saw in one step: numbers that say whether it works, over all samples of all ranks. Pure
numpy.

The residual R = r - beta * ell is constant within a prompt at the optimum, where it is beta log Z: its spread
within groups is the distance still to go. ell = log pi/pi_ref of the sequence. The effective sample size is
that of the ratios pi/mu of the sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from core.metrics import SOLVE_RATE_BUCKETS
from core.staleness import staleness_masks

Column = npt.NDArray[np.float64]

COLUMNS = (
    "group",
    "prompt_index",
    "index",
    "reward",
    "advantage",
    "weight",
    "log_ratio",
    "log_importance",
    "staleness",
    "loss",
    "ref_logprob",
)
"""Of one sample: its group's id, the prompt's index, its place in the group, then what the names say; NaN
where it is not known.
"""


def objective_metrics(samples: Mapping[str, Column], beta: float) -> dict[str, float]:
    """Returns metrics by their names in metrics.jsonl from the columns named in COLUMNS; NaN where nothing is
    known.
    """
    _, group_of = np.unique(samples["group"], return_inverse=True)
    reward, pull = (
        samples["reward"],
        beta * samples["log_ratio"] if beta else np.zeros_like(samples["reward"]),
    )
    reward_off, pull_off = reward - _group_mean(reward, group_of), pull - _group_mean(pull, group_of)
    freedom = max(1, len(reward) - len(np.unique(group_of)))
    metrics = {
        "objective/residual_mean": _mean(reward - pull),
        "objective/residual_std": math.sqrt(float(np.sum((reward_off - pull_off) ** 2)) / freedom),
        "objective/reward_std": math.sqrt(float(np.sum(reward_off**2)) / freedom),
        "objective/kl_std": math.sqrt(float(np.sum(pull_off**2)) / freedom),
        "objective/brake_share": _ratio(np.abs(pull_off).sum(), np.abs(reward_off).sum()),
        "objective/kl_ref": _mean(samples["log_ratio"]),
        "objective/kl_policy": _weighted_mean(samples["log_ratio"], samples["log_importance"]),
        "objective/log_ratio_min": float(np.min(samples["log_ratio"])) if len(reward) else math.nan,
        "objective/importance_weight_mean": _mean(samples["weight"]),
        "objective/advantage_abs_mean": _mean(np.abs(samples["advantage"])),
        "objective/ess_fraction": _effective_share(samples["log_importance"]),
    }
    solve_rate = _group_mean(reward, group_of)
    for name, inside in staleness_masks(samples["staleness"]).items():
        metrics |= _bucket("staleness", name, inside, samples)
    for name, (low, high) in SOLVE_RATE_BUCKETS.items():
        inside = (
            (solve_rate >= 1)
            if name == "all"
            else (solve_rate > low) & (solve_rate <= high) & (solve_rate < 1)
        )
        metrics |= _bucket("solve_rate", name, inside, samples)
    return metrics


def _bucket(
    what: str, name: str, inside: npt.NDArray[np.bool_], samples: Mapping[str, Column]
) -> dict[str, float]:
    return {
        f"by_{what}/loss_{name}": _mean(samples["loss"][inside]),
        f"by_{what}/advantage_{name}": _mean(np.abs(samples["advantage"][inside])),
    }


def _group_mean(values: Column, group_of: npt.NDArray[np.intp]) -> Column:
    return (np.bincount(group_of, weights=values) / np.bincount(group_of))[group_of]


def _mean(values: Column) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below > 0 else math.nan


def _weighted_mean(values: Column, log_importance: Column) -> float:
    """Returns sum w v / sum w, w = exp(log_importance), over the samples whose w is known."""
    known = np.isfinite(log_importance)
    if not known.any():
        return math.nan
    weights = np.exp(log_importance[known] - log_importance[known].max())
    return float((weights * values[known]).sum() / weights.sum())


def _effective_share(log_importance: Column) -> float:
    """Returns (sum w)^2 / (N sum w^2) of w = exp(log_importance), scaled so that it cannot overflow; offline
    samples have none.
    """
    known = log_importance[np.isfinite(log_importance)]
    if not len(known):
        return math.nan
    weights = np.exp(known - known.max())
    return float(weights.sum() ** 2 / (len(weights) * np.square(weights).sum()))
