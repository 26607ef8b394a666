"""The AGRO advantage against exhaustive enumeration, autograd and finite differences (docs/objectives.md)."""

import itertools
import math

import pytest
import torch

from learner.objectives._advantages import agro_advantages

BETA = 0.3
Y = 4
generator = torch.Generator().manual_seed(3)
REWARDS = torch.rand(Y, generator=generator, dtype=torch.float64)
REF = torch.randn(Y, generator=generator, dtype=torch.float64).log_softmax(0)
THETA = torch.randn(Y, generator=generator, dtype=torch.float64)
MU = torch.randn(Y, generator=generator, dtype=torch.float64).softmax(0)


def residual_of(theta):
    return REWARDS - BETA * (theta.log_softmax(0) - REF)


def half_variance(theta, mu):
    """L(pi, mu) = 1/2 Var_mu[R]."""
    residual = residual_of(theta)
    return 0.5 * (mu * (residual - (mu * residual).sum()) ** 2).sum()


def gradient_of(function, theta=THETA):
    leaf = theta.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def expected_gradient(sampler, n, advantages):
    """The exact expectation, over all Y^n groups of n independent samples, of the gradient of -1/n
    sum_i A_i logp_i.
    """
    groups = torch.tensor(list(itertools.product(range(Y), repeat=n)))
    probability = sampler[groups].prod(1)
    scores = torch.eye(Y, dtype=torch.float64) - THETA.softmax(0)  # grad log pi(y), a row per y
    ids = torch.arange(len(groups)).repeat_interleave(n)
    log_ratios = (THETA.log_softmax(0) - REF)[groups].flatten()
    a = advantages(REWARDS[groups].flatten(), log_ratios, ids).view(len(groups), n)
    return -(probability[:, None] * (a[:, :, None] * scores[groups]).mean(1)).sum(0)


def agro(**options):
    return lambda rewards, log_ratios, ids: agro_advantages(rewards, log_ratios, ids, beta=BETA, **options)


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_off_policy_is_unbiased_for_the_gradient_of_l_over_beta(n):
    exact = gradient_of(lambda theta: half_variance(theta, MU) / BETA)
    assert relative(expected_gradient(MU, n, agro()), exact) < 1e-12


def test_off_policy_agrees_with_finite_differences():
    step = 1e-5
    slopes = [
        (half_variance(THETA + step * unit, MU) - half_variance(THETA - step * unit, MU)) / (2 * step * BETA)
        for unit in torch.eye(Y, dtype=torch.float64)
    ]
    assert relative(expected_gradient(MU, 3, agro()), torch.stack(slopes)) < 1e-8


def test_on_fresh_samples_it_is_minus_the_gradient_of_the_regularised_reward():
    def regularised_reward(theta):
        log_pi = theta.log_softmax(0)
        return (log_pi.exp() * (REWARDS - BETA * (log_pi - REF))).sum()

    found = expected_gradient(THETA.softmax(0), 3, agro())
    assert relative(found, -gradient_of(regularised_reward)) < 1e-12


def test_centring_the_reward_alone_is_biased_off_policy():
    def reward_centred(rewards, log_ratios, ids):
        centred = agro_advantages(rewards, torch.zeros_like(rewards), ids, beta=BETA)
        return centred - BETA * log_ratios

    exact = gradient_of(lambda theta: half_variance(theta, MU) / BETA)
    assert relative(expected_gradient(MU, 3, reward_centred), exact) > 0.05


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("on_policy_baseline", ["none", "loo"])
@pytest.mark.parametrize("on_policy_coef", [0.01, 1.0])
def test_on_policy_term_is_unbiased(n, on_policy_baseline, on_policy_coef):
    pi = THETA.softmax(0)
    scores = torch.eye(Y, dtype=torch.float64) - pi
    deviation = residual_of(THETA) - (pi * residual_of(THETA)).sum()
    sampling = 0.5 * ((pi * deviation**2)[:, None] * scores).sum(0) / BETA  # 1/2 E_pi[(R-m)^2 s] / beta
    exact = gradient_of(lambda theta: half_variance(theta, pi) / BETA) + on_policy_coef * sampling
    found = expected_gradient(
        pi, n, agro(on_policy_coef=on_policy_coef, on_policy_baseline=on_policy_baseline)
    )
    assert relative(found, exact) < 1e-12


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_running_baseline_leaves_the_on_policy_term_unbiased_whatever_it_was(n):
    def running(rewards, log_ratios, ids):
        variances = torch.full_like(rewards, 0.7)  # Of earlier steps: the same whatever this group holds.
        return agro_advantages(
            rewards,
            log_ratios,
            ids,
            beta=BETA,
            on_policy_coef=1.0,
            on_policy_baseline="running",
            running_variances=variances,
        )

    exact = gradient_of(lambda theta: half_variance(theta, theta.softmax(0)) / BETA)
    assert relative(expected_gradient(THETA.softmax(0), n, running), exact) < 1e-12


@pytest.mark.parametrize("on_policy_baseline", ["none", "loo"])
def test_on_policy_coef_one_is_the_gradient_that_differentiates_the_sampling_too(on_policy_baseline):
    exact = gradient_of(lambda theta: half_variance(theta, theta.softmax(0)) / BETA)
    found = expected_gradient(
        THETA.softmax(0), 3, agro(on_policy_coef=1.0, on_policy_baseline=on_policy_baseline)
    )
    assert relative(found, exact) < 1e-12


@pytest.mark.parametrize("n", [4, 5])
def test_subtracting_the_group_mean_of_squares_would_be_biased(n):
    def biased(rewards, log_ratios, ids):
        off_policy = agro_advantages(rewards, log_ratios, ids, beta=BETA)
        squares = off_policy.square().view(-1, n)
        return off_policy - (squares - squares.mean(1, keepdim=True)).flatten() / (2 * BETA)

    exact = gradient_of(lambda theta: half_variance(theta, theta.softmax(0)) / BETA)
    assert relative(expected_gradient(THETA.softmax(0), n, biased), exact) > 0.1


def test_loo_baseline_lowers_the_variance_of_the_on_policy_term():
    ids = torch.arange(20000).repeat_interleave(6)
    draws = torch.multinomial(
        THETA.softmax(0), len(ids), replacement=True, generator=torch.Generator().manual_seed(0)
    )
    arguments = REWARDS[draws], (THETA.log_softmax(0) - REF)[draws], ids
    off_policy = agro()(*arguments)
    terms = {
        name: agro(on_policy_coef=1.0, on_policy_baseline=name)(*arguments) - off_policy
        for name in ("none", "loo")
    }
    assert terms["loo"].square().mean() < 0.9 * terms["none"].square().mean()
    assert abs(terms["loo"].mean()) < 0.05 * abs(terms["none"].mean())


def test_in_a_group_of_two_the_loo_baseline_is_zero():
    rewards, log_ratios, ids = torch.tensor([1.0, 0.0]), torch.tensor([0.2, -0.1]), torch.tensor([5, 5])
    found = [
        agro(on_policy_coef=0.5, on_policy_baseline=name)(rewards, log_ratios, ids)
        for name in ("none", "loo")
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], agro()(rewards, log_ratios, ids))


def slow_advantages(rewards, log_ratios, groups, *, beta, on_policy_coef=0.0, on_policy_baseline="loo"):
    """The docstring's formulas, one sample at a time."""
    residuals = [r - beta * ell for r, ell in zip(rewards, log_ratios, strict=True)]
    advantages = []
    for i, group in enumerate(groups):
        others = [residuals[j] for j in range(len(groups)) if groups[j] == group and j != i]
        if not others:
            advantages.append(0.0)
            continue
        n, mean = len(others) + 1, sum(others) / len(others)
        baseline = 0.0
        if on_policy_baseline == "loo" and n >= 3:
            baseline = n / (n - 1) * sum((value - mean) ** 2 for value in others) / (n - 2)
        a = residuals[i] - mean
        advantages.append(a - (on_policy_coef / (2 * beta) * (a**2 - baseline) if on_policy_coef else 0.0))
    return torch.tensor(advantages, dtype=torch.float64)


def mixed_groups(seed):
    """Groups of 1 to 7 samples, shuffled, with ids from all over int64."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1, 2, 3, 7, 2, 1, 5])
    ids = torch.tensor([7, -(2**62), 0, 2**62, 3, -1, 10**12]).repeat_interleave(sizes)
    order = torch.randperm(len(ids), generator=random)
    draw = torch.randn(2, len(ids), generator=random, dtype=torch.float64)
    return draw[0], draw[1], ids[order]


OPTIONS = [
    {"beta": 0.0},
    {"beta": 0.7},
    {"beta": 0.2, "on_policy_coef": 0.3, "on_policy_baseline": "none"},
    {"beta": 0.2, "on_policy_coef": 0.3, "on_policy_baseline": "loo"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_mixed_groups_in_any_order_agree_with_the_formula_read_aloud(options):
    rewards, log_ratios, ids = mixed_groups(0)
    found = agro_advantages(rewards, log_ratios, ids, **options)
    expected = slow_advantages(rewards.tolist(), log_ratios.tolist(), ids.tolist(), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_permuting_the_samples_permutes_the_advantages(options):
    arguments = mixed_groups(1)
    order = torch.randperm(len(arguments[0]), generator=torch.Generator().manual_seed(2))
    permuted = agro_advantages(*(argument[order] for argument in arguments), **options)
    torch.testing.assert_close(
        permuted, agro_advantages(*arguments, **options)[order], rtol=1e-13, atol=1e-13
    )


def test_it_is_the_gradient_of_half_the_unbiased_variance_over_beta():
    rewards, log_ratios, ids = mixed_groups(4)
    leaf = log_ratios.clone().requires_grad_()  # ell moves as log pi does
    residual = rewards - BETA * leaf
    members = [ids == group for group in ids.unique()]
    loss = sum(0.5 * residual[member].var(unbiased=True) / BETA for member in members if member.sum() > 1)
    sizes = torch.stack([member.sum() * member for member in members]).sum(0)
    found = -agro_advantages(rewards, log_ratios, ids, beta=BETA) / sizes
    torch.testing.assert_close(found, torch.autograd.grad(loss, leaf)[0], rtol=1e-12, atol=1e-12)


def test_at_the_optimum_every_advantage_is_zero_and_the_residual_is_beta_log_z():
    log_pi_star = (REF + REWARDS / BETA).log_softmax(0)
    draws = torch.randint(Y, (30,), generator=torch.Generator().manual_seed(5))
    log_ratios = (log_pi_star - REF)[draws]
    found = agro()(REWARDS[draws], log_ratios, torch.arange(30) % 7)
    assert found.abs().max() < 1e-14
    beta_log_z = BETA * (REF + REWARDS / BETA).logsumexp(0)
    torch.testing.assert_close(REWARDS[draws] - BETA * log_ratios, beta_log_z.expand(30))
    assert (
        agro()(REWARDS[draws], torch.zeros(30, dtype=torch.float64), torch.arange(30) % 7).abs().max() > 0.01
    )


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_a_large_common_offset_costs_no_accuracy_in_float32(options):
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0, 0.0, 0.125])
    log_ratios = torch.tensor([0.5, -0.25, 2.0, 1.0, -3.0, 0.0, 0.75])
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    offset = 2.0**18  # exact in float32 with these fractions; the mean of the others is not
    found = agro_advantages(rewards + offset, log_ratios, ids, **options)
    expected = slow_advantages(rewards.tolist(), log_ratios.tolist(), ids.tolist(), **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_group_of_one_gets_zero_and_no_samples_give_none():
    found = agro(on_policy_coef=0.5)(
        torch.tensor([3.0, 1e6]), torch.tensor([1.0, -7.7]), torch.tensor([1, 2])
    )
    assert torch.equal(found, torch.zeros(2))
    assert agro()(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_rewards_and_is_detached(dtype):
    log_ratios = torch.randn(4, dtype=dtype, requires_grad=True)
    found = agro()(torch.rand(4, dtype=dtype), log_ratios, torch.tensor([0, 0, 1, 1]))
    assert found.dtype == dtype
    assert not found.requires_grad


GOOD = {"rewards": torch.rand(3), "log_ratios": torch.rand(3), "groups": torch.tensor([0, 0, 1])}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rewards": torch.rand(3, 1)}, "rewards"),
        ({"rewards": torch.rand(3).half()}, "rewards"),
        ({"rewards": torch.tensor([0, 1, 1])}, "rewards"),
        ({"rewards": torch.tensor([0.0, math.nan, 1.0])}, r"rewards\[1\] is nan"),
        ({"log_ratios": torch.rand(2)}, "log_ratios"),
        ({"log_ratios": torch.rand(3, dtype=torch.float64)}, "log_ratios"),
        ({"log_ratios": torch.tensor([0.0, 0.0, -math.inf])}, r"log_ratios\[2\] is -inf"),
        ({"groups": torch.tensor([0, 1])}, "groups"),
        ({"groups": torch.tensor([0, 0, 1], dtype=torch.int32)}, "groups"),
        ({"groups": torch.rand(3)}, "groups"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"beta": 0.0, "on_policy_coef": 0.1}, "beta"),
        ({"on_policy_coef": -1.0}, "on_policy_coef"),
        ({"on_policy_coef": math.nan}, "on_policy_coef"),
        ({"on_policy_baseline": "mean"}, "on_policy_baseline"),
        ({"on_policy_baseline": "running"}, "running_variances"),
    ],
)
def test_a_bad_argument_is_named(changed, named):
    with pytest.raises(ValueError, match=named):
        agro_advantages(**(GOOD | {"beta": 0.1} | changed))
