"""AGRO with weights after centring:

    loss = -(1/P) sum_groups (1/n) sum_i sum_t stop_gradient[w_it A_i] log pi(y_it | x, y_i<t)

A_i from `agro_advantages` over the WHOLE group, whatever version sampled it. Any positive weight applied
after the unweighted centring leaves pi* the fixed point (derived; held by
tests/learner/objectives/test_objectives.py), since every A_i is 0 there:

    truncated   w_it = min(cap, pi(y_i) / mu(y_i))                 one for the sequence
    geometric   w_it = min(cap, (pi(y_i) / mu(y_i))^(1/length))    one for the sequence
    token       w_it = min(cap, pi(y_it) / mu(y_it))

`target` pass@k or majority@k replaces the reward's part of A_i (_k_sample.py). The on-policy term
(on_policy_coef) is valid for samples of the current policy: it acts on those of staleness 0 (on_policy_gate
fresh), or on all times min(cap, pi/mu) (weighted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from core import config as core_config
from learner.objectives import Objective, TokenBatch
from learner.objectives._advantages import agro_advantages
from learner.objectives._k_sample import MAX_VOTE_SUBSETS, k_sample_advantages
from learner.objectives._knobs import ReferenceConfig


class Config(ReferenceConfig):
    """AGRO's knobs; docs/objectives.md gives the reasons for the defaults."""

    name: Literal["agro"] = "agro"
    beta: float = Field(
        0.03, ge=0, description="Strength of the pull towards the reference; 0: leave-one-out REINFORCE."
    )
    importance_weight: Literal["none", "truncated", "token", "geometric"] = Field(
        "token",
        description="Weight after centring, for lagged data: min(cap, pi/mu) of the sequence, of each token, "
        "or of the mean token.",
    )
    importance_cap: float = Field(
        5.0, gt=0, description="Cap of the weight; docs/objectives.md says what a lower one costs."
    )
    on_policy_coef: float = Field(
        0.0,
        ge=0,
        le=1,
        description="On-policy term's coefficient; 0: off-policy AGRO, 1: its literal on-policy form.",
    )
    on_policy_baseline: Literal["none", "loo", "running"] = Field(
        "loo",
        description="Baseline of the on-policy term; `running`: the prompt's variance in earlier steps.",
    )
    on_policy_gate: Literal["fresh", "weighted"] = Field(
        "fresh",
        description="The on-policy term acts on samples of staleness 0 only, or on all, times "
        "min(importance_cap, pi/mu).",
    )
    zero_std: Literal["keep", "drop"] = Field(
        "keep", description="Groups whose rewards are all equal still carry the KL pull."
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="`drop` counts equal completions of a group once; independent samples may be "
        "equal, replayed ones should not.",
    )
    target: str = Field(
        "mean",
        pattern=r"^(mean|(pass|majority)@[1-9][0-9]*)$",
        description="What a prompt's samples are trained for: `mean` reward, `pass@k` (best of k) or "
        "`majority@k` (vote of k).",
    )

    @property
    def target_k(self) -> int:
        """The k of `pass@k` and `majority@k`; 1 for `mean`."""
        return int(self.target.partition("@")[2] or 1)

    @property
    def fewest_samples(self) -> tuple[int, str]:
        """How many samples a group must have, and which knob wants so many."""
        return max((2, ""), (self.target_k, f"objective.target = {self.target}"))

    @property
    def compares_answers(self) -> bool:
        """True where samples vote for one answer (`target: majority@k`)."""
        return self.target.startswith("majority")

    @pydantic.model_validator(mode="after")
    def _on_policy_term_can_be_computed(self) -> Self:
        if self.on_policy_coef > 0 and self.beta == 0:
            raise ValueError(
                "objective.on_policy_coef > 0 needs objective.beta > 0: the on-policy term is divided by "
                "beta."
            )
        if self.on_policy_coef > 0 and self.target != "mean":
            raise ValueError(
                f"objective.target = {self.target} and objective.on_policy_coef = {self.on_policy_coef} do "
                "not go together. Set objective.on_policy_coef=0."
            )
        return self

    def check(self, config: core_config.Config) -> None:
        """Raises ValueError for a target that a group of `actors.group_size` samples cannot have."""
        n, named = config.actors.group_size, f"objective.target = {self.target}"
        if self.target_k > n:
            raise ValueError(
                f"{named} needs k <= actors.group_size = {n}. Raise actors.group_size or lower k."
            )
        if self.compares_answers and math.comb(n, self.target_k) > MAX_VOTE_SUBSETS:
            raise ValueError(
                f"{named} of actors.group_size = {n}: {math.comb(n, self.target_k)} subsets to vote in each "
                f"group, more than {MAX_VOTE_SUBSETS}. Choose a smaller k or group_size."
            )

    def warnings(self, config: core_config.Config) -> list[str]:
        """Returns what may surprise in these knobs together with the rest of the run's, a sentence each."""
        found, named = [], f"objective.on_policy_coef = {self.on_policy_coef}"
        if self.on_policy_coef > 2 * self.beta:
            found.append(
                f"{named} > 2 * beta = {2 * self.beta}: for prompts solved less than half the time the "
                "on-policy term pushes correct answers down (docs/objectives.md, hazard)."
            )
        publish_every = config.weights.publish_every
        if self.on_policy_coef > 0 and self.on_policy_gate == "fresh" and publish_every > 1:
            found.append(
                f"{named} with objective.on_policy_gate = fresh and weights.publish_every = {publish_every}: "
                "few samples are ever of the current policy (staleness/fresh_fraction); on the others the "
                "on-policy term does nothing."
            )
        if self.target != "mean" and self.target_k == config.actors.group_size:
            found.append(
                f"objective.target = {self.target} with actors.group_size = {config.actors.group_size}: with "
                "k = n nothing is left to centre with on off-policy data. Raise actors.group_size."
            )
        return found


@dataclass(frozen=True)
class Agro:
    """The objective of the module's formula: `Agro(Config()).loss(batch)`. Coefficients are float64 whatever
    the log-probs' dtype.
    """

    config: Config

    @property
    def needs(self) -> frozenset[str]:
        """What these knobs need, of NEEDS."""
        config = self.config
        needed = {
            "reference": config.beta > 0,
            "behaviour_logprobs": config.importance_weight != "none"
            or (config.on_policy_coef > 0 and config.on_policy_gate == "weighted"),
            "freshness": config.on_policy_coef > 0 and config.on_policy_gate == "fresh",
            "prompt_variance": config.on_policy_coef > 0 and config.on_policy_baseline == "running",
            "answers": config.target.startswith("majority"),
            "completions": config.duplicates == "drop",
        }
        return frozenset(name for name, is_needed in needed.items() if is_needed)

    def loss(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of the module's formula, and diagnostics (Objective.loss)."""
        logprobs_T = batch.logprobs_T.detach().double()
        rewards_N = batch.rewards_N.double()
        log_ratio_N = torch.zeros_like(rewards_N)
        if self.config.beta > 0:
            log_ratio_N = batch.sequence_sums(logprobs_T) - batch.ref_logprobs_N.double()
        kept_N = self._kept(batch)
        _, group_of_N = torch.unique(batch.groups_N, return_inverse=True)
        sizes_N = torch.bincount(group_of_N[kept_N], minlength=int(group_of_N.max()) + 1)[
            group_of_N
        ].clamp_min(1)
        zero_std_N = _zero_std(rewards_N, group_of_N)

        advantage_N = torch.zeros_like(rewards_N)
        advantage_N[kept_N] = self._advantages(rewards_N, log_ratio_N, logprobs_T, batch, kept_N)
        if self.config.zero_std == "drop":
            advantage_N = advantage_N.masked_fill(zero_std_N, 0.0)
        weight_T = self._weights(logprobs_T, batch)
        coefficient_T = -weight_T * (advantage_N / (sizes_N * batch.num_groups))[batch.sequence_T]
        loss = (coefficient_T.to(batch.logprobs_T.dtype) * batch.logprobs_T).sum()

        diagnostics = {
            "advantage": advantage_N,
            "residual": rewards_N - self.config.beta * log_ratio_N,
            "log_ratio": log_ratio_N,
        }
        return loss, diagnostics | {"weight": batch.sequence_means(weight_T), "zero_std": zero_std_N}

    def _advantages(
        self, rewards_N: Tensor, log_ratio_N: Tensor, logprobs_T: Tensor, batch: TokenBatch, kept_N: Tensor
    ) -> Tensor:
        """Returns the advantages of the samples in `kept_N`, in their order."""
        config, groups = self.config, batch.groups_N[kept_N]
        rewards, log_ratios = rewards_N[kept_N], log_ratio_N[kept_N]
        if config.target != "mean":
            answers = None if batch.answers_N is None else batch.answers_N[kept_N]
            gain = k_sample_advantages(
                rewards, groups, target=config.target.partition("@")[0], k=config.target_k, answers=answers
            )
            return gain + agro_advantages(torch.zeros_like(rewards), log_ratios, groups, beta=config.beta)
        off_policy = agro_advantages(rewards, log_ratios, groups, beta=config.beta)
        if config.on_policy_coef == 0:
            return off_policy
        variances = (
            batch.needed("prompt_variance_N")[kept_N].double()
            if config.on_policy_baseline == "running"
            else None
        )
        on_policy = agro_advantages(
            rewards,
            log_ratios,
            groups,
            beta=config.beta,
            on_policy_coef=config.on_policy_coef,
            on_policy_baseline=config.on_policy_baseline,
            running_variances=variances,
        )
        return off_policy + self._gate(logprobs_T, batch)[kept_N] * (on_policy - off_policy)

    def _gate(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        """Returns [N] what the on-policy term is multiplied by, besides the weight that everything is
        multiplied by.
        """
        if self.config.on_policy_gate == "fresh":
            return (batch.staleness_N == 0).double()
        if self.config.importance_weight == "truncated":
            return torch.ones_like(batch.staleness_N)  # min(cap, pi/mu) is on the whole advantage already.
        return self._sequence_weight(logprobs_T, batch)

    def _weights(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        """Returns [T] the weights after centring."""
        kind = self.config.importance_weight
        if kind == "none":
            return torch.ones_like(logprobs_T)
        if kind == "truncated":
            return self._sequence_weight(logprobs_T, batch)[batch.sequence_T]
        log_weight_T = _log_weight(logprobs_T, batch)
        if kind == "geometric":
            log_weight_T = batch.sequence_means(log_weight_T)[batch.sequence_T]
        return self._capped(log_weight_T)

    def _sequence_weight(self, logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
        return self._capped(batch.sequence_sums(_log_weight(logprobs_T, batch)))

    def _capped(self, log_weight: Tensor) -> Tensor:
        """Returns min(cap, exp(log_weight)), clamped before the exponential so that it cannot overflow."""
        return log_weight.clamp_max(math.log(self.config.importance_cap)).exp()

    def _kept(self, batch: TokenBatch) -> Tensor:
        """Returns [N] bool: without the second and later equal completions of a group, where duplicates are
        dropped.
        """
        if self.config.duplicates == "keep":
            return torch.ones_like(batch.groups_N, dtype=torch.bool)
        keys = torch.stack([batch.groups_N, batch.needed("completions_N")])
        _, kind_of_N = torch.unique(keys, dim=1, return_inverse=True)
        order_N = torch.arange(len(kind_of_N), device=kind_of_N.device)
        first = torch.full_like(order_N, len(order_N)).scatter_reduce(0, kind_of_N, order_N, "amin")
        return first[kind_of_N] == order_N


def _log_weight(logprobs_T: Tensor, batch: TokenBatch) -> Tensor:
    """Returns [T] log pi/mu."""
    log_weight_T = logprobs_T - batch.behaviour_logprobs_T.double()
    if not torch.isfinite(log_weight_T).all():
        raise ValueError(
            "behaviour_logprobs_T holds values that are not finite; objective.importance_weight and "
            "on_policy_gate = weighted need every token's"
        )
    return log_weight_T


def _zero_std(rewards_N: Tensor, group_of_N: Tensor) -> Tensor:
    """Returns [N] bool: whether all rewards of the sample's group are equal."""
    empty = rewards_N.new_zeros(int(group_of_N.max()) + 1)
    bounds = [
        empty.scatter_reduce(0, group_of_N, rewards_N, how, include_self=False) for how in ("amin", "amax")
    ]
    return (bounds[0] == bounds[1])[group_of_N]


def build(config: Config) -> Objective:
    """Makes AGRO with these knobs."""
    return Agro(config)
