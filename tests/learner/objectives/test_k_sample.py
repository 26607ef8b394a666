"""pass@k and majority@k: the leave-one-out estimators against brute force over every group, and the
U-statistics against subsets.
"""

import itertools
import math

import pytest
import torch

from learner.objectives import TokenBatch, agro, load_objective, token_gradients
from learner.objectives._k_sample import best_of, k_sample_advantages, vote_of

Y = 4
generator = torch.Generator().manual_seed(5)
REWARDS = torch.tensor([0.0, 1.0, 0.3, 1.0], dtype=torch.float64)
ANSWERS = torch.tensor([7, 3, 7, 5])
MAJORITY_REWARDS = torch.tensor([0.0, 1.0, 0.0, 0.4], dtype=torch.float64)  # One reward an answer.
THETA = torch.randn(Y, generator=generator, dtype=torch.float64)
MU = torch.randn(Y, generator=generator, dtype=torch.float64).softmax(0)


def value_of(target, outcomes):
    """f of one tuple of outcomes, in plain Python."""
    if target == "pass":
        return max((REWARDS[y].item() for y in outcomes), default=0.0)
    votes = [ANSWERS[y].item() for y in outcomes]
    support = max((votes.count(answer) for answer in votes), default=0)
    tied = sorted({answer for answer in votes if votes.count(answer) == support})
    rewards = {ANSWERS[y].item(): MAJORITY_REWARDS[y].item() for y in outcomes}
    return sum(rewards[answer] for answer in tied) / len(tied) if tied else 0.0


def expected_value(target, k, policy):
    """J = E f of k independent samples; differentiable in `policy`."""
    return sum(
        value_of(target, outcomes) * math.prod(policy[y] for y in outcomes)  # type: ignore[type-var]
        for outcomes in itertools.product(range(Y), repeat=k)
    )


def advantages_of(target, k, group):
    rewards = REWARDS if target == "pass" else MAJORITY_REWARDS
    return k_sample_advantages(
        rewards[group], torch.zeros(len(group), dtype=torch.int64), target=target, k=k, answers=ANSWERS[group]
    )


CASES = [(target, n, k) for target in ("pass", "majority") for n in (2, 3, 4, 5) for k in (1, 2, 3) if k <= n]


@pytest.mark.parametrize(("target", "n", "k"), CASES)
def test_the_estimator_is_unbiased_for_the_gradient_of_what_k_samples_achieve(target, n, k):
    leaf = THETA.clone().requires_grad_()
    exact = torch.autograd.grad(expected_value(target, k, leaf.softmax(0)), leaf)[0]
    policy = THETA.softmax(0)
    scores = torch.eye(Y, dtype=torch.float64) - policy
    found = torch.zeros(Y, dtype=torch.float64)
    for outcomes in itertools.product(range(Y), repeat=n):
        group = torch.tensor(outcomes)
        found += policy[group].prod() * (advantages_of(target, k, group)[:, None] * scores[group]).mean(0)
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("target", "n", "k"), [case for case in CASES if case[2] < case[1]])
def test_with_more_samples_than_k_advantages_have_mean_zero_under_any_policy(target, n, k):
    mean = sum(
        MU[torch.tensor(outcomes)].prod() * advantages_of(target, k, torch.tensor(outcomes))[0]
        for outcomes in itertools.product(range(Y), repeat=n)
    )
    assert abs(mean) < 1e-12


def test_centring_the_transformed_rewards_as_if_they_were_rewards_would_be_biased():
    """So that the test above can fail: the value of the sets that hold j depends on y_i, where they
    hold i too.
    """
    leaf, n, k = THETA.clone().requires_grad_(), 3, 2
    exact = torch.autograd.grad(expected_value("pass", k, leaf.softmax(0)), leaf)[0]
    policy, found = THETA.softmax(0), torch.zeros(Y, dtype=torch.float64)
    for outcomes in itertools.product(range(Y), repeat=n):
        shared = [
            sum(
                value_of("pass", [outcomes[j] for j in subset])
                for subset in itertools.combinations(range(n), k)
                if i in subset
            )
            / 2
            for i in range(n)
        ]
        gain = torch.tensor(
            [k * (shared[i] - (sum(shared) - shared[i]) / (n - 1)) for i in range(n)], dtype=torch.float64
        )
        group = torch.tensor(outcomes)
        found += policy[group].prod() * (
            gain[:, None] * (torch.eye(Y, dtype=torch.float64) - policy)[group]
        ).mean(0)
    assert (found - exact).abs().max() > 0.3 * exact.abs().max()


@pytest.mark.parametrize(("m", "k"), [(m, k) for m in range(1, 7) for k in range(1, m + 1)])
def test_best_of_is_the_mean_over_all_subsets(m, k):
    values = torch.randn(m, generator=torch.Generator().manual_seed(10 * m + k), dtype=torch.float64)
    subsets = [max(values[i].item() for i in subset) for subset in itertools.combinations(range(m), k)]
    assert best_of(values, k).item() == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_tied_answers_share_the_vote():
    values = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
    answers = torch.tensor([[1, 1, 2], [1, 2, 3]])
    assert vote_of(values, answers).tolist() == [1.0, 0.5]


def test_k_one_is_the_leave_one_out_advantage_and_small_groups_get_nothing():
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([3, 8, 3, 3, 1])
    for target in ("pass", "majority"):
        found = k_sample_advantages(rewards, groups, target=target, k=1, answers=torch.arange(5))
        torch.testing.assert_close(found, torch.tensor([0.25, 0.0, -0.5, 0.25, 0.0], dtype=torch.float64))
    assert k_sample_advantages(rewards, groups, target="pass", k=4).abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target": "mean", "k": 1}, "target is 'mean'"),
        ({"target": "pass", "k": 0}, "k = 0"),
        ({"target": "majority", "k": 2}, "answers is None"),
        ({"target": "majority", "k": 10, "answers": torch.zeros(30, dtype=torch.int64)}, "subsets"),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        k_sample_advantages(torch.zeros(30), torch.zeros(30, dtype=torch.int64), **options)


def batch_of(rewards, logprobs, reference, **more):
    index = torch.arange(len(rewards))
    return TokenBatch(
        logprobs,
        torch.full_like(logprobs, -1.0),
        index,
        rewards,
        reference,
        index * 0,
        torch.zeros(len(rewards)),
        num_groups=1,
        **more,
    )


@pytest.mark.parametrize("target", ["pass@2", "majority@2"])
def test_it_composes_with_the_pull_to_the_reference(target):
    beta, index = 0.3, torch.arange(Y)
    rewards = REWARDS if target.startswith("pass") else MAJORITY_REWARDS
    logprobs, reference = THETA.log_softmax(0), torch.full((Y,), -math.log(Y), dtype=torch.float64)
    batch = batch_of(rewards, logprobs, reference, answers_N=ANSWERS)
    objective = load_objective(agro.Config(beta=beta, importance_weight="none", target=target))
    ell = logprobs - reference
    others = (ell.sum() - ell) / (Y - 1)
    gain = k_sample_advantages(rewards, index * 0, target=target.split("@")[0], k=2, answers=ANSWERS)
    torch.testing.assert_close(token_gradients(objective, batch), -(gain - beta * (ell - others)) / Y)
    assert ("answers" in objective.needs) == target.startswith("majority")
