"""A language model small enough to enumerate: tokens a, b and EOS, at most three of them, one softmax per
prefix. Pure.

There are 15 completions: 7 end with EOS, 8 are cut at the third token and are outcomes like any other,
without an EOS factor. What a loss does to the parameters is then an exact sum over completions, for any
behaviour policy `mu`:

    direction(theta) = sum_y mu(y) sum_t c_yt grad log pi(y_t | y_<t)

and a loss is its token coefficients c [O, T], in the scale of a policy gradient (ascent).
Letters: O outcomes, T tokens, N prefixes, V vocabulary. All arrays are float64.
"""

from __future__ import annotations

import itertools

import numpy as np

from benchmarks.studies.tabular import Array, log_softmax

MAX_TOKENS = 3
EOS = 2
PREFIXES = [prefix for length in range(MAX_TOKENS) for prefix in itertools.product((0, 1), repeat=length)]
OUTCOMES = [(*prefix, EOS) for prefix in PREFIXES] + list(itertools.product((0, 1), repeat=MAX_TOKENS))
LENGTHS = np.array([len(outcome) for outcome in OUTCOMES])
SHAPE = (len(PREFIXES), 3)  # of the logits, [N, V]


def _taken() -> Array:
    """Returns [O, T, N, V], 1 where outcome o takes token v after prefix n as its token t."""
    taken = np.zeros((len(OUTCOMES), MAX_TOKENS, *SHAPE))
    for index, outcome in enumerate(OUTCOMES):
        for position, token in enumerate(outcome):
            taken[index, position, PREFIXES.index(outcome[:position]), token] = 1
    return taken


TAKEN = _taken()
MASK = TAKEN.sum((2, 3))  # [O, T], 1 on tokens, EOS among them
_FLAT = TAKEN.reshape(MASK.size, -1)


def token_logprobs(logits: Array) -> Array:
    """Returns [O, T] log pi of every token of every completion, 0 behind its end."""
    return (_FLAT @ log_softmax(logits).ravel()).reshape(MASK.shape)


def log_outcomes(logits: Array) -> Array:
    """Returns [O] log pi(y), the sum over tokens."""
    return token_logprobs(logits).sum(1)


def logits_for(outcomes: Array) -> Array:
    """Returns [N, V] logits whose completions have the probabilities `outcomes` [O], all positive: any
    distribution has some.
    """
    return np.log(np.einsum("o,otnv->nv", outcomes, TAKEN))


def direction(logits: Array, mu: Array, coefficients: Array) -> Array:
    """Returns [N, V], the exact ascent direction of `coefficients` [O, T] (or [O, 1]) under `mu` [O]."""
    force = mu[:, None] * coefficients * MASK
    visits = (force.ravel() @ _FLAT).reshape(SHAPE)
    return visits - np.exp(log_softmax(logits)) * visits.sum(-1, keepdims=True)


def residual(rewards: Array, log_ratios_OT: Array, beta: float, mu: Array) -> Array:
    """Returns [O, 1] R - E_mu R with R = r - beta * ell: AGRO's coefficient, one per completion."""
    values = rewards - beta * log_ratios_OT.sum(1)
    return (values - mu @ values)[:, None]


def reward_to_go(rewards: Array, log_ratios_OT: Array, beta: float, mu: Array) -> Array:
    """Returns [O, T] residuals in which each token answers only for the log-ratios from itself on."""
    before = log_ratios_OT.cumsum(1) - log_ratios_OT
    return residual(rewards, log_ratios_OT, beta, mu) + beta * before


def token_kl_loss(rewards: Array, log_ratios_OT: Array, beta: float, mu: Array) -> Array:
    """Returns [O, T]: rewards centred, and each token's own KL as a loss, on policy the exact per-token KL of
    the visited prefixes.
    """
    return (rewards - mu @ rewards)[:, None] - beta * log_ratios_OT


def token_k3_loss(rewards: Array, log_ratios_OT: Array, beta: float, mu: Array) -> Array:
    """Returns [O, T] what `token_kl_loss` does, with the k3 estimate, whose slope in log pi is 1 - pi_ref /
    pi.
    """
    return (rewards - mu @ rewards)[:, None] - beta * (1 - np.exp(-log_ratios_OT))


def residual_over_length(rewards: Array, log_ratios_OT: Array, beta: float, mu: Array) -> Array:
    """Returns [O, 1] the residual divided by the completion's length, which is a positive weight."""
    return residual(rewards, log_ratios_OT, beta, mu) / LENGTHS[:, None]


def length_in_residual(rewards: Array, log_ratios_OT: Array, beta: float, mu: Array) -> Array:
    """Returns [O, 1] the residual with ell / length in R, which is another target."""
    return residual(rewards, log_ratios_OT / LENGTHS[:, None], beta, mu)
