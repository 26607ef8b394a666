"""What the samples of a held-out set say of a policy: avg@n, pass@k, majority@k, each with a standard error.

A problem has n samples, of which m <= n have a reward; the others are errors. Errors are no zeros: a
problem's values are those of its m samples, and each metric is the mean over the problems that have enough of
them.

    avg@n        the mean of the m rewards (m >= 1)
    pass@k       the mean over all k-subsets of the m of their best reward (m >= k):
                 sum_j r_(j) C(j, k-1) / C(m, k), j from 0, rewards ascending. For rewards 0 and 1, c of which
                 are 1, this is 1 - C(m-c, k) / C(m, k), the unbiased estimator of Chen et al., "Evaluating
                 Large Language Models Trained on Code" (2021), arXiv 2107.03374, equation 1
    majority@k   the samples vote k at a time, in their order, m // k votes (m >= k): the mean over votes of
                 the mean reward of the samples with the most frequent answer. Answers that tie count
                 alike. As no sample votes twice, the votes are independent, and their mean is unbiased

The standard error is that of a mean over problems, s / sqrt(P) with s the sample deviation of the P problems'
values: clustered by problem, since the samples of one problem are no independent draws of the set (Miller,
"Adding Error Bars to Evals" (2024), arXiv 2411.00640, section 2.2). One problem alone has none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from core.config.evaluation import sample_counts
from core.sums import mean, standard_error, total

STANDARD_ERROR = "_standard_error"
"""What follows a metric's name in that of its standard error."""


class Problem(NamedTuple):
    """The samples of one problem, in their order.

    rewards   None where the sample is an error
    answers   what each sample votes for, equal for equal answers; None where it has no vote to give
    lengths   sampled tokens of each
    cut       whether a limit ended it
    """

    rewards: tuple[float | None, ...]
    answers: tuple[int | None, ...]
    lengths: tuple[int, ...]
    cut: tuple[bool, ...]


def estimates(problems: Sequence[Problem], num_samples: int) -> dict[str, float]:
    """Returns the metrics of `problems` with `num_samples` samples each, by name: `avg@4`,
    `avg@4_standard_error`, ..., `mean_length` (sampled tokens), `truncated_fraction` and `errors`, a number.

    A metric that no problem has enough samples for is left out, and so is the standard error of one problem.
    """
    found: dict[str, float] = {}
    scored = [_scored(problem) for problem in problems]

    def add(name: str, needed: int, value_of: Callable[[list[float], list[int | None]], float]) -> None:
        values = [value_of(*pair) for pair in scored if len(pair[0]) >= needed]
        if values:
            found[name] = mean(values)
        if len(values) > 1:
            found[name + STANDARD_ERROR] = standard_error(values)

    add(f"avg@{num_samples}", 1, lambda rewards, _: mean(rewards))
    for k in sample_counts(num_samples):
        add(f"pass@{k}", k, partial(_pass_at, k))
    for k in sample_counts(num_samples):
        if k > 1:
            add(f"majority@{k}", k, partial(_majority_at, k))
    lengths = [length for problem in problems for length in problem.lengths if length]
    cut = [is_cut for problem in problems for is_cut in problem.cut]
    found["mean_length"] = sum(lengths) / len(lengths) if lengths else 0.0
    found["truncated_fraction"] = sum(cut) / len(cut) if cut else 0.0
    found["errors"] = float(sum(reward is None for problem in problems for reward in problem.rewards))
    return found


def pass_at(rewards: Sequence[float], k: int) -> float:
    """Returns the mean over all k-subsets of `rewards`, of which there are at least k, of their best."""
    ordered, subsets = sorted(rewards), math.comb(len(rewards), k)
    return total([reward * (math.comb(j, k - 1) / subsets) for j, reward in enumerate(ordered)])


def majority_at(rewards: Sequence[float], answers: Sequence[int | None], k: int) -> float:
    """Returns the mean over the whole votes of k samples, in their order, of what the vote is worth."""
    starts = range(0, len(rewards) - k + 1, k)
    votes = [_vote(rewards[start : start + k], answers[start : start + k]) for start in starts]
    return mean(votes)


def _pass_at(k: int, rewards: Sequence[float], _: Sequence[int | None]) -> float:
    return pass_at(rewards, k)


def _majority_at(k: int, rewards: Sequence[float], answers: Sequence[int | None]) -> float:
    return majority_at(rewards, answers, k)


def _vote(rewards: Sequence[float], answers: Sequence[int | None]) -> float:
    """Returns the mean reward of the samples whose answer is the most frequent; a sample without a vote
    stands alone.
    """
    voters = [(place if answer is None else None, answer) for place, answer in enumerate(answers)]
    support = Counter(voters)
    most = max(support.values())
    won = [reward for reward, voter in zip(rewards, voters, strict=True) if support[voter] == most]
    return mean(won)


def _scored(problem: Problem) -> tuple[list[float], list[int | None]]:
    pairs = [
        (reward, answer)
        for reward, answer in zip(problem.rewards, problem.answers, strict=True)
        if reward is not None
    ]
    return [reward for reward, _ in pairs], [answer for _, answer in pairs]
