"""Where two objectives must be one."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from learner.catalogue import OBJECTIVES
from learner.objectives import TokenBatch, load_objective, token_gradients
from tests.support.learning.plain_objectives import (
    BETA,
    GROUPS,
    LENGTHS,
    NUM_GROUPS,
    REWARDS,
    gradients,
    make_batch,
    make_objective,
    sizes,
)


def agro(beta=BETA):
    return load_objective(OBJECTIVES["agro"](beta=beta, importance_weight="none"))


def on_policy(batch):
    return dataclasses.replace(
        batch, behaviour_logprobs_T=batch.logprobs_T, proximal_logprobs_T=batch.logprobs_T
    )


def test_rloo_on_fresh_data_is_agro_and_on_stale_data_is_not():
    stale, fresh = make_batch(), on_policy(make_batch())
    torch.testing.assert_close(
        token_gradients(make_objective("rloo"), fresh), token_gradients(agro(), fresh), rtol=0, atol=1e-14
    )
    assert (
        token_gradients(make_objective("rloo"), stale) - token_gradients(agro(), stale)
    ).abs().max() > 1e-3


def test_tba_is_agro_times_one_less_than_n_over_n():
    batch = make_batch()
    factor_N = (sizes(batch) - 1) / sizes(batch)
    expected = token_gradients(agro(), batch) * factor_N[batch.sequence_T]
    torch.testing.assert_close(token_gradients(make_objective("tba"), batch), expected, rtol=0, atol=1e-14)


def test_on_fresh_data_and_without_kl_dr_grpo_is_group_mean_reinforce_and_rloo_up_to_n():
    batch = on_policy(make_batch())
    means = {
        group: np.mean([r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]) for group in GROUPS
    }
    coefficient_N = torch.tensor(
        [-(r - means[g]) / GROUPS.count(g) / NUM_GROUPS for r, g in zip(REWARDS, GROUPS, strict=True)]
    )
    found = token_gradients(make_objective("dr_grpo", beta=0.0), batch)
    torch.testing.assert_close(found, coefficient_N[batch.sequence_T], rtol=0, atol=1e-14)
    stretch_N = sizes(batch) / (sizes(batch) - 1).clamp_min(1)
    rloo = token_gradients(make_objective("rloo", beta=0.0), batch)
    torch.testing.assert_close(found * stretch_N[batch.sequence_T], rloo, rtol=0, atol=1e-14)


def test_on_fresh_data_grpo_gspo_and_decoupled_ppo_are_one_and_cispo_differs_in_the_length_divisor_only():
    batch = on_policy(make_batch())
    grpo, gspo, ppo, cispo = (
        gradients(make_objective(name, 0.0), batch)[0] for name in ("grpo", "gspo", "ppo_decoupled", "cispo")
    )
    torch.testing.assert_close(gspo, grpo, rtol=0, atol=1e-14)
    torch.testing.assert_close(ppo, grpo, rtol=0, atol=1e-14)
    lengths_N = torch.tensor(LENGTHS, dtype=torch.float64)
    tokens_N = torch.tensor(
        [sum(n for n, g in zip(LENGTHS, GROUPS, strict=True) if g == group) for group in GROUPS]
    )
    torch.testing.assert_close(cispo, grpo * lengths_N * sizes(batch) / tokens_N, rtol=0, atol=1e-14)
    assert grpo.abs().max() > 0.05


def test_without_shift_asymre_is_dr_grpo_on_fresh_data_and_the_shift_adds_likelihood():
    batch = on_policy(make_batch())
    plain, shifted = (
        token_gradients(make_objective("asymre", 0.0, baseline_shift=shift), batch) for shift in (0.0, 0.5)
    )
    torch.testing.assert_close(
        plain, token_gradients(make_objective("dr_grpo", 0.0), batch), rtol=0, atol=1e-14
    )
    push_N = torch.where(sizes(batch) > 1, -0.5 / sizes(batch) / NUM_GROUPS, 0.0)
    torch.testing.assert_close(shifted - plain, push_N[batch.sequence_T], rtol=0, atol=1e-14)


def test_with_the_proximal_policy_at_mu_decoupled_ppo_is_grpo():
    batch = make_batch()
    joined = dataclasses.replace(batch, proximal_logprobs_T=batch.behaviour_logprobs_T)
    torch.testing.assert_close(
        token_gradients(make_objective("ppo_decoupled"), joined),
        token_gradients(make_objective("grpo"), joined),
        rtol=0,
        atol=1e-14,
    )


def test_topr_is_plain_for_good_samples_and_never_heavier_for_bad_ones():
    batch = make_batch()
    plain = gradients(make_objective("asymre", 0.0, baseline_shift=0.0), batch)[0]
    tapered = gradients(make_objective("topr", 0.0), batch)[0]
    good = plain <= 0
    torch.testing.assert_close(tapered[good], plain[good], rtol=0, atol=1e-14)
    assert (tapered[~good] <= plain[~good]).all()
    assert (tapered[~good] < plain[~good]).any()


def descend(objective, beta, steps=400):
    """KL(pi, pi*) over KL(pi_ref, pi*) after exact descent on data of pi_ref, offline: six outcomes,
    each as often as drawn.
    """
    random = torch.Generator().manual_seed(3)
    counts = torch.tensor([1, 2, 3, 4, 5, 6])
    reference, rewards = (counts.double() / counts.sum()).log(), torch.rand(6, generator=random).double()
    outcome = torch.arange(6).repeat_interleave(counts)
    optimum, theta, index = (
        (reference + rewards / beta).log_softmax(0),
        reference.clone().requires_grad_(),
        torch.arange(len(outcome)),
    )
    for _ in range(steps):
        logprobs, old = theta.log_softmax(0)[outcome], reference[outcome]
        batch = TokenBatch(
            logprobs, old, index, rewards[outcome], old, index * 0, index.double(), 1, old, logprobs.detach()
        )
        theta = (
            (theta - 10 * torch.autograd.grad(objective.loss(batch)[0], theta)[0]).detach().requires_grad_()
        )
    kl = [(p.exp() * (p - optimum)).sum().item() for p in (theta.log_softmax(0), reference)]
    return kl[0] / kl[1]


def test_offline_the_regressions_reach_the_optimum_and_policy_gradients_do_not():
    # oapl: mu = pi_ref here, and V is exact
    for objective in (agro(), make_objective("tba"), make_objective("oapl")):
        assert abs(descend(objective, BETA)) < 1e-12
    for name in ("kl_pg", "grpo", "rloo"):
        assert descend(make_objective(name), BETA) > 0.03
