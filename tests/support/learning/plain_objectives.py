"""Losses of all objectives by their formulas in plain loops, and batches to compare with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError
from learner.catalogue import OBJECTIVES, parse_config
from learner.objectives import TokenBatch, load_objective, token_gradients

BETA, CLIP_LOW, CLIP_HIGH, CAP, SHIFT = 0.2, 0.15, 0.3, 1.3, 0.25
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


CORRECTIONS = ("none", "tis_token", "tis_sequence", "mis_token", "mis_sequence")


VALID = [
    (name, kind)
    for name in RIVALS
    for kind in CORRECTIONS
    if not (name in OF_SEQUENCES and kind.endswith("_token"))
]


WITH_BETA = [(*pair, beta) for pair in VALID for beta in (0.0, 0.2) if beta or pair[0] not in REGRESSIONS]


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
                "rewards": {"functions": {"exact_match": 1.0}},
                "objective": {"name": name, **knobs},
            }
        )
    return str(caught.value)


def gradients(objective, batch):
    """[N] the gradient summed over each sequence's tokens, and [T] itself."""
    found = token_gradients(objective, batch)
    return batch.sequence_sums(found), found


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


def sizes(batch):
    return torch.tensor([GROUPS.count(group) for group in batch.groups_N.tolist()], dtype=torch.float64)
