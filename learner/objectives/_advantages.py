"""The AGRO advantage: the one formula everything else stands on. Pure; imports torch only.

AGRO is due to Tang, Cohen, Zhang, Valko and Munos, "RL-finetuning LLMs from on- and off-policy data with a
single algorithm" (arXiv 2503.19612). Below, [V] marks what that paper states, [D] what is derived from it and
held by tests (exact enumeration, finite differences).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ON_POLICY_BASELINES = ("none", "loo", "running")


def agro_advantages(
    rewards: Tensor,
    log_ratios: Tensor,
    groups: Tensor,
    *,
    beta: float,
    on_policy_coef: float = 0.0,
    on_policy_baseline: str = "loo",
    running_variances: Tensor | None = None,
) -> Tensor:
    """Returns advantages A_i such that `-(1/num_groups) sum_g (1/n_g) sum_i A_i logp_i` has AGRO's gradient.

    With the residual R = reward - beta * log_ratio and n the size of sample i's group:

        off-policy   A_i = R_i - mean_{j != i} R_j
        on-policy    A_i - on_policy_coef / (2 beta) * q_i,   q_i = (R_i - mean_{j != i} R_j)^2 - b_i
        b_i          "none": 0;  "loo": n/(n-1) * variance (ddof 1) of the others' R;
                     "running": n/(n-1) * the prompt's variance of R in earlier steps, "loo" where that is NaN

    At the optimum pi* the residual is constant within a prompt [V, theorem 1], so every A_i is 0 for any
    behaviour policy (with on_policy_coef = 0). For n >= 2 independent samples of one behaviour policy mu the
    off-policy form is unbiased for grad L(pi, mu) / beta, L = 1/2 E_x Var_mu[R], and is per group the
    gradient of 0.5 * var(R, ddof 1) / beta [D]. The on-policy form is unbiased for the gradient that also
    differentiates the sampling from mu = pi [D]; callers apply it to fresh samples only. Subtracting the
    group's own mean of squares instead of b_i would bias it [D]. "loo" has no variance of the others in a
    group of two: b_i is 0 there, which stays unbiased, with more variance.

    rewards             [N] float32 or float64
    log_ratios          [N], same dtype: log pi(y|x) - log pi_ref(y|x), nats, summed over tokens, current pi
    groups              [N] int64 ids, any values, any order, mixed sizes; a group of one gets 0
    beta                strength of the KL pull, >= 0; 0 is leave-one-out REINFORCE
    on_policy_coef      >= 0; 0 is the off-policy form, 1 the literal on-policy one, which needs beta > 0
    on_policy_baseline  one of ON_POLICY_BASELINES
    running_variances   [N], for "running": equal within a group, NaN where the prompt was never seen

    Returns [N], dtype of `rewards`, detached. It is computed in float64: a common offset of the residuals
    costs no accuracy. Raises ValueError that names the argument, for a wrong shape, dtype or value.
    """
    _check_tensors(rewards, log_ratios, groups)
    _check_options(beta, on_policy_coef, on_policy_baseline)
    _check_variances(on_policy_baseline, running_variances, rewards)
    with torch.no_grad():
        _, group_of, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
        n = sizes[group_of].double()
        residual = rewards.double() - beta * log_ratios.double()
        # The second pass removes what rounding of the first mean left behind under a large offset.
        centred = _centre(_centre(residual, group_of, sizes), group_of, sizes)
        advantages = centred * n / (n - 1).clamp_min(1)
        if on_policy_coef > 0:
            excess = advantages.square()
            if on_policy_baseline != "none":
                expected = _expected_square(centred, n, group_of, sizes)
                if running_variances is not None and on_policy_baseline == "running":
                    expected = _seen_square(running_variances, n, otherwise=expected)
                excess = torch.where(n >= 2, excess - expected, 0.0)
            advantages = advantages - on_policy_coef / (2 * beta) * excess
        return advantages.to(rewards.dtype)


def _group_sums(values: Tensor, group_of: Tensor, sizes: Tensor) -> Tensor:
    return values.new_zeros(len(sizes)).index_add(0, group_of, values)


def _centre(values: Tensor, group_of: Tensor, sizes: Tensor) -> Tensor:
    return values - (_group_sums(values, group_of, sizes) / sizes)[group_of]


def _expected_square(centred: Tensor, n: Tensor, group_of: Tensor, sizes: Tensor) -> Tensor:
    """n/(n-1) times the variance of the others: what (R_i - mean_{j != i} R_j)^2 is on average, judged
    without i.

    For centred d the others' mean is -d_i/(n-1), so their squares about it sum to sum_j d_j^2 - n/(n-1)
    d_i^2.
    """
    squares = _group_sums(centred.square(), group_of, sizes)[group_of]
    stretch = n / (n - 1).clamp_min(1)
    others_variance = (squares - stretch * centred.square()).clamp_min(0) / (n - 2).clamp_min(1)
    return torch.where(n >= 3, stretch * others_variance, 0.0)


def _seen_square(variances: Tensor, n: Tensor, otherwise: Tensor) -> Tensor:
    """n/(n-1) times the variance seen in earlier steps; `otherwise` where there was none, or the group
    is one of one.
    """
    seen = variances.double() * n / (n - 1).clamp_min(1)
    return torch.where(seen.isnan() | (n < 2), otherwise, seen)


def _check_tensors(rewards: Tensor, log_ratios: Tensor, groups: Tensor) -> None:
    if rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards is {rewards.dtype}; expected float32 or float64")
    if log_ratios.dtype != rewards.dtype:
        raise ValueError(f"log_ratios is {log_ratios.dtype}; expected the dtype of rewards, {rewards.dtype}")
    if groups.dtype != torch.int64:
        raise ValueError(f"groups is {groups.dtype}; expected int64 group ids")
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected one dimension")
    for name, tensor in (("log_ratios", log_ratios), ("groups", groups)):
        if tensor.shape != rewards.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected that of rewards, {tuple(rewards.shape)}"
            )
    for name, tensor in (("rewards", rewards), ("log_ratios", log_ratios)):
        finite = torch.isfinite(tensor)
        if not finite.all():
            index = int((~finite).nonzero()[0])
            raise ValueError(
                f"{name}[{index}] is {tensor[index].item()}; expected finite values "
                f"({int((~finite).sum())} are not)"
            )


def _check_options(beta: float, on_policy_coef: float, on_policy_baseline: str) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta is {beta}; expected a finite number >= 0")
    if not (math.isfinite(on_policy_coef) and on_policy_coef >= 0):
        raise ValueError(f"on_policy_coef is {on_policy_coef}; expected a finite number >= 0")
    if beta == 0 and on_policy_coef > 0:
        raise ValueError(
            f"on_policy_coef is {on_policy_coef} with beta 0: the on-policy term is divided by beta; "
            "set beta > 0 or on_policy_coef 0"
        )
    if on_policy_baseline not in ON_POLICY_BASELINES:
        raise ValueError(
            f"on_policy_baseline is {on_policy_baseline!r}; expected one of {', '.join(ON_POLICY_BASELINES)}"
        )


def _check_variances(on_policy_baseline: str, running_variances: Tensor | None, rewards: Tensor) -> None:
    if on_policy_baseline == "running" and (
        running_variances is None or running_variances.shape != rewards.shape
    ):
        raise ValueError(
            "running_variances is missing or has another shape than rewards; on_policy_baseline "
            "'running' needs one per sample"
        )
