"""What AGRO and its rivals converge to where everything can be enumerated: a table of
prompts and generations, and a token tree.

The charts of benchmarks.studies.tabular_figures are what is held to the thresholds, so that the figures show
what is tested.
"""

import csv
import itertools

import numpy as np
import pytest
import torch

from benchmarks.studies import tabular, tabular_figures, tree
from learner.objectives._advantages import agro_advantages

SEED = 0
BETA = 0.3


@pytest.fixture(scope="module")
def forms():
    return tabular_figures.forms_chart()


@pytest.mark.slow
def test_exact_agro_reaches_the_optimum_from_reference_data_alone(forms):
    (panel,) = forms.panels
    assert forms.steps[-1] == 20_000
    assert forms.last(panel, tabular_figures.FORM_LABELS["agro"]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(set(tabular.FORMS) - {"agro", "kl_pg_importance"}))
def test_every_kl_policy_gradient_without_importance_weights_stops_short(forms, form):
    (panel,) = forms.panels
    assert forms.last(panel, tabular_figures.FORM_LABELS[form]) > 0.1


@pytest.mark.slow
def test_exact_importance_weights_repair_the_kl_policy_gradient(forms):
    (panel,) = forms.panels
    assert forms.last(panel, tabular_figures.FORM_LABELS["kl_pg_importance"]) < 1e-3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_picture_is_that_of_other_instances_too(seed):
    bandit = tabular.Bandit.random(seed, beta=0.5)
    ends = {}
    for name, form in tabular.FORMS.items():
        log_pi = tabular.descend(form, bandit, np.exp(bandit.log_ref), lr=1.0, at=np.array([0, 1000]))
        ends[name] = tabular.normalised_kl(log_pi, bandit.log_optimum)[-1, 0]
    assert max(ends.pop("agro"), ends.pop("kl_pg_importance")) < 1e-3
    assert min(ends.values()) > 0.1


def tail_mean(chart, panel, label):
    """The mean over the last tenth of the recorded points, that is about the last half of the steps:
    the end of a noisy curve.
    """
    values = next(curve.values for curve in chart.panels[panel] if curve.label == label)
    return values[-len(values) // 10 :].mean()


@pytest.mark.slow
def test_stale_groups_of_four_stop_the_kl_policy_gradient_and_not_agro():
    chart = tabular_figures.staleness_chart()
    lags, replay = chart.panels
    assert chart.steps[-1] == 6000
    for lag in (0, 64, 512):
        assert chart.last(lags, f"AGRO, lag {lag}") < 1e-3
    assert tail_mean(chart, lags, "KL-PG, lag 512") > 0.05
    for window in (1, 64, 512):
        assert chart.last(replay, f"AGRO, K = {window}") < 1e-3
    assert tail_mean(chart, replay, "KL-PG, K = 512") > 0.05


@pytest.mark.slow
def test_unlike_policies_in_one_group_suit_agro_and_unseen_generations_do_not():
    chart = tabular_figures.behaviours_chart(7000)
    mixture, coverage = chart.panels
    assert chart.last(mixture, "AGRO") < 1e-10
    assert tail_mean(chart, mixture, "KL-PG") > 0.05
    assert chart.last(coverage, "AGRO, all generations") > 0.1
    assert chart.last(coverage, "AGRO, among the sampled generations") < 1e-10


@pytest.mark.slow
def test_truncated_weights_cost_convergence_where_the_behaviour_never_moves():
    chart = tabular_figures.weights_chart()
    weighted, plain = (
        [chart.last(panel, label) for panel in chart.panels]
        for label in ("min(1, π/μ) after centring", "no weight")
    )
    assert max(plain) < 1e-6
    assert weighted[0] < 1e-4  # beta 0.5: the fixed point is the same
    assert weighted[1] > 1e-3  # beta 0.1
    assert weighted[2] > 0.05  # beta 0.03
    assert weighted == sorted(weighted)


def test_forces_are_zero_at_the_optimum_for_any_behaviour_only_where_the_whole_residual_is_centred():
    bandit = tabular.Bandit.random(SEED, beta=BETA)
    mu = np.exp(tabular.log_softmax(np.random.default_rng(1).standard_normal(bandit.rewards.shape)))
    for form in (tabular.agro, tabular.agro_truncated):
        assert np.abs(form(bandit, bandit.log_optimum, mu)).max() < 1e-14
    for form in (tabular.kl_pg_reward_baseline, tabular.kl_pg_no_baseline, tabular.grpo_k3):
        assert np.abs(form(bandit, bandit.log_optimum, mu)).max() > 0.01


def test_dividing_by_the_groups_standard_deviation_is_biased_whatever_the_scale():
    """The exact expectation over all groups of 3 of 4 generations; unbiased up to a factor would be a
    cosine of 1.
    """
    rng = np.random.default_rng(SEED)
    n, rewards = 3, torch.from_numpy(rng.random(4))
    log_pi, log_ref, log_mu = (
        torch.from_numpy(tabular.log_softmax(row)) for row in rng.standard_normal((3, 4))
    )
    groups = torch.tensor(list(itertools.product(range(4), repeat=n)))
    ids = torch.arange(len(groups)).repeat_interleave(n)
    advantages = agro_advantages(
        rewards[groups].flatten(), (log_pi - log_ref)[groups].flatten(), ids, beta=BETA
    ).view(-1, n)
    scaled = advantages / advantages.std(1, keepdim=True).clamp_min(1e-9)
    scores = torch.eye(4, dtype=torch.float64) - log_pi.exp()
    probability = log_mu.exp()[groups].prod(1)
    plain, divided = (
        torch.einsum("g,gi,gis->s", probability, a, scores[groups]) for a in (advantages, scaled)
    )
    assert torch.cosine_similarity(plain, divided, dim=0) < 0.9


def test_dividing_by_the_groups_standard_deviation_keeps_noise_at_the_optimum():
    def divided(rewards, log_ratios, beta):
        advantages = tabular.sampled_agro(rewards, log_ratios, beta)
        return advantages / (advantages.std(1, keepdims=True) + 1e-6)

    bandit = tabular.Bandit.random(SEED, beta=0.5)
    ends = []
    for method in (tabular.sampled_agro, divided):
        log_pi = tabular.descend_sampled(
            method, bandit, tabular.mixed(bandit.log_ref, 4), lr=0.5, at=np.arange(0, 1501, 100), seed=SEED
        )
        ends.append(tabular.normalised_kl(log_pi, bandit.log_optimum)[-3:].mean())
    assert ends[0] < 1e-10
    assert ends[1] > 1e-3


def test_kl_is_that_of_the_definition_and_keeps_its_accuracy_when_small():
    log_p, log_q = tabular.log_softmax(np.random.default_rng(2).standard_normal((2, 7)))
    assert tabular.kl(log_p, log_q) == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=1e-12)
    assert tabular.kl(log_p, log_p) == 0
    nudge = 1e-6 * np.arange(7.0)
    variance = (np.exp(log_p) * nudge**2).sum() - (np.exp(log_p) * nudge).sum() ** 2
    assert tabular.kl(log_p, tabular.log_softmax(log_p + nudge)) == pytest.approx(variance / 2, rel=1e-4)


def test_samples_are_as_old_as_asked_and_follow_their_policies():
    policies = np.random.default_rng(3).random((10, 2, 3))
    rng = np.random.default_rng(4)
    found = tabular.lagged(np.array([2, 64]), 5)(policies, rng)
    assert np.array_equal(found, np.stack([[policies[7, 0]] * 5, [policies[0, 1]] * 5]))
    replay = tabular.replayed(np.array([1, 4]), 400)(policies, rng)
    assert (replay[0] == policies[9, 0]).all()
    ages = [(replay[1] == policies[9 - age, 1]).all(-1).mean() for age in range(10)]
    assert ages[:4] == pytest.approx([0.25] * 4, abs=0.08)
    assert sum(ages[4:]) == 0
    drawn = tabular._draw(np.broadcast_to([0.5, 0.0, 0.2, 0.3], (40, 500, 4)), rng)
    assert np.bincount(drawn.ravel(), minlength=4) / drawn.size == pytest.approx(
        [0.5, 0.0, 0.2, 0.3], abs=0.02
    )


def test_the_command_writes_a_csv_and_a_png_of_every_chart(tmp_path, capsys):
    tabular_figures.main(["--reduced", "--out", str(tmp_path / "figures")])
    names = ["tabular_behaviours", "tabular_forms", "tabular_staleness", "tabular_weights"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("csv", "png")
    )
    printed = capsys.readouterr().out
    assert all(f"{name}.csv" in printed for name in names)
    for name in names:
        png = (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert 10_000 < len(png) < 150_000
    chart = tabular_figures.forms_chart(100)
    with (tmp_path / "figures" / "tabular_forms.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    table = np.array(rows, dtype=float)
    ((panel, curves),) = chart.panels.items()
    assert header == ["step", *(f"{panel} | {curve.label}" for curve in curves)]
    assert np.array_equal(table[:, 0], chart.steps)
    assert chart.steps[[0, 1, -1]].tolist() == [0, 1, 100]
    assert (table[0, 1:] == 1).all()
    np.testing.assert_allclose(table[:, 1:], np.stack([curve.values for curve in curves], axis=1), rtol=1e-5)


# --- The token tree ---

TOKEN_FORMS = (
    tree.residual,
    tree.reward_to_go,
    tree.token_kl_loss,
    tree.token_k3_loss,
    tree.residual_over_length,
    tree.length_in_residual,
)


class Instance:
    """A random reference, current policy, behaviour and reward on the tree."""

    def __init__(self, seed, beta=BETA):
        rng = np.random.default_rng(seed)
        self.ref, self.theta, behaviour = rng.standard_normal((3, *tree.SHAPE))
        self.rewards = rng.standard_normal(len(tree.OUTCOMES))
        self.beta = beta
        self.mu, self.pi = (np.exp(tree.log_outcomes(logits)) for logits in (behaviour, self.theta))
        self.log_optimum = tabular.log_softmax(tree.log_outcomes(self.ref) + self.rewards / beta)
        self.optimum = tree.logits_for(np.exp(self.log_optimum))

    def coefficients(self, form, logits, mu):
        return form(self.rewards, tree.token_logprobs(logits) - tree.token_logprobs(self.ref), self.beta, mu)

    def direction(self, form, logits, mu):
        return tree.direction(logits, mu, self.coefficients(form, logits, mu))

    def distance_after_ascent(self, form, steps, lr=1.0):
        """Normalised KL of the completions, data from the fixed behaviour mu."""
        logits = self.ref.copy()
        for _ in range(steps):
            logits += lr * self.direction(form, logits, self.mu)
        return tabular.kl(tree.log_outcomes(logits), self.log_optimum) / tabular.kl(
            tree.log_outcomes(self.ref), self.log_optimum
        )

    def slope(self, objective):
        """Central differences of `objective(log pi [O])` at theta, [N, V]."""
        found = np.empty(tree.SHAPE)
        for index in np.ndindex(tree.SHAPE):
            step = np.zeros(tree.SHAPE)
            step[index] = 1e-5
            above, below = (objective(tree.log_outcomes(self.theta + sign * step)) for sign in (1, -1))
            found[index] = (above - below) / 2e-5
        return found

    def off_policy_slope(self):
        """Of -L(pi, mu) / beta, L = 1/2 Var_mu[R]."""

        def objective(log_pi):
            residual = self.rewards - self.beta * (log_pi - tree.log_outcomes(self.ref))
            return -0.5 * self.mu @ (residual - self.mu @ residual) ** 2 / self.beta

        return self.slope(objective)

    def on_policy_slope(self):
        """Of G(pi), the reward regularised by the KL to the reference."""
        return self.slope(
            lambda log_pi: (
                np.exp(log_pi) @ (self.rewards - self.beta * (log_pi - tree.log_outcomes(self.ref)))
            )
        )


def relative_error(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


SEEDS = [0, 1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_all_completions_those_cut_at_the_limit_included_have_probability_one(seed):
    instance = Instance(seed)
    cut = np.array([outcome[-1] != tree.EOS for outcome in tree.OUTCOMES])
    assert (len(cut), cut.sum()) == (15, 8)
    assert instance.pi.sum() == pytest.approx(1, abs=1e-14)
    assert instance.pi[cut].sum() > 0.01  # dropping them would leave something else than a distribution
    np.testing.assert_allclose(tree.log_outcomes(instance.optimum), instance.log_optimum, atol=1e-12)
    one_step = tabular.log_softmax(instance.theta)[0, tree.EOS]
    assert tree.log_outcomes(instance.theta)[tree.OUTCOMES.index((tree.EOS,))] == pytest.approx(one_step)
    prefix = [
        tabular.log_softmax(instance.theta)[tree.PREFIXES.index(before), token]
        for before, token in [((), 0), ((0,), 1), ((0, 1), 1)]
    ]
    # no EOS factor
    assert tree.log_outcomes(instance.theta)[tree.OUTCOMES.index((0, 1, 1))] == pytest.approx(sum(prefix))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_full_sequence_weight_gives_exactly_the_gradient(seed):
    instance = Instance(seed)
    assert (
        relative_error(
            instance.direction(tree.residual, instance.theta, instance.mu), instance.off_policy_slope()
        )
        < 1e-8
    )
    assert (
        relative_error(
            instance.direction(tree.residual, instance.theta, instance.pi), instance.on_policy_slope()
        )
        < 1e-8
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_single_full_sequence_weight_is_zero_at_the_optimum(seed):
    instance = Instance(seed)
    for form in (tree.residual, tree.residual_over_length):
        assert np.abs(instance.coefficients(form, instance.optimum, instance.mu)).max() < 1e-13


@pytest.mark.parametrize("seed", SEEDS)
def test_reward_to_go_on_the_kl_part_is_right_on_policy_and_wrong_off_policy(seed):
    instance = Instance(seed)
    assert (
        relative_error(
            instance.direction(tree.reward_to_go, instance.theta, instance.pi), instance.on_policy_slope()
        )
        < 1e-8
    )
    assert (
        relative_error(
            instance.direction(tree.reward_to_go, instance.theta, instance.mu), instance.off_policy_slope()
        )
        > 0.1
    )
    assert np.linalg.norm(instance.direction(tree.reward_to_go, instance.optimum, instance.mu)) > 0.01


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("form", [tree.token_kl_loss, tree.token_k3_loss])
def test_a_token_kl_loss_is_biased_on_policy_too(form, seed):
    instance = Instance(seed)
    assert (
        relative_error(instance.direction(form, instance.theta, instance.pi), instance.on_policy_slope())
        > 0.05
    )
    assert (
        relative_error(instance.direction(form, instance.theta, instance.mu), instance.off_policy_slope())
        > 0.1
    )
    assert np.linalg.norm(instance.direction(form, instance.optimum, np.exp(instance.log_optimum))) > 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_one_over_length_inside_the_residual_has_another_optimum(seed):
    instance = Instance(seed)
    assert np.linalg.norm(instance.direction(tree.length_in_residual, instance.optimum, instance.mu)) > 0.01
    assert (
        np.linalg.norm(instance.direction(tree.residual_over_length, instance.optimum, instance.mu)) < 1e-13
    )


@pytest.mark.slow
def test_ascent_on_the_tree_ends_at_the_optimum_for_positive_sequence_weights_only():
    instance = Instance(1, beta=0.5)
    ends = {form.__name__: instance.distance_after_ascent(form, 5000) for form in TOKEN_FORMS}
    assert ends.pop("residual") < 1e-10
    assert ends.pop("residual_over_length") < 1e-5
    assert min(ends.values()) > 0.1
