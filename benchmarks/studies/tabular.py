"""AGRO and its rivals where everything can be known exactly: a table of logits, [P prompts x Y generations].
Pure.

    Bandit  --descend(form, mu)-------->  log pi at chosen steps, exact gradients for a fixed behaviour mu
            --descend_sampled(method)-->  the same from groups of G samples, drawn from `behaviour`

Prompts are independent problems here, so the learning rate is per prompt: the loss's 1/P is left out. For the
same reason several settings run at once as further rows of one table (`Bandit.tiled`). All arrays are
float64; gradients are in the scale of a policy gradient, that is grad L / beta for AGRO.

The forms follow arXiv 2503.19612 (its figure 1 is `descend` over FORMS); what each of them does was derived,
not read there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from learner.objectives._advantages import agro_advantages

Array = NDArray[np.float64]


def log_softmax(logits: Array) -> Array:
    """Returns log-softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@dataclass(frozen=True)
class Bandit:
    """`rewards` and `log_ref` (log pi_ref, nats), both [P, Y], and the strength `beta` of the KL pull, [P,
    1].

        bandit = Bandit.random(seed=0, beta=0.5)
        log_pi = descend(agro, bandit, mu=bandit.log_ref.exp(), lr=1.0, at=[0, 100])[-1]
    """

    rewards: Array
    log_ref: Array
    beta: Array

    @classmethod
    def random(cls, seed: int, *, beta: float, prompts: int = 20, generations: int = 10) -> Bandit:
        """Returns a bandit whose rewards and reference logits are standard normal."""
        rng = np.random.default_rng(seed)
        rewards, logits = rng.standard_normal((2, prompts, generations))
        return cls(rewards, log_softmax(logits), np.full((prompts, 1), beta))

    def tiled(self, copies: int) -> Bandit:
        """Returns the same prompts `copies` times over, copy after copy."""
        return Bandit(*(np.tile(array, (copies, 1)) for array in (self.rewards, self.log_ref, self.beta)))

    @property
    def log_optimum(self) -> Array:
        """Returns [P, Y] log pi*, where pi* = pi_ref exp(r / beta) / Z."""
        return log_softmax(self.log_ref + self.rewards / self.beta)

    def residual(self, log_pi: Array) -> Array:
        """Returns [P, Y] R = r - beta * log(pi / pi_ref)."""
        return self.rewards - self.beta * (log_pi - self.log_ref)


def kl(log_p: Array, log_q: Array) -> Array:
    """Returns [...] KL(p, q) in nats over the last axis.

    It is written with q - p, which sums to zero, so that every term is >= 0 and a vanishing KL does not drown
    in rounding.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    return np.maximum(p * (log_p - log_q) + q - p, 0).sum(-1)


def normalised_kl(log_pi: Array, log_optimum: Array, copies: int = 1) -> Array:
    """Returns [S, copies] KL(pi_t, pi*) / KL(pi_0, pi*), each the mean over the prompts of a copy, for log_pi
    [S, P, Y].
    """
    distances = kl(log_pi, log_optimum).reshape(len(log_pi), copies, -1).mean(-1)
    return distances / distances[0]


def centred(values: Array, mu: Array) -> Array:
    """Returns `values` less their mean under `mu`, per prompt."""
    return values - (mu * values).sum(-1, keepdims=True)


# A form is written as the force F [P, Y] on each generation's log-prob: its ascent direction is sum_y F(y)
# grad log pi(y).
Form = Callable[[Bandit, Array, Array], Array]


def agro(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Off-policy AGRO centres the whole residual, at the current policy, under mu."""
    return mu * centred(bandit.residual(log_pi), mu)


def agro_truncated(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Weights AGRO by min(1, pi / mu) after centring."""
    return np.minimum(mu, np.exp(log_pi)) * centred(bandit.residual(log_pi), mu)


def kl_pg_exact_kl(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Follows the policy gradient with an average-reward baseline, and KL(pi, pi_ref)'s exact gradient."""
    return mu * centred(bandit.rewards, mu) - bandit.beta * np.exp(log_pi) * (log_pi - bandit.log_ref)


def kl_pg_reward_baseline(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Puts the KL into the reward, but centres only the reward."""
    return mu * (centred(bandit.rewards, mu) - bandit.beta * (log_pi - bandit.log_ref))


def kl_pg_no_baseline(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Puts the KL into the reward, and centres nothing."""
    return mu * bandit.residual(log_pi)


def grpo_k3(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Takes an average-reward baseline and the loss k3 = pi_ref/pi - 1 - log(pi_ref/pi), whose slope in log
    pi is 1 - pi_ref/pi.
    """
    return mu * (centred(bandit.rewards, mu) - bandit.beta * (1 - np.exp(bandit.log_ref - log_pi)))


def frozen_kl(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Centres the whole residual, but with the log-ratio of the behaviour policy."""
    return mu * centred(bandit.residual(np.log(mu)), mu)


def kl_pg_importance(bandit: Bandit, log_pi: Array, mu: Array) -> Array:
    """Weights `kl_pg_reward_baseline` by the exact importance weights pi / mu."""
    return np.exp(log_pi) * (centred(bandit.rewards, mu) - bandit.beta * (log_pi - bandit.log_ref))


FORMS: dict[str, Form] = {
    form.__name__: form
    for form in (
        agro,
        kl_pg_exact_kl,
        kl_pg_reward_baseline,
        kl_pg_no_baseline,
        grpo_k3,
        frozen_kl,
        kl_pg_importance,
    )
}


def record_steps(steps: int, points: int = 120) -> NDArray[np.int64]:
    """Returns 0, then at most `points` steps evenly spaced on a log axis, the last of them `steps`."""
    return np.unique(np.concatenate([[0], np.geomspace(1, steps, points).round().astype(np.int64)]))


def descend(form: Form, bandit: Bandit, mu: Array, *, lr: float, at: NDArray[np.int64]) -> Array:
    """Returns [S, P, Y] log pi after each of the steps `at` (sorted), from pi_ref, by the exact gradient for
    the behaviour `mu` [P, Y].
    """
    logits, snapshots, recorded = bandit.log_ref.copy(), [], set(at.tolist())
    for step in range(int(at[-1]) + 1):
        log_pi = log_softmax(logits)
        if step in recorded:
            snapshots.append(log_pi)
        force = form(bandit, log_pi, mu)
        logits += lr * (force - np.exp(log_pi) * force.sum(-1, keepdims=True))
    return np.stack(snapshots)


# Advantages [P, G] of sampled groups from their rewards [P, G], log-ratios [P, G] at the current policy, and
# beta.
Method = Callable[[Array, Array, float], Array]


def sampled_agro(rewards: Array, log_ratios: Array, beta: float) -> Array:
    """Returns the project's own advantages."""
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    found = agro_advantages(
        torch.from_numpy(rewards).flatten(), torch.from_numpy(log_ratios).flatten(), groups, beta=beta
    )
    return found.view(rewards.shape).numpy()


def sampled_kl_pg(rewards: Array, log_ratios: Array, beta: float) -> Array:
    """Centres the reward alone by leave-one-out means; the KL is in the reward, at the current policy."""
    n = rewards.shape[1]
    return n / (n - 1) * (rewards - rewards.mean(1, keepdims=True)) - beta * log_ratios


# [P, G, Y], the distribution each sample is drawn from, given the policies [t + 1, P, Y] so far, and
# randomness.
Behaviour = Callable[[Array, np.random.Generator], Array]


def lagged(lag_steps: NDArray[np.int64], samples: int) -> Behaviour:
    """Draws every sample of prompt p from the policy of exactly `lag_steps[p]` steps ago (of the first step,
    before that).
    """
    ages = np.repeat(lag_steps[:, None], samples, axis=1)
    return lambda policies, rng: _aged(policies, ages)


def replayed(window_steps: NDArray[np.int64], samples: int) -> Behaviour:
    """Draws every sample of prompt p from one of the last `window_steps[p]` policies, uniformly."""
    shape = (len(window_steps), samples)
    return lambda policies, rng: _aged(
        policies, rng.integers(np.minimum(window_steps, len(policies))[:, None], size=shape)
    )


def _aged(policies: Array, ages: NDArray[np.int64]) -> Array:
    return policies[np.maximum(len(policies) - 1 - ages, 0), np.arange(len(ages))[:, None]]


def mixed(log_ref: Array, samples: int) -> Behaviour:
    """Draws every sample from pi_ref, the uniform policy or a random policy made anew at each step, by the
    throw of a die.
    """
    rows = np.arange(len(log_ref))[:, None]

    def behaviour(policies: Array, rng: np.random.Generator) -> Array:
        random = np.exp(log_softmax(rng.standard_normal(log_ref.shape)))
        sources = np.stack([np.exp(log_ref), np.full_like(random, 1 / random.shape[1]), random])
        return sources[rng.integers(3, size=(len(log_ref), samples)), rows]

    return behaviour


def descend_sampled(
    method: Method, bandit: Bandit, behaviour: Behaviour, *, lr: float, at: NDArray[np.int64], seed: int
) -> Array:
    """Returns [S, P, Y] log pi after each of the steps `at` (sorted), from pi_ref, by a group of samples of
    every prompt a step.

    Raises ValueError unless all prompts have one beta. Two methods with one seed see the same random numbers.
    """
    if np.ptp(bandit.beta) > 0:
        raise ValueError("bandit.beta differs between prompts; the advantages of one call have one beta")
    beta, rng, steps = float(bandit.beta[0, 0]), np.random.default_rng(seed), int(at[-1])
    logits, snapshots, recorded = bandit.log_ref.copy(), [], set(at.tolist())
    policies, prompts = np.empty((steps + 1, *logits.shape)), np.arange(len(logits))[:, None]
    for step in range(steps + 1):
        log_pi = log_softmax(logits)
        policies[step] = np.exp(log_pi)
        if step in recorded:
            snapshots.append(log_pi)
        drawn = _draw(behaviour(policies[: step + 1], rng), rng)
        log_ratios = (log_pi - bandit.log_ref)[prompts, drawn]
        advantages = method(bandit.rewards[prompts, drawn], log_ratios, beta) / drawn.shape[1]
        logits -= lr * policies[step] * advantages.sum(1, keepdims=True)
        np.add.at(logits, (prompts, drawn), lr * advantages)
    return np.stack(snapshots)


def _draw(probabilities: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns one index into the last axis per distribution."""
    # The last edge is 1 but for rounding: whatever lies above the others is the last.
    edges = probabilities.cumsum(-1)[..., :-1]
    return (rng.random(probabilities.shape[:-1])[..., None] > edges).sum(-1)
