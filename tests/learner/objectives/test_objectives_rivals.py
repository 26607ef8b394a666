"""The rivals: each against a plain-loop re-computation and its finite differences, and the identities that
tie them together.

The re-computation shares no code with the objectives. `live` holds the log-probs that are differentiated,
`frozen` the same numbers inside stop-gradients: a finite difference moves only `live`.
"""

import dataclasses
import itertools
import math
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from learner.catalogue import OBJECTIVES, parse_config
from learner.objectives import NEEDS, TokenBatch, load_objective, token_gradients
from tests.support import ROOT

RIVALS = (
    "kl_pg",
    "rloo",
    "grpo",
    "dr_grpo",
    "ppo_decoupled",
    "tba",
    "oapl",
    "topr",
    "asymre",
    "cispo",
    "gspo",
)
REGRESSIONS = ("tba", "oapl")
OF_SEQUENCES = ("tba", "oapl", "topr", "gspo")  # one term per sequence: no token-level weights
WITH_RATIO = ("grpo", "dr_grpo", "cispo", "gspo", "topr")
IN_REWARD = ("kl_pg", "rloo", "tba")
CORRECTIONS = ("none", "tis_token", "tis_sequence", "mis_token", "mis_sequence")
VALID = [
    (name, kind)
    for name in RIVALS
    for kind in CORRECTIONS
    if not (name in OF_SEQUENCES and kind.endswith("_token"))
]
WITH_BETA = [(*pair, beta) for pair in VALID for beta in (0.0, 0.2) if beta or pair[0] not in REGRESSIONS]
BETA, CLIP_LOW, CLIP_HIGH, CAP, SHIFT = 0.2, 0.15, 0.3, 1.3, 0.25

LENGTHS = (3, 1, 4, 2, 2, 5, 1, 3, 2, 0)
GROUPS = (4, 9, 4, 4, 9, 9, 2, 7, 7, 9)  # sizes 3, 4, 1, 2
REWARDS = (1.0, 0.0, 0.0, 0.7, 0.0, 1.0, 1.0, 0.5, 0.5, 0.3)
NUM_GROUPS = 6  # of the whole step: two are elsewhere
FIELD_OF_NEED = {
    "behaviour_logprobs": "behaviour_logprobs_T",
    "reference": "ref_logprobs_N",
    "reference_tokens": "ref_logprobs_T",
    "proximal": "proximal_logprobs_T",
}


def make_batch(seed=0, spread=0.6, **changes):
    """Four policies `spread` nats a token apart, of random ragged groups."""
    random = np.random.default_rng(seed)
    count = sum(LENGTHS)
    base = -random.uniform(0.5, 2.5, count)
    logprobs, behaviour, proximal, reference = (
        torch.tensor(base + spread * random.normal(size=count)) for _ in range(4)
    )
    sequence_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    rewards_N = torch.tensor(REWARDS, dtype=torch.float64)
    fields: dict[str, Any] = {
        "logprobs_T": logprobs,
        "behaviour_logprobs_T": behaviour,
        "sequence_T": sequence_T,
        "rewards_N": rewards_N,
        "ref_logprobs_N": torch.zeros_like(rewards_N).index_add(0, sequence_T, reference),
        "groups_N": torch.tensor(GROUPS),
        "staleness_N": torch.full_like(rewards_N, math.nan),
        "num_groups": NUM_GROUPS,
        "ref_logprobs_T": reference,
        "proximal_logprobs_T": proximal,
    }
    return TokenBatch(**(fields | changes))


def make_objective(name, beta=BETA, **knobs):
    kind = OBJECTIVES[name]
    options: dict[str, Any] = {
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "importance_cap": CAP,
        "baseline_shift": SHIFT,
    }
    common = {knob: value for knob, value in options.items() if knob in kind.model_fields}
    return load_objective(kind(beta=beta, **common | knobs))


def refused(name, **knobs):
    """The message with which a file that asks for this is refused."""
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {
                "model": {"path": "m"},
                "data": {"path": "d"},
                "rewards": {"functions": [{"name": "exact_match"}]},
                "objective": {"name": name, **knobs},
            }
        )
    return str(caught.value)


def gradients(objective, batch):
    """[N] the gradient summed over each sequence's tokens, and [T] itself."""
    found = token_gradients(objective, batch)
    return batch.sequence_sums(found), found


# --- the re-computation ---


class Scalars:
    """The batch as lists of floats per sequence; methods read the formulas aloud for sample `i`."""

    def __init__(self, batch, correction, beta):
        self.correction, self.beta, self.num_groups = correction, beta, batch.num_groups
        self.sequence = batch.sequence_T.tolist()
        self.groups, self.rewards = batch.groups_N.tolist(), batch.rewards_N.tolist()
        self.live = self.frozen = self.split(batch.logprobs_T.tolist())
        self.mu, self.prox = (
            self.split(batch.behaviour_logprobs_T.tolist()),
            self.split(batch.proximal_logprobs_T.tolist()),
        )
        self.ref = self.split(batch.ref_logprobs_T.tolist())

    def split(self, values):
        rows: list[list[float]] = [[] for _ in self.groups]
        for sequence, value in zip(self.sequence, values, strict=True):
            rows[sequence].append(value)
        return rows

    def members(self, i):
        return [j for j in range(len(self.groups)) if self.groups[j] == self.groups[i]]

    def group_rewards(self, i):
        return [self.rewards[j] for j in self.members(i)]

    def others_mean(self, i, values):
        return float(np.mean([values[j] for j in self.members(i) if j != i]))

    def centred(self, i):
        return self.rewards[i] - float(np.mean(self.group_rewards(i)))

    def standardised(self, i):
        std = float(np.std(self.group_rewards(i), ddof=1))
        return 0.0 if std < 1e-12 else self.centred(i) / (std + 1e-6)

    def limited(self, log_weight):
        weight = math.exp(log_weight)
        if self.correction.startswith("tis"):
            return min(weight, CAP)
        return weight if weight <= CAP else 0.0

    def weights(self, i, above, uncorrected=None):
        """One importance weight per token: `above` over mu, of the token or of the sequence."""
        logs = [a - m for a, m in zip(above[i], self.mu[i], strict=True)]
        if self.correction == "none":
            return [1.0 if uncorrected is None else math.exp(value) for value in logs]
        if self.correction.endswith("sequence"):
            return [self.limited(sum(logs))] * len(logs)
        return [self.limited(value) for value in logs]

    def sequence_weight(self, i, above):
        return 1.0 if self.correction == "none" else self.limited(sum(above[i]) - sum(self.mu[i]))

    def old(self):
        return self.mu if self.correction == "none" else self.prox

    def k3(self, i):
        return [
            self.beta * (math.exp(r - p) - (r - p) - 1)
            for r, p in zip(self.ref[i], self.live[i], strict=True)
        ]


def clipped(ratio, advantage):
    return min(ratio * advantage, min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH) * advantage)


def term(name, s, i):
    """What sample i adds to the loss, before the division by n and P."""
    if name in REGRESSIONS:
        return regression_term(name, s, i)
    if name in ("grpo", "dr_grpo", "ppo_decoupled", "gspo"):
        return surrogate_term(name, s, i)
    own, live = s.frozen, s.live[i]
    if name == "kl_pg":
        advantage = s.rewards[i] - s.others_mean(i, s.rewards) - s.beta * (sum(own[i]) - sum(s.ref[i]))
        return -sum(w * advantage * p for w, p in zip(s.weights(i, own), live, strict=True))
    if name == "rloo":
        penalised = [r - s.beta * (sum(m) - sum(q)) for r, m, q in zip(s.rewards, s.mu, s.ref, strict=True)]
        advantage = penalised[i] - s.others_mean(i, penalised)
        return -sum(w * advantage * p for w, p in zip(s.weights(i, own), live, strict=True))
    if name == "asymre":
        advantage = s.rewards[i] - (float(np.mean(s.group_rewards(i))) - SHIFT)
        return sum(k - w * advantage * p for k, w, p in zip(s.k3(i), s.weights(i, own), live, strict=True))
    if name == "topr":
        advantage = s.centred(i)
        taper = 1.0 if advantage >= 0 else min(1.0, math.exp(sum(own[i]) - sum(s.old()[i])))
        return sum(
            k - w * taper * advantage * p for k, w, p in zip(s.k3(i), s.weights(i, s.prox), live, strict=True)
        )
    assert name == "cispo"
    rhos = [min(math.exp(p - o), 1 + CLIP_HIGH) for p, o in zip(own[i], s.old()[i], strict=True)]
    advantage, num_tokens = s.standardised(i), sum(len(s.live[j]) for j in s.members(i))
    terms = zip(s.k3(i), s.weights(i, s.prox), rhos, live, strict=True)
    return len(s.members(i)) / num_tokens * sum(k - w * rho * advantage * p for k, w, rho, p in terms)


def surrogate_term(name, s, i):
    advantage = s.centred(i) if name == "dr_grpo" else s.standardised(i)
    if name == "gspo":
        length = max(len(s.live[i]), 1)
        ratio = math.exp((sum(s.live[i]) - sum(s.old()[i])) / length)
        return sum(s.k3(i)) / length - s.sequence_weight(i, s.prox) * clipped(ratio, advantage)
    old = s.prox if name == "ppo_decoupled" else s.old()
    weights = s.weights(i, s.prox, uncorrected="ratio" if name == "ppo_decoupled" else None)
    ratios = [math.exp(p - o) for p, o in zip(s.live[i], old[i], strict=True)]
    terms = [k - w * clipped(ratio, advantage) for k, w, ratio in zip(s.k3(i), weights, ratios, strict=True)]
    return sum(terms) / (1 if name == "dr_grpo" else max(len(terms), 1))


def regression_term(name, s, i):
    weight = s.sequence_weight(i, s.frozen)
    if name == "tba":
        log_z = float(
            np.mean([s.rewards[j] / s.beta - (sum(s.frozen[j]) - sum(s.ref[j])) for j in s.members(i)])
        )
        gap = log_z + sum(s.live[i]) - sum(s.ref[i]) - s.rewards[i] / s.beta
        return weight * s.beta / 2 * gap**2
    value = s.beta * math.log(np.mean([math.exp(r / s.beta) for r in s.group_rewards(i)]))
    gap = s.beta * (sum(s.live[i]) - sum(s.mu[i])) - (s.rewards[i] - value)
    return weight * gap**2 / (2 * s.beta)


def scalar_loss(name, s):
    counted = [i for i in range(len(s.groups)) if len(s.members(i)) > 1]
    return sum(term(name, s, i) / len(s.members(i)) for i in counted) / s.num_groups


@pytest.mark.parametrize(("name", "correction", "beta"), WITH_BETA)
def test_loss_and_gradient_are_those_of_the_formula_in_plain_loops(name, correction, beta):
    largest = 0.0
    for seed in range(3):
        batch = make_batch(seed)
        objective, scalars = (
            make_objective(name, beta, importance_weight=correction),
            Scalars(batch, correction, beta),
        )
        loss, _ = objective.loss(batch)
        assert loss.item() == pytest.approx(scalar_loss(name, scalars), abs=1e-12)
        values, step, differences = batch.logprobs_T.tolist(), 1e-6, []
        for t in range(len(values)):
            ends = []
            for sign in (1, -1):
                scalars.live = scalars.split([v + sign * step * (k == t) for k, v in enumerate(values)])
                ends.append(scalar_loss(name, scalars))
            differences.append((ends[0] - ends[1]) / (2 * step))
        found = token_gradients(objective, batch)
        np.testing.assert_allclose(found.numpy(), differences, rtol=1e-7, atol=1e-9)
        largest = max(largest, found.abs().max().item())
    assert largest > 1e-3


def test_the_random_batches_clip_cap_and_mask_some_but_not_all():
    batch = make_batch()
    for above, below in itertools.combinations(
        (batch.logprobs_T, batch.proximal_logprobs_T, batch.behaviour_logprobs_T), 2
    ):
        ratio_T, ratio_N = (above - below).exp(), batch.sequence_sums(above - below).exp()
        assert 0.2 < ((ratio_T < 1 - CLIP_LOW) | (ratio_T > 1 + CLIP_HIGH)).double().mean() < 0.9
        assert 0 < (ratio_T > CAP).sum() < len(ratio_T)
        assert 0 < (ratio_N > CAP).sum() < len(ratio_N)


# --- identities ---


def agro(beta=BETA):
    return load_objective(OBJECTIVES["agro"](beta=beta, importance_weight="none"))


def on_policy(batch):
    return dataclasses.replace(
        batch, behaviour_logprobs_T=batch.logprobs_T, proximal_logprobs_T=batch.logprobs_T
    )


def sizes(batch):
    return torch.tensor([GROUPS.count(group) for group in batch.groups_N.tolist()], dtype=torch.float64)


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


# --- sums, needs, edges ---


def select(batch, keep_N):
    """The batch of the sequences in `keep_N` only."""
    keep_T, renumber = keep_N[batch.sequence_T], keep_N.cumsum(0) - 1
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    kept = {
        name: value[keep_T if name.endswith("_T") else keep_N]
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(batch, **(kept | {"sequence_T": renumber[kept["sequence_T"]]}))


@pytest.mark.parametrize(("name", "correction"), VALID)
def test_losses_and_gradients_of_groups_add_up(name, correction):
    batch, objective = make_batch(), make_objective(name, importance_weight=correction)
    first = torch.isin(batch.groups_N, torch.tensor([4, 7]))
    halves = [select(batch, keep) for keep in (first, ~first)]
    assert objective.loss(batch)[0].item() == pytest.approx(
        sum(objective.loss(half)[0].item() for half in halves), abs=1e-13
    )
    whole = token_gradients(objective, batch)
    for half, keep in zip(halves, (first, ~first), strict=True):
        torch.testing.assert_close(
            token_gradients(objective, half), whole[keep[batch.sequence_T]], rtol=0, atol=1e-14
        )


@pytest.mark.parametrize(("name", "correction", "beta"), WITH_BETA)
def test_needs_are_sufficient_and_each_is_used(name, correction, beta):
    batch, objective = make_batch(), make_objective(name, beta, importance_weight=correction)
    assert objective.needs <= NEEDS
    spared = {
        field: getattr(batch, field) * math.nan if need in ("behaviour_logprobs", "reference") else None
        for need, field in FIELD_OF_NEED.items()
        if need not in objective.needs
    }
    lean = dataclasses.replace(batch, **spared)
    assert torch.equal(token_gradients(objective, lean), token_gradients(objective, batch))
    found, expected = objective.loss(lean), objective.loss(batch)
    assert torch.equal(found[0], expected[0])
    assert all(
        torch.equal(found[1][key].nan_to_num(-7.0), expected[1][key].nan_to_num(-7.0)) for key in expected[1]
    )
    for need in objective.needs:
        field = FIELD_OF_NEED[need]
        moved = dataclasses.replace(
            batch, **{field: getattr(batch, field) - 0.1 * torch.arange(len(getattr(batch, field)))}
        )
        assert objective.loss(moved)[0] != expected[0]
        with pytest.raises(ValueError, match=field):
            objective.loss(dataclasses.replace(batch, **{field: getattr(batch, field) * math.nan}))


def test_needs_by_objective():
    def needs(name, **options):
        return sorted(make_objective(name, **options).needs)

    assert needs("kl_pg") == needs("tba") == ["reference"]
    assert needs("rloo") == ["behaviour_logprobs", "reference"]
    assert needs("rloo", beta=0.0) == needs("kl_pg", beta=0.0) == needs("asymre", beta=0.0) == []
    assert needs("oapl") == ["behaviour_logprobs"]
    assert needs("asymre") == ["reference_tokens"]
    for name in WITH_RATIO:
        assert needs(name) == ["behaviour_logprobs", "reference_tokens"]
        assert needs(name, beta=0.0, importance_weight="tis_sequence") == ["behaviour_logprobs", "proximal"]
    assert needs("ppo_decoupled", beta=0.0) == ["behaviour_logprobs", "proximal"]


@pytest.mark.parametrize("name", RIVALS)
def test_diagnostics_have_the_fixed_names_and_say_what_they_are(name):
    batch, objective = make_batch(logprobs_T=make_batch().logprobs_T.requires_grad_()), make_objective(name)
    diagnostics = objective.loss(batch)[1]
    assert set(diagnostics) == {"advantage", "residual", "log_ratio", "weight", "zero_std"}
    assert all(
        values.shape == (len(LENGTHS),) and not values.requires_grad for values in diagnostics.values()
    )
    assert diagnostics["zero_std"].tolist() == [False] * 6 + [True] * 3 + [False]
    assert diagnostics["advantage"][6] == 0
    log_ratio_N = batch.sequence_sums(batch.logprobs_T.detach()) - batch.ref_logprobs_N
    if name == "oapl":
        assert diagnostics["residual"].isnan().all()
        return
    torch.testing.assert_close(diagnostics["log_ratio"], log_ratio_N, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        diagnostics["residual"], batch.rewards_N - BETA * log_ratio_N, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize(("name", "correction"), VALID)
def test_the_reported_weight_is_the_mean_factor_on_the_advantage(name, correction):
    batch = make_batch()
    scalars, weight_N = (
        Scalars(batch, correction, BETA),
        make_objective(name, importance_weight=correction).loss(batch)[1]["weight"],
    )
    own = scalars.prox if name in (*WITH_RATIO, "ppo_decoupled") else scalars.frozen
    for i in (0, 2, 3, 5):
        factors = scalars.weights(i, own, uncorrected="ratio" if name == "ppo_decoupled" else None)
        old = scalars.prox if name == "ppo_decoupled" else scalars.old()
        logs = [p - o for p, o in zip(scalars.frozen[i], old[i], strict=True)]
        if name in ("grpo", "dr_grpo", "ppo_decoupled", "cispo"):
            limit = 1 + CLIP_HIGH if name == "cispo" else math.inf
            factors = [w * min(math.exp(log), limit) for w, log in zip(factors, logs, strict=True)]
        elif name == "gspo":
            factors = [w * math.exp(np.mean(logs)) for w in factors]
        elif name == "topr" and scalars.centred(i) < 0:
            factors = [w * min(1.0, math.exp(sum(logs))) for w in factors]
        assert weight_N[i].item() == pytest.approx(np.mean(factors), abs=1e-12)


@pytest.mark.parametrize("name", RIVALS)
def test_a_group_of_one_contributes_nothing(name):
    batch, objective = make_batch(), make_objective(name)
    by_sequence, by_token = gradients(objective, batch)
    assert by_sequence[6] == 0
    alone = select(batch, batch.groups_N == 2)
    assert objective.loss(alone)[0] == 0
    assert (token_gradients(objective, alone) == 0).all()
    without = select(batch, batch.groups_N != 2)
    torch.testing.assert_close(
        token_gradients(objective, without), by_token[batch.sequence_T != 6], rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("reward", [0.0, 0.1, -1e6])
def test_equal_rewards_give_no_advantage_and_no_nan(name, reward):
    batch = make_batch(rewards_N=torch.full((len(LENGTHS),), reward, dtype=torch.float64))
    loss, diagnostics = make_objective(name).loss(batch)
    assert loss.isfinite()
    assert token_gradients(make_objective(name), batch).isfinite().all()
    assert diagnostics["zero_std"].all()
    if name in ("grpo", "ppo_decoupled", "cispo", "gspo"):
        assert (diagnostics["advantage"] == 0).all()
        assert (token_gradients(make_objective(name, 0.0), batch) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "correction"), VALID)
def test_far_apart_policies_overflow_nothing(name, correction, dtype):
    objective = make_objective(name, importance_weight=correction)
    for shifts in itertools.product((-5e3, 0.0, 5e3), repeat=3):
        batch = make_batch()
        fields = ("behaviour_logprobs_T", "proximal_logprobs_T", "ref_logprobs_T")
        moved = {
            field: (getattr(batch, field) + shift).to(dtype)
            for field, shift in zip(fields, shifts, strict=True)
        }
        moved["ref_logprobs_N"] = batch.sequence_sums(moved["ref_logprobs_T"].double())
        batch = dataclasses.replace(batch, logprobs_T=batch.logprobs_T.to(dtype), **moved)
        loss, diagnostics = objective.loss(batch)
        found = token_gradients(objective, batch)
        assert loss.isfinite()
        assert loss.dtype == found.dtype == dtype
        assert found.isfinite().all()
        assert diagnostics["weight"].isfinite().all()


@pytest.mark.parametrize("name", RIVALS)
def test_single_precision_log_probs_change_only_the_rounding(name):
    batch, objective = make_batch(), make_objective(name)
    single = dataclasses.replace(batch, logprobs_T=batch.logprobs_T.float())
    torch.testing.assert_close(
        token_gradients(objective, single).double(), token_gradients(objective, batch), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", RIVALS)
def test_the_clip_stops_gradients_where_the_formula_does_and_weights_carry_none(name):
    batch = make_batch()
    others = ("behaviour_logprobs_T", "proximal_logprobs_T", "ref_logprobs_T", "ref_logprobs_N", "rewards_N")
    leaves = {field: getattr(batch, field).clone().requires_grad_() for field in others}
    batch = dataclasses.replace(batch, logprobs_T=batch.logprobs_T.clone().requires_grad_())
    wanted = torch.autograd.grad(make_objective(name).loss(batch)[0], batch.logprobs_T)[0]
    torch.testing.assert_close(
        token_gradients(make_objective(name), dataclasses.replace(batch, **leaves)).detach(), wanted
    )
    if name in ("grpo", "dr_grpo"):
        found = token_gradients(make_objective(name, 0.0), batch)
        rho_T = (batch.logprobs_T - batch.behaviour_logprobs_T).exp()
        advantage_T = make_objective(name).loss(batch)[1]["advantage"][batch.sequence_T]
        stopped = (
            ((advantage_T > 0) & (rho_T > 1 + CLIP_HIGH))
            | ((advantage_T < 0) & (rho_T < 1 - CLIP_LOW))
            | (advantage_T.abs() < 1e-9)
        )
        assert torch.equal(found.abs() < 1e-9, stopped)
        assert 0 < stopped.sum() < len(stopped)


def test_the_example_of_the_docs_is_an_objective():
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    module: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, module)
    batch = make_batch()
    best_N = torch.tensor(
        [
            r == max(s for s, g in zip(REWARDS, GROUPS, strict=True) if g == group)
            for r, group in zip(REWARDS, GROUPS, strict=True)
        ]
    )
    expected_N = torch.where(best_N & (sizes(batch) > 1), -1 / sizes(batch) / NUM_GROUPS, 0.0)
    torch.testing.assert_close(
        token_gradients(module["build"](module["Config"]()), batch),
        expected_N[batch.sequence_T],
        rtol=0,
        atol=1e-15,
    )
    assert all(f"| `{name}` |" in text for name in (*RIVALS, "agro"))


# --- refusals ---


@pytest.mark.parametrize("name", OF_SEQUENCES)
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_token_weights_on_terms_of_whole_sequences_are_refused(name, kind):
    message = refused(name, importance_weight=f"{kind}_token")
    assert f"objective.importance_weight = '{kind}_token': input should be " in message
    assert "'none', 'tis_sequence' or 'mis_sequence'" in message


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions_without_beta_are_refused(name):
    assert f"objective.beta = 0: objective.name = {name} divides by beta" in refused(name, beta=0.0)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(
    "knobs", [{"on_policy_coef": 0.1}, {"zero_std": "drop"}, {"duplicates": "drop"}, {"target": "pass@2"}]
)
def test_knobs_only_agro_has_are_refused_instead_of_passed_over(name, knobs):
    (knob,) = knobs
    assert f"objective.{knob} is not a known key; {name} is without it, agro has it" in refused(name, **knobs)


def test_a_process_that_does_not_train_gets_a_config_that_brings_no_torch():
    config = parse_config(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "rewards": {"functions": [{"name": "exact_match"}]},
            "objective": {"name": "gspo"},
        }
    )
    unpickled = "import pickle, sys; pickle.load(sys.stdin.buffer); print('torch' in sys.modules)"
    for sent, brings in ((config, b"True\n"), (config.without_knobs(), b"False\n")):
        command = [sys.executable, "-c", unpickled]
        assert subprocess.run(command, input=pickle.dumps(sent), stdout=-1, cwd=ROOT).stdout == brings
    assert config.without_knobs().objective.name == "gspo"


def test_every_objective_is_named_like_its_file_and_its_knobs_are_described():
    assert set(OBJECTIVES) == {*RIVALS, "agro"}
    for name, knobs in OBJECTIVES.items():
        assert knobs().name == name
        assert load_objective(knobs()).needs <= NEEDS
        assert all(field.description for knob, field in knobs.model_fields.items() if knob != "name")
