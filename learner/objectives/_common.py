"""What the rivals share: group statistics, ratios that cannot overflow, importance weights, the sum over
groups, diagnostics.

    loss = (1/P) sum_groups (1/n) sum_i term_i          P groups of the optimizer step, n samples of the group

Everything is computed in float64 whatever the log-probs' dtype. A group of one has no term: it carries no
signal.

Importance weights (`importance_weight`) are detached and multiply the policy's part of each token's term,
not a KL loss. They are w = pi/mu where the objective has no ratio of its own. Where it has one, that ratio
runs against the proximal policy instead of mu, and w = pi_prox/mu. With w of the token or, as the product
over its tokens, of the sequence:

    tis   min(w, importance_cap)              truncated
    mis   w if w <= importance_cap else 0     masked; what is masked still counts in every divisor

Source of tis: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; the cap
is Ionides' (2008).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.objectives import TokenBatch
from learner.objectives._knobs import ClipConfig, Weights

LOG_RATIO_LIMIT = 20.0  # nats; a ratio beyond exp(20) counts as exp(20) and passes no gradient
# added to a group's std, so that rounding noise of equal rewards is not blown up to an advantage
STD_EPSILON = 1e-6


class GroupStatistics:
    """The groups of a batch and their statistics: [N] float64, each sample's value being that of its group.

        groups = GroupStatistics(batch)
        loss = groups.total(-groups.leave_one_out(groups.rewards_N) * batch.sequence_sums(batch.logprobs_T))

    size_N      samples of the group
    rewards_N   of the sample itself
    zero_std_N  bool, all rewards of the group are equal
    """

    def __init__(self, batch: TokenBatch) -> None:
        self.batch = batch
        _, self._index_N, sizes_P = torch.unique(batch.groups_N, return_inverse=True, return_counts=True)
        self._num_groups = len(sizes_P)
        self.size_N = sizes_P[self._index_N].double()
        self.rewards_N = batch.rewards_N.double()
        self.zero_std_N = self.maximum(self.rewards_N) == -self.maximum(-self.rewards_N)

    def mean(self, values_N: Tensor) -> Tensor:
        """Returns [N] group means."""
        return (
            values_N.new_zeros(self._num_groups).index_add(0, self._index_N, values_N)[self._index_N]
            / self.size_N
        )

    def maximum(self, values_N: Tensor) -> Tensor:
        """Returns [N] group maxima."""
        empty_P = values_N.new_zeros(self._num_groups)
        return empty_P.scatter_reduce(0, self._index_N, values_N, "amax", include_self=False)[self._index_N]

    def centred(self, values_N: Tensor) -> Tensor:
        """Returns [N] values minus the group mean."""
        return values_N - self.mean(values_N)

    def leave_one_out(self, values_N: Tensor) -> Tensor:
        """Returns [N] values minus the mean of the others of the group; 0 in a group of one."""
        return self.centred(values_N) * self.size_N / (self.size_N - 1).clamp_min(1)

    def standardised(self) -> Tensor:
        """Returns [N] (r - mean) / (std + 1e-6), the std with ddof 1; 0 where all rewards of the group are
        equal.
        """
        centred_N = self.centred(self.rewards_N)
        variance_N = self.mean(centred_N.square()) * self.size_N / (self.size_N - 1).clamp_min(1)
        return (centred_N / (variance_N.sqrt() + STD_EPSILON)).masked_fill(self.zero_std_N, 0.0)

    def total(self, terms_N: Tensor) -> Tensor:
        """Returns the loss: the sum of the samples' terms over n and P, without groups of one, in the dtype
        of the log-probs.
        """
        scale_N = torch.where(self.size_N > 1, 1 / (self.size_N * self.batch.num_groups), 0.0)
        return (scale_N * terms_N).sum().to(self.batch.logprobs_T.dtype)

    def report(
        self, needs: frozenset[str], beta: float, advantage_N: Tensor, weight_N: Tensor
    ) -> dict[str, Tensor]:
        """Returns the diagnostics, [N] each, detached; "log_ratio" and "residual" are NaN where `needs` names
        no reference.

        A group of one is reported with advantage 0: `total` leaves it out.
        """
        log_ratio_N = log_ratios(self.batch, needs)
        advantage_N = advantage_N.masked_fill(self.size_N == 1, 0.0)
        found = {
            "advantage": advantage_N,
            "residual": self.rewards_N - beta * log_ratio_N,
            "log_ratio": log_ratio_N,
            "weight": weight_N,
        }
        return {name: values_N.detach() for name, values_N in found.items()} | {"zero_std": self.zero_std_N}


def needs(**used: bool) -> frozenset[str]:
    """Returns the names of what is used: `needs(reference=True, proximal=False)` is {"reference"}."""
    return frozenset(name for name, is_used in used.items() if is_used)


def corrects(config: Weights) -> bool:
    """Says whether importance weights are on."""
    return config.importance_weight != "none"


def known(batch: TokenBatch, name: str) -> Tensor:
    """Returns the named field in float64. Raises ValueError when it is missing or not finite."""
    values = batch.needed(name)
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{name} holds values that are not finite; the objective lists it in `needs`, and needs every one"
        )
    return values.double()


def log_ratios(batch: TokenBatch, needs: frozenset[str]) -> Tensor:
    """Returns [N] log pi - log pi_ref of the samples, detached; NaN where `needs` names no reference."""
    logprobs_N = batch.sequence_sums(batch.logprobs_T.detach().double())
    if "reference_tokens" in needs:
        return logprobs_N - batch.sequence_sums(known(batch, "ref_logprobs_T"))
    return (
        logprobs_N - known(batch, "ref_logprobs_N")
        if "reference" in needs
        else torch.full_like(logprobs_N, math.nan)
    )


def old_logprobs(batch: TokenBatch, config: Weights) -> Tensor:
    """Returns [T] log-probs by the policy that an objective's own ratio runs against: mu, or the proximal one
    where weights correct for mu.
    """
    return known(batch, "proximal_logprobs_T" if corrects(config) else "behaviour_logprobs_T")


def ratio(log_ratio: Tensor) -> Tensor:
    """Returns exp(log_ratio), differentiable; `LOG_RATIO_LIMIT` bounds it from above."""
    return log_ratio.clamp_max(LOG_RATIO_LIMIT).exp()


def clipped_gain(ratio: Tensor, advantage: Tensor, config: ClipConfig) -> Tensor:
    """Returns min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), PPO's surrogate, differentiable in
    the ratio.
    """
    return torch.minimum(
        ratio * advantage, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage
    )


def kl_loss(batch: TokenBatch, beta: float) -> Tensor:
    """Returns [T] beta (q - log q - 1), q = pi_ref/pi of the token (Schulman's k3 estimator), differentiable;
    zeros for beta = 0.
    """
    if beta == 0:
        return torch.zeros_like(batch.logprobs_T, dtype=torch.float64)
    log_q_T = (known(batch, "ref_logprobs_T") - batch.logprobs_T.double()).clamp_max(LOG_RATIO_LIMIT)
    return beta * (log_q_T.exp() - log_q_T - 1)


def token_weights(batch: TokenBatch, config: Weights, numerator_T: Tensor | None = None) -> Tensor:
    """Returns [T] importance weights, detached; ones without correction. `numerator_T` are log-probs above
    mu's, by default those of pi.
    """
    if not config.importance_weight.endswith("_token"):
        return sequence_weights(batch, config, numerator_T)[batch.sequence_T]
    return _bounded_weights(_log_weights(batch, numerator_T), config)


def sequence_weights(batch: TokenBatch, config: Weights, numerator_T: Tensor | None = None) -> Tensor:
    """Returns [N] importance weights of the samples, detached; ones without correction. `numerator_T` as in
    `token_weights`.
    """
    if not corrects(config):
        return torch.ones_like(batch.rewards_N, dtype=torch.float64)
    return _bounded_weights(batch.sequence_sums(_log_weights(batch, numerator_T)), config)


def proximal_weights(batch: TokenBatch, config: Weights) -> Tensor:
    """Returns [T] weights pi_prox/mu for objectives with a ratio of their own; ones without correction."""
    return token_weights(batch, config, known(batch, "proximal_logprobs_T") if corrects(config) else None)


def _log_weights(batch: TokenBatch, numerator_T: Tensor | None) -> Tensor:
    above_T = batch.logprobs_T.double() if numerator_T is None else numerator_T
    return above_T.detach() - known(batch, "behaviour_logprobs_T")


def _bounded_weights(log_weights: Tensor, config: Weights) -> Tensor:
    log_cap = math.log(config.importance_cap)
    truncated = log_weights.clamp_max(log_cap).exp()
    return (
        truncated.masked_fill(log_weights > log_cap, 0.0)
        if config.importance_weight.startswith("mis")
        else truncated
    )
