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

from learner.catalogue import OBJECTIVES, parse_config
from learner.objectives import NEEDS, load_objective, token_gradients
from tests.support import ROOT
from tests.support.learning.plain_objectives import (
    BETA,
    CAP,
    CLIP_HIGH,
    CLIP_LOW,
    FIELD_OF_NEED,
    GROUPS,
    LENGTHS,
    NUM_GROUPS,
    OF_SEQUENCES,
    REGRESSIONS,
    REWARDS,
    RIVALS,
    VALID,
    WITH_BETA,
    WITH_RATIO,
    Scalars,
    gradients,
    make_batch,
    make_objective,
    refused,
    scalar_loss,
    sizes,
)

# --- the re-computation ---


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
            "rewards": {"functions": {"exact_match": 1.0}},
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
