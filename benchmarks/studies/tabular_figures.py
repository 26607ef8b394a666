"""The tabular figures: `python -m benchmarks.studies.tabular_figures [--out docs/figures] [--reduced]` writes
a CSV and a PNG of each.

Everywhere 20 prompts x 10 generations with standard normal rewards and reference logits, drawn with seed 0,
starting at pi_ref; the y axis is KL(pi_t, pi*) / KL(pi_0, pi*). The first figure is the setting of figure 1
of arXiv 2503.19612. One core, under a minute.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.studies.tabular import (
    FORMS,
    Array,
    Bandit,
    Behaviour,
    Method,
    agro,
    agro_truncated,
    descend,
    descend_sampled,
    lagged,
    log_softmax,
    mixed,
    normalised_kl,
    record_steps,
    replayed,
    sampled_agro,
    sampled_kl_pg,
)

SEED = 0
EXACT_STEPS, SAMPLED_STEPS = 20_000, 6_000
GROUP_SIZE = 4
EXACT_LR, SAMPLED_LR = 1.0, 0.5
LAGS = (0, 64, 512)
WINDOWS = (1, 64, 512)  # policies in the replay; 1 is on-policy
BETAS = (0.5, 0.1, 0.03)
UNSEEN = 3  # generations of each prompt that are never sampled
FLOOR = 1e-18  # what a KL of 0 is drawn as on a log axis

FORM_LABELS = {
    "agro": "off-policy AGRO",
    "kl_pg_exact_kl": "KL-PG: mean(r) baseline, exact KL gradient",
    "kl_pg_reward_baseline": "KL-PG: KL in the reward, mean(r) baseline",
    "kl_pg_no_baseline": "KL-PG: KL in the reward, no baseline",
    "grpo_k3": "GRPO-style: mean(r) baseline, k3 KL loss",
    "frozen_kl": "KL frozen at the behaviour policy, full mean",
    "kl_pg_importance": "KL-PG with exact importance weights",
}
METHODS: dict[str, tuple[Method, str]] = {"AGRO": (sampled_agro, "-"), "KL-PG": (sampled_kl_pg, "--")}


@dataclass(frozen=True)
class Curve:
    """Normalised KL [S] under a label, with a matplotlib line style and colour."""

    label: str
    values: Array
    style: str = "-"
    colour: str = "C0"


@dataclass(frozen=True)
class Chart:
    """One pair of files: `claim` says what is seen, `panels` maps a panel's title to its curves, all over
    `steps` [S].
    """

    name: str
    claim: str
    steps: NDArray[np.int64]
    panels: dict[str, list[Curve]]

    def last(self, panel: str, label: str) -> float:
        """Returns where a curve ends."""
        return next(float(curve.values[-1]) for curve in self.panels[panel] if curve.label == label)


def forms_chart(steps: int = EXACT_STEPS) -> Chart:
    """Compares every form by exact gradients, on data from pi_ref alone."""
    bandit, at = Bandit.random(SEED, beta=0.5), record_steps(steps)
    curves = []
    for index, (name, form) in enumerate(FORMS.items()):
        log_pi = descend(form, bandit, np.exp(bandit.log_ref), lr=EXACT_LR, at=at)
        style = ("-", "--")[index % 2]  # Two of them end next to each other.
        curves.append(
            Curve(FORM_LABELS[name], normalised_kl(log_pi, bandit.log_optimum)[:, 0], style, f"C{index}")
        )
    claim = "On data from π_ref alone, AGRO reaches π*, KL-PG only with exact importance weights"
    return Chart(
        "tabular_forms", claim, at, {f"exact gradients, μ = π_ref, β = 0.5, lr {EXACT_LR:g}": curves}
    )


def staleness_chart(steps: int = SAMPLED_STEPS) -> Chart:
    """Compares sampled groups that lag behind by a fixed number of updates, or come from a replay of past
    policies.
    """
    at = record_steps(steps)
    panels = {
        "every sample exactly `lag` updates old": _stale_curves(lagged, LAGS, "lag", at),
        "replay: uniform over the last K policies": _stale_curves(replayed, WINDOWS, "K =", at),
    }
    rivals = "KL-PG (KL in the reward) stops short of it"
    claim = f"Groups of {GROUP_SIZE} stale samples: AGRO closes in on π*, {rivals}"
    return Chart("tabular_staleness", claim, at, panels)


def _stale_curves(
    source: Callable[[NDArray[np.int64], int], Behaviour],
    settings: tuple[int, ...],
    word: str,
    at: NDArray[np.int64],
) -> list[Curve]:
    single = Bandit.random(SEED, beta=0.5)
    bandit = single.tiled(len(settings))
    behaviour = source(np.repeat(settings, len(single.rewards)), GROUP_SIZE)
    curves = []
    for name, (method, style) in METHODS.items():
        log_pi = descend_sampled(method, bandit, behaviour, lr=SAMPLED_LR, at=at, seed=SEED)
        distances = normalised_kl(log_pi, bandit.log_optimum, len(settings))
        curves += [
            Curve(f"{name}, {word} {setting}", distances[:, index], style, f"C{index}")
            for index, setting in enumerate(settings)
        ]
    return curves


def behaviours_chart(exact_steps: int = EXACT_STEPS) -> Chart:
    """Compares groups of samples from unlike policies, and a behaviour that never samples some outcomes."""
    bandit, at = Bandit.random(SEED, beta=0.5), record_steps(exact_steps)
    blend = []
    for name, (method, style) in METHODS.items():
        log_pi = descend_sampled(
            method, bandit, mixed(bandit.log_ref, GROUP_SIZE), lr=SAMPLED_LR, at=at, seed=SEED
        )
        blend.append(Curve(name, normalised_kl(log_pi, bandit.log_optimum)[:, 0], style))
    mu = np.exp(bandit.log_ref)
    mu[:, -UNSEEN:] = 0
    log_pi = descend(agro, bandit, mu / mu.sum(1, keepdims=True), lr=EXACT_LR, at=at)
    seen = normalised_kl(log_softmax(log_pi[..., :-UNSEEN]), log_softmax(bandit.log_optimum[:, :-UNSEEN]))
    coverage = [
        Curve("AGRO, all generations", normalised_kl(log_pi, bandit.log_optimum)[:, 0], colour="C3"),
        Curve("AGRO, among the sampled generations", seen[:, 0], ":", "C2"),
    ]
    panels = {
        f"each sample from π_ref, uniform or a random policy, groups of {GROUP_SIZE}": blend,
        f"{UNSEEN} of 10 generations never sampled, exact gradients": coverage,
    }
    return Chart(
        "tabular_behaviours",
        "AGRO converges on samples of unlike policies, but only over the generations it gets to see",
        at,
        panels,
    )


def weights_chart(steps: int = EXACT_STEPS) -> Chart:
    """Shows what truncated weights after centring cost where the behaviour policy never moves."""
    bandits, at = [Bandit.random(SEED, beta=beta) for beta in BETAS], record_steps(steps)
    rows = Bandit(
        *(
            np.concatenate([getattr(bandit, name) for bandit in bandits])
            for name in ("rewards", "log_ref", "beta")
        )
    )
    panels: dict[str, list[Curve]] = {f"β = {beta}": [] for beta in BETAS}
    for form, label, colour in (
        (agro, "no weight", "C0"),
        (agro_truncated, "min(1, π/μ) after centring", "C3"),
    ):
        log_pi = descend(form, rows, np.exp(rows.log_ref), lr=EXACT_LR, at=at)
        distances = normalised_kl(log_pi, rows.log_optimum, len(BETAS))
        for index, curves in enumerate(panels.values()):
            curves.append(Curve(label, distances[:, index], colour=colour))
    return Chart(
        "tabular_weights",
        "Offline (μ = π_ref, fixed), truncated weights slow AGRO down, the more the smaller β",
        at,
        panels,
    )


def write_csv(chart: Chart, path: Path) -> None:
    """Writes `step`, then a column `panel | label` for every curve."""
    names = [f"{title} | {curve.label}" for title, curves in chart.panels.items() for curve in curves]
    columns = [curve.values for curves in chart.panels.values() for curve in curves]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *names])
        for step, *values in zip(chart.steps.tolist(), *columns, strict=True):
            writer.writerow([step, *(f"{value:.6g}" for value in values)])


def write_png(chart: Chart, path: Path, title: str) -> None:
    """Draws all panels in a row, on one pair of log axes; step 0 is not on it."""
    figure = Figure(figsize=(8.5 if len(chart.panels) == 1 else 12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(chart.panels), sharey=True, squeeze=False)[0]
    for axis, (panel, curves) in zip(axes, chart.panels.items(), strict=True):
        _draw_panel(axis, panel, curves, chart.steps)
    axes[0].set_ylabel("KL(π_t, π*) / KL(π_0, π*)")
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=90)


def _draw_panel(axis: Axes, title: str, curves: list[Curve], steps: NDArray[np.int64]) -> None:
    for curve in curves:
        label = f"{curve.label}: {curve.values[-1]:.2g}"
        axis.plot(
            steps[1:],
            np.maximum(curve.values[1:], FLOOR),
            curve.style,
            color=curve.colour,
            label=label,
            linewidth=1.6,
        )
    axis.set(xscale="log", yscale="log", xlabel="gradient steps")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8.5, loc="lower left", title="curve: value at the last step", title_fontsize=8.5)


CHARTS: tuple[Callable[[], Chart], ...] = (forms_chart, staleness_chart, behaviours_chart, weights_chart)
REDUCED_CHARTS: tuple[Callable[[], Chart], ...] = (
    lambda: forms_chart(100),
    lambda: staleness_chart(100),
    lambda: behaviours_chart(100),
    lambda: weights_chart(100),
)


def main(arguments: list[str] | None = None) -> None:
    """Draws the figures; `arguments` are those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.tabular_figures", description="Draw the tabular figures."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/figures"), help="folder for the files (default %(default)s)"
    )
    parser.add_argument(
        "--reduced", action="store_true", help="100 steps only: seconds, and too short to show anything"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for make in REDUCED_CHARTS if options.reduced else CHARTS:
        chart = make()
        title = (
            f"Reduced run of {chart.steps[-1]} steps: too short to show anything"
            if options.reduced
            else chart.claim
        )
        path = options.out / chart.name
        write_csv(chart, path.with_suffix(".csv"))
        write_png(chart, path.with_suffix(".png"), title)
        print(f"{path}.csv and .png: {title}")
        for panel, curves in chart.panels.items():
            print(
                f"  {panel}, after {chart.steps[-1]} "
                "steps: " + "; ".join(f"{curve.label} {curve.values[-1]:.2g}" for curve in curves)
            )


if __name__ == "__main__":
    main()
