"""Advantages that train the n samples of a group for what k of them achieve together: pass@k and majority@k.

After Tang et al., "Optimizing Language Models for Inference Time Objectives using Reinforcement Learning"
(arXiv 2503.19595); the estimators below are derived here and held by tests that enumerate every group.

Let f(S) be the value of a set S of k samples: the best reward (pass@k), or the reward of the most frequent
answer (majority@k; ties share). The objective is J = E f(y_1..y_k) over independent samples. With U the mean
of f over all k-subsets of the group's n samples and U_{-i} the mean over those without i, both unbiased for
J,

    A_i = n (U - U_{-i}),      grad J = E (1/n) sum_i A_i grad log pi(y_i)        for samples of pi

because E U s_i = (k/n) E f s_1 for each of n samples, while U_{-i} does not depend on y_i: a baseline. k = 1
is the reward minus the leave-one-out mean. For n > k the A_i have mean zero under ANY behaviour policy, which
is what off-policy centring needs (docs/objectives.md). For n = k nothing of size k is left without i; U_{-i}
is then f of the k - 1 others: still unbiased on samples of pi, not centred elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_VOTE_SUBSETS = 20_000
"""Votes of `majority@k` are counted subset by subset."""


def k_sample_advantages(
    rewards: Tensor, groups: Tensor, *, target: str, k: int, answers: Tensor | None = None
) -> Tensor:
    """Returns [N] float64 advantages A_i of the module's formula; 0 in groups of fewer than max(2, k)
    samples.

    rewards  [N] float
    groups   [N] int64, group ids in any order
    target   "pass" or "majority"
    k        at least 1
    answers  [N] int64, equal where samples of one group give one answer; needed for "majority"

    Raises ValueError for another target, k < 1, missing `answers`, or more than MAX_VOTE_SUBSETS subsets of a
    group to vote.
    """
    if target not in ("pass", "majority") or k < 1:
        raise ValueError(f"target is {target!r} with k = {k}; expected 'pass' or 'majority' and k >= 1")
    if target == "majority" and answers is None:
        raise ValueError("answers is None; target 'majority' needs the answer of each sample")
    advantages = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        n = len(members)
        if n < max(2, k):
            continue
        values = rewards[members].double()
        if target == "pass":
            whole, without = best_of(values, k), best_of(_leave_one_out(values), min(k, n - 1))
        else:
            assert answers is not None
            whole, without = _votes(values, answers[members], k)
        advantages[members] = n * (whole - without)
    return advantages


def best_of(values: Tensor, k: int) -> Tensor:
    """Returns [...], the mean over all k-subsets of `values` [..., m] of their largest.

        sum_j v_(j) C(j, k-1) / C(m, k)          j from 0, values ascending

    k = 0 gives 0, the value of no sample.
    """
    m = values.shape[-1]
    if k == 0:
        return values.new_zeros(values.shape[:-1])
    share = values.new_tensor([math.comb(j, k - 1) / math.comb(m, k) for j in range(m)])
    return (values.sort(dim=-1).values * share).sum(-1)


def vote_of(values: Tensor, answers: Tensor) -> Tensor:
    """Returns [S], the reward of the most frequent answer in each row of `values` [S, k]; tied answers count
    alike.
    """
    support = (answers[:, :, None] == answers[:, None, :]).sum(-1)
    wins = support == support.amax(-1, keepdim=True)
    return (values * wins).sum(-1) / wins.sum(-1)


def _votes(values: Tensor, answers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns U, and U_{-i} [n], of majority@k."""
    n = len(values)
    if math.comb(n, k) > MAX_VOTE_SUBSETS:
        raise ValueError(
            f"majority@{k} of {n} samples has {math.comb(n, k)} subsets to count, more than "
            f"{MAX_VOTE_SUBSETS}; choose a smaller k"
        )
    subsets = _subsets(n, k, values.device)
    outcome = vote_of(values[subsets], answers[subsets])
    if n == k:
        if k == 1:
            return outcome.mean(), values.new_zeros(n)
        others = torch.stack([torch.cat([subsets[0, :i], subsets[0, i + 1 :]]) for i in range(n)])
        return outcome.mean(), vote_of(values[others], answers[others])
    holds = torch.zeros(len(subsets), n, dtype=torch.bool, device=values.device).scatter_(1, subsets, True)
    return outcome.mean(), (outcome[:, None] * ~holds).sum(0) / (~holds).sum(0)


def _subsets(n: int, k: int, device: torch.device) -> Tensor:
    return torch.combinations(torch.arange(n, device=device), k).reshape(-1, k)


def _leave_one_out(values: Tensor) -> Tensor:
    """Returns [n, n-1]: row i is `values` without its i-th."""
    n = len(values)
    return values.expand(n, n)[~torch.eye(n, dtype=torch.bool, device=values.device)].view(n, n - 1)
