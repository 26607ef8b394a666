"""The objective interface, AGRO with its weights, and the log-probs they stand on."""

import dataclasses
import math
from typing import Any

import pytest
import torch

import learner.step.logprobs
from core.errors import ConfigError
from learner.catalogue import load_config
from learner.objectives import TokenBatch, agro, load_objective, token_gradients
from learner.objectives._advantages import agro_advantages
from learner.step.logprobs import selective_log_softmax
from tests.support import ROOT

SIZES = torch.tensor([3, 1, 4, 2, 2, 5, 1, 3, 2])  # tokens of each sequence
GROUPS = torch.tensor([4, 9, 4, 4, 9, 9, 2, 7, 7])  # sizes 3, 3, 1, 2


def make_batch(**changes):
    random = torch.Generator().manual_seed(0)
    sequence_T = torch.arange(9).repeat_interleave(SIZES)
    logprobs_T = -torch.rand(len(sequence_T), generator=random, dtype=torch.float64)
    fields: dict[str, Any] = {
        "logprobs_T": logprobs_T.requires_grad_(),
        "behaviour_logprobs_T": -torch.rand(len(sequence_T), generator=random, dtype=torch.float64),
        "sequence_T": sequence_T,
        "rewards_N": torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.5, 0.5], dtype=torch.float64),
        "ref_logprobs_N": -torch.rand(9, generator=random, dtype=torch.float64) * SIZES,
        "groups_N": GROUPS,
        "staleness_N": torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 2.0, 0.0, 5.0, 0.0], dtype=torch.float64),
        "num_groups": 6,
    }
    return TokenBatch(**(fields | changes))


def make_objective(**changes):
    options: dict[str, Any] = {"beta": 0.2, "importance_weight": "none"} | changes
    return load_objective(agro.Config(**options))


def select(batch, keep_N):
    """The batch of the sequences in `keep_N` only."""
    keep_T = keep_N[batch.sequence_T]
    renumber = keep_N.cumsum(0) - 1
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[keep_T] for name in ("logprobs_T", "behaviour_logprobs_T")},
        **{
            name: getattr(batch, name)[keep_N]
            for name in ("rewards_N", "ref_logprobs_N", "groups_N", "staleness_N")
        },
        completions_N=None if batch.completions_N is None else batch.completions_N[keep_N],
        sequence_T=renumber[batch.sequence_T[keep_T]],
    )


def test_loss_is_the_formula_read_aloud():
    batch = make_batch()
    loss, diagnostics = make_objective(importance_weight="truncated", importance_cap=1.5).loss(batch)
    by_sequence = batch.logprobs_T.detach().split(SIZES.tolist())
    behaviour = batch.behaviour_logprobs_T.split(SIZES.tolist())
    expected = 0.0
    for i in range(9):
        members = [j for j in range(9) if GROUPS[j] == GROUPS[i]]
        residuals = {
            j: batch.rewards_N[j] - 0.2 * (by_sequence[j].sum() - batch.ref_logprobs_N[j]) for j in members
        }
        others = [residuals[j] for j in members if j != i]
        advantage = residuals[i] - sum(others) / len(others) if others else torch.tensor(0.0)
        weight = min(1.5, math.exp(by_sequence[i].sum() - behaviour[i].sum()))
        expected -= weight * advantage * by_sequence[i].sum() / len(members) / 6
        assert diagnostics["advantage"][i].item() == pytest.approx(float(advantage), abs=1e-12)
        assert diagnostics["weight"][i].item() == pytest.approx(weight, abs=1e-12)
        assert diagnostics["residual"][i].item() == pytest.approx(float(residuals[i]), abs=1e-12)
        assert diagnostics["log_ratio"][i].item() == pytest.approx(
            float(by_sequence[i].sum() - batch.ref_logprobs_N[i]), abs=1e-12
        )
    assert loss.item() == pytest.approx(float(expected), abs=1e-12)
    assert not any(value.requires_grad for value in diagnostics.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance_weight": "truncated"},
        {"importance_weight": "token"},
        {"on_policy_coef": 0.1},
        {"zero_std": "drop"},
    ],
)
def test_losses_and_gradients_of_groups_add_up(changes):
    batch, objective = make_batch(), make_objective(**changes)
    first = torch.isin(GROUPS, torch.tensor([4, 7]))
    losses = [objective.loss(select(batch, keep))[0] for keep in (first, ~first)]
    whole = objective.loss(batch)[0]
    assert whole.item() == pytest.approx(sum(loss.item() for loss in losses), abs=1e-13)
    parts = torch.autograd.grad(sum(losses), batch.logprobs_T)[0]
    torch.testing.assert_close(parts, torch.autograd.grad(whole, batch.logprobs_T)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_gradients_are_those_of_the_loss_also_without_gradient_mode(dtype):
    batch = make_batch(logprobs_T=make_batch().logprobs_T.detach().to(dtype).requires_grad_())
    objective = make_objective(importance_weight="truncated", on_policy_coef=0.1)
    with torch.no_grad():
        found = token_gradients(objective, batch)
    assert found.dtype == dtype
    assert not found.requires_grad
    assert batch.logprobs_T.grad is None
    assert torch.equal(found, torch.autograd.grad(objective.loss(batch)[0], batch.logprobs_T)[0])
    assert found.abs().max() > 0


def test_a_group_of_one_contributes_nothing():
    gradients = make_batch().sequence_sums(
        token_gradients(make_objective(importance_weight="truncated"), make_batch())
    )
    assert gradients[6] == 0  # group 2
    assert (gradients[:6] != 0).all()


def test_groups_of_equal_rewards_keep_the_kl_pull_unless_dropped():
    batch = make_batch()
    kept, dropped = (make_objective(zero_std=choice).loss(batch) for choice in ("keep", "drop"))
    # group 2 has one sample, group 7 two of reward 0.5
    assert kept[1]["zero_std"].tolist() == [False] * 6 + [True] * 3
    assert (kept[1]["advantage"][7:] != 0).all()
    assert (dropped[1]["advantage"][6:] == 0).all()
    assert torch.equal(kept[1]["advantage"][:6], dropped[1]["advantage"][:6])
    assert dropped[1]["zero_std"].sum() == 3  # counted either way
    gradients = [
        make_batch().sequence_sums(token_gradients(make_objective(zero_std=choice), batch))
        for choice in ("keep", "drop")
    ]
    assert torch.equal(gradients[0][:6], gradients[1][:6])  # P still counts all groups


@pytest.mark.parametrize("log_ratio", [1e4, 30.0, 0.3, -0.3, -30.0])
def test_truncated_weight_is_the_capped_ratio_and_never_overflows(log_ratio):
    batch = make_batch(logprobs_T=make_batch().logprobs_T.detach().float())
    for cap in (0.5, 1.0, 3.0):
        behaviour_T = batch.logprobs_T - log_ratio / SIZES[batch.sequence_T]
        moved = dataclasses.replace(batch, behaviour_logprobs_T=behaviour_T)
        loss, diagnostics = make_objective(importance_weight="truncated", importance_cap=cap).loss(moved)
        expected = cap if log_ratio > 700 else min(cap, math.exp(log_ratio))
        torch.testing.assert_close(
            diagnostics["weight"], torch.full((9,), expected, dtype=torch.float64), rtol=1e-5, atol=0
        )
        assert (diagnostics["weight"] > 0).all()
        assert loss.isfinite()


def test_weights_multiply_the_gradient_of_each_sequence():
    batch = make_batch()
    plain, weighted = (
        token_gradients(make_objective(importance_weight=kind), batch) for kind in ("none", "truncated")
    )
    weight_N = make_objective(importance_weight="truncated").loss(batch)[1]["weight"]
    assert 0 < (weight_N < 1).sum() < 9
    torch.testing.assert_close(weighted, plain * weight_N[batch.sequence_T], rtol=1e-13, atol=0)


def weights_read_aloud(batch, kind, cap):
    ratios = (batch.logprobs_T.detach() - batch.behaviour_logprobs_T).split(SIZES.tolist())
    if kind == "token":
        return torch.cat([values.exp().clamp_max(cap) for values in ratios])
    return torch.cat([values.mean().exp().clamp_max(cap).expand(len(values)) for values in ratios])


@pytest.mark.parametrize("cap", [0.8, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["token", "geometric"])
def test_token_and_geometric_weights_are_what_they_say(kind, cap):
    batch = make_batch()
    plain = token_gradients(make_objective(), batch)
    objective = make_objective(importance_weight=kind, importance_cap=cap)
    expected_T = weights_read_aloud(batch, kind, cap)
    torch.testing.assert_close(token_gradients(objective, batch), plain * expected_T, rtol=1e-12, atol=0)
    means = torch.stack([values.mean() for values in expected_T.split(SIZES.tolist())])
    torch.testing.assert_close(objective.loss(batch)[1]["weight"], means, rtol=1e-12, atol=0)
    assert "behaviour_logprobs" in objective.needs


def test_a_geometric_weight_does_not_vanish_with_length_as_the_sequence_ratio_does():
    logprobs_T = torch.full((400,), -1.05, dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(
        logprobs_T,
        torch.full((400,), -1.0, dtype=torch.float64),
        torch.arange(2).repeat_interleave(200),
        torch.tensor([1.0, 0.0]),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2),
        num_groups=1,
    )
    weights = {
        kind: make_objective(importance_weight=kind).loss(batch)[1]["weight"][0].item()
        for kind in ("truncated", "token", "geometric")
    }
    assert weights["truncated"] == pytest.approx(math.exp(-10))
    assert weights["token"] == pytest.approx(math.exp(-0.05))
    assert weights["geometric"] == pytest.approx(math.exp(-0.05))


def test_the_weighted_gate_lets_the_on_policy_term_act_on_stale_samples_by_their_ratio():
    batch = make_batch()
    weight_N = make_objective(importance_weight="truncated", importance_cap=1.5).loss(batch)[1]["weight"]
    log_ratio_N = batch.sequence_sums(batch.logprobs_T.detach()) - batch.ref_logprobs_N
    off_policy = agro_advantages(batch.rewards_N, log_ratio_N, GROUPS, beta=0.2)
    literal = agro_advantages(batch.rewards_N, log_ratio_N, GROUPS, beta=0.2, on_policy_coef=0.3)
    sizes_N = torch.tensor([3, 3, 3, 3, 3, 3, 1, 2, 2])
    for weight, of_off_policy in (("none", torch.ones(9, dtype=torch.float64)), ("truncated", weight_N)):
        # Whatever weighs the rest, the on-policy term is weighed once.
        expected_N = -(of_off_policy * off_policy + weight_N * (literal - off_policy)) / (6 * sizes_N)
        objective = make_objective(
            importance_weight=weight, importance_cap=1.5, on_policy_coef=0.3, on_policy_gate="weighted"
        )
        torch.testing.assert_close(
            token_gradients(objective, batch), expected_N[batch.sequence_T], rtol=1e-12, atol=1e-14
        )
    assert make_objective(on_policy_coef=0.3, on_policy_gate="weighted").needs == {
        "reference",
        "behaviour_logprobs",
    }


def test_the_running_baseline_is_the_prompts_variance_and_loo_for_a_prompt_never_seen():
    variances = torch.tensor(
        [0.3, math.nan, 0.3, 0.3, math.nan, math.nan, 0.1, 0.2, 0.2], dtype=torch.float64
    )
    batch = make_batch(prompt_variance_N=variances, staleness_N=torch.zeros(9, dtype=torch.float64))
    running, loo, none = (
        make_objective(on_policy_coef=0.3, on_policy_baseline=baseline).loss(batch)[1]["advantage"]
        for baseline in ("running", "loo", "none")
    )
    group_nine = GROUPS == 9
    assert torch.equal(running[group_nine], loo[group_nine])
    group_four = GROUPS == 4  # three samples: b = n/(n-1) * variance
    torch.testing.assert_close(
        running[group_four], none[group_four] + 0.3 / (2 * 0.2) * 1.5 * 0.3, rtol=1e-12, atol=0
    )
    assert running[GROUPS == 2] == 0
    assert "prompt_variance" in make_objective(on_policy_coef=0.3, on_policy_baseline="running").needs
    with pytest.raises(ValueError, match="prompt_variance_N is None"):
        make_objective(on_policy_coef=0.3, on_policy_baseline="running").loss(
            make_batch(staleness_N=torch.zeros(9))
        )


def test_dropped_duplicates_count_once_and_the_rest_is_centred_without_them():
    # group 4: samples 0 and 2; group 7: both; across groups nothing
    completions = torch.tensor([5, 1, 5, 6, 2, 3, 5, 8, 8])
    batch = make_batch(completions_N=completions)
    objective = make_objective(duplicates="drop")
    unique = torch.ones(9, dtype=torch.bool).index_fill(0, torch.tensor([2, 8]), False)
    expected = make_objective().loss(select(batch, unique))
    loss, diagnostics = objective.loss(batch)
    assert loss.item() == pytest.approx(expected[0].item(), abs=1e-14)
    assert torch.equal(diagnostics["advantage"][unique], expected[1]["advantage"])
    assert (diagnostics["advantage"][~unique] == 0).all()
    assert "completions" in objective.needs


def test_the_on_policy_term_acts_on_fresh_samples_only():
    batch = make_batch()
    log_ratio_N = batch.sequence_sums(batch.logprobs_T.detach()) - batch.ref_logprobs_N
    off_policy = agro_advantages(batch.rewards_N, log_ratio_N, GROUPS, beta=0.2)
    on_policy = agro_advantages(
        batch.rewards_N, log_ratio_N, GROUPS, beta=0.2, on_policy_coef=0.3, on_policy_baseline="none"
    )
    found = make_objective(on_policy_coef=0.3, on_policy_baseline="none").loss(batch)[1]["advantage"]
    fresh = batch.staleness_N == 0
    assert torch.equal(found, torch.where(fresh, on_policy, off_policy))
    assert (found[fresh & (GROUPS != 2)] != off_policy[fresh & (GROUPS != 2)]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance_weight": "truncated"},
        {"importance_weight": "truncated", "importance_cap": 3.0},
        {"importance_weight": "token"},
        {"importance_weight": "geometric"},
    ],
)
def test_descent_reaches_the_optimum_from_data_of_another_policy(changes):
    random = torch.Generator().manual_seed(1)
    rewards, reference = (
        torch.rand(6, generator=random).double(),
        torch.randn(6, generator=random).double().log_softmax(0),
    )
    optimum = (reference + rewards / 0.2).log_softmax(0)
    theta, objective = reference.clone().requires_grad_(), make_objective(**changes)
    for _ in range(1500):  # each outcome once: the exact gradient for uniform mu, up to a factor
        logprobs = theta.log_softmax(0)
        index = torch.arange(6)
        batch = TokenBatch(
            logprobs,
            torch.full_like(logprobs, -math.log(6)),
            index,
            rewards,
            reference,
            index * 0,
            torch.ones(6),
            num_groups=1,
        )
        theta = (
            (theta - 10 * torch.autograd.grad(objective.loss(batch)[0], theta)[0]).detach().requires_grad_()
        )
    distance = (optimum.exp() * (optimum - theta.log_softmax(0))).sum()
    assert (optimum.exp() * (optimum - reference)).sum() > 0.1
    assert distance.abs() < 1e-12


def test_needs_say_what_the_config_asks_for_and_the_rest_may_be_nan():
    assert make_objective().needs == {"reference"}
    assert make_objective(importance_weight="truncated").needs == {"reference", "behaviour_logprobs"}
    assert make_objective(on_policy_coef=0.1).needs == {"reference", "freshness"}
    assert make_objective(beta=0.0).needs == frozenset()
    batch = make_batch()
    poisoned = dataclasses.replace(
        batch,
        behaviour_logprobs_T=batch.behaviour_logprobs_T * math.nan,
        staleness_N=batch.staleness_N * math.nan,
    )
    assert torch.equal(token_gradients(make_objective(), poisoned), token_gradients(make_objective(), batch))
    with pytest.raises(ValueError, match="behaviour_logprobs_T"):
        make_objective(importance_weight="truncated").loss(poisoned)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sequence_T": torch.arange(5)}, "sequence_T"),
        ({"behaviour_logprobs_T": torch.zeros(23, 1)}, "behaviour_logprobs_T"),
        ({"ref_logprobs_N": torch.zeros(8)}, "ref_logprobs_N"),
        ({"groups_N": torch.zeros(10, dtype=torch.int64)}, "groups_N"),
        ({"staleness_N": torch.zeros(1)}, "staleness_N"),
        ({"num_groups": 0}, "num_groups"),
    ],
)
def test_a_batch_whose_shapes_disagree_names_the_field(changes, named):
    with pytest.raises(ValueError, match=named):
        make_batch(**changes)


def test_sequence_sums_count_empty_sequences_as_zero():
    batch = select(make_batch(), torch.arange(9) < 3)
    assert torch.equal(batch.sequence_sums(torch.ones(8)), torch.tensor([3.0, 1.0, 4.0]))
    moved = dataclasses.replace(batch, sequence_T=batch.sequence_T.clamp_max(1))
    assert torch.equal(moved.sequence_sums(torch.ones(8)), torch.tensor([3.0, 5.0, 0.0]))


@pytest.mark.parametrize(
    ("name", "hint"), [("agr", "did you mean 'agro'"), ("../agro", "agro"), ("xyz", "valid here: agro")]
)
def test_an_unknown_objective_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=hint):
        load_config(ROOT / "configs" / "quickstart.yaml", [f"objective.name={name}"])


@pytest.fixture(params=[1, 100, 1 << 24])
def _chunks(request, monkeypatch):
    """Chunks of one row, of several, of everything."""
    monkeypatch.setattr(learner.step.logprobs, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_selective_log_softmax_is_log_softmax_in_value_and_gradient(dtype, tolerance, temperature):
    random = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 5, 31, generator=random)).to(dtype).requires_grad_()
    targets = torch.randint(31, (4, 5), generator=random)
    upstream = torch.randn(4, 5, generator=random)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    found = selective_log_softmax(logits, targets, temperature)
    found_gradient = torch.autograd.grad((found * upstream).sum(), logits)[0]

    exact_logits = logits.detach().double().requires_grad_()
    exact = (exact_logits / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    exact_gradient = torch.autograd.grad((exact * upstream).sum(), exact_logits)[0]
    assert found.dtype == accumulation
    assert found_gradient.dtype == dtype
    # fp32 inside also for bf16
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=min(tolerance, 1e-5) * 20)
    torch.testing.assert_close(found_gradient.double(), exact_gradient, rtol=tolerance, atol=tolerance)


def test_selective_log_softmax_stands_extreme_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    found = selective_log_softmax(logits, torch.tensor([1, 2]), 1.0)
    torch.testing.assert_close(found, torch.tensor([-1e4, -math.log(3)]), rtol=0, atol=1e-2)
    assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_selective_log_softmax_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="temperature is 0"):
        selective_log_softmax(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 0.0)
    with pytest.raises(ValueError, match="targets has shape"):
        selective_log_softmax(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 1.0)
