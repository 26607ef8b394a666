"""The policies that a step does not train, the reference and the proximal policy: when they move, and their
log-probs.

Both begin as the base model. The reference becomes a copy of the policy every `objective.ref_update_every`
steps, if that is set at all; the proximal policy every `objective.proximal_every` steps. An objective that
needs neither gets neither (`frozen_names`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.config import Config
from learner.objectives import Objective
from learner.step.plan import ForwardPass, StepPlan
from learner.step.policies import FrozenPolicy, ScoringPolicy, TrainedPolicy
from learner.step.samples import Stretch

REFERENCE, PROXIMAL = "reference", "proximal"


def frozen_names(objective: Objective) -> tuple[str, ...]:
    """Returns which of "reference" and "proximal" the objective needs: no other is loaded."""
    needed = {
        REFERENCE: bool({"reference", "reference_tokens"} & objective.needs),
        PROXIMAL: "proximal" in objective.needs,
    }
    return tuple(name for name, is_needed in needed.items() if is_needed)


@dataclass(frozen=True)
class FrozenLogprobs:
    """Log-probs by the policies that are not trained, of the samples of a plan or of a stretch of it.

    reference_N     float64, sums over the sampled tokens of each sample; NaN where nobody knows them
    reference_T     of each token; None unless the objective needs it
    proximal_T      of each token; None unless the objective needs it
    are_policy      the names of those that still are the policy, as at step 0: they need no passes
    must_be_finite  sums [N] by what they are called in an error
    """

    reference_N: Tensor
    reference_T: Tensor | None = None
    proximal_T: Tensor | None = None
    are_policy: frozenset[str] = frozenset()
    must_be_finite: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, stretch: Stretch, policy_T: Tensor, policy_N: Tensor) -> FrozenLogprobs:
        """Returns the log-probs of the samples of `stretch`, of which the policy's are `policy_T`, in sums
        `policy_N`.
        """
        reference_T = None if self.reference_T is None else self.reference_T[stretch.tokens]
        proximal_T = None if self.proximal_T is None else self.proximal_T[stretch.tokens]
        reference_N = self.reference_N[stretch.samples]
        if REFERENCE in self.are_policy:
            reference_N, reference_T = policy_N, policy_T
        if PROXIMAL in self.are_policy:
            proximal_T = policy_T
        return FrozenLogprobs(reference_N, reference_T, proximal_T)


class FrozenPolicies:
    """The frozen policies by name, which become copies of the policy as often as the config says.

    frozen = FrozenPolicies({"reference": ZeroFrozen(config.model, config.learner)}, config, objective.needs)
    frozen.move(policy, step)
    theirs = frozen.logprobs(plan, frozen.num_passes(plan))
    """

    def __init__(self, policies: Mapping[str, FrozenPolicy], config: Config, needs: Collection[str]) -> None:
        self._policies, self._needs = dict(policies), needs
        objective = config.objective
        self._every = {
            REFERENCE: objective.reference_moves_every,
            PROXIMAL: objective.proximal_moves_every,
        }
        self._bucket_bytes = config.learner.bucket_bytes
        self._temperature = config.actors.temperature
        self.moved: set[str] = set()
        """The names of those that are copies of the policy by now, no longer the base model."""

    @property
    def keeps_reference(self) -> bool:
        """True where a reference never moves: its log-probs stay true for later uses of a sample."""
        return REFERENCE in self._policies and not self._every[REFERENCE]

    def set_moved(self, names: Collection[str]) -> None:
        """Takes over what had `moved`, of what there is: the run may go on with another objective."""
        self.moved = set(names) & set(self._policies)

    def move(self, policy: TrainedPolicy, step: int) -> None:
        """Copies the policy into those whose time has come before learner step `step`. Collective."""
        for name, frozen in self._policies.items():
            every = self._every[name]
            is_due = bool(every) and step % every == 0
            if is_due and (step or name == PROXIMAL):
                frozen.load(policy.own_weights(self._bucket_bytes))
                self.moved.add(name)

    def num_passes(self, plan: StepPlan) -> list[int]:
        """Returns how many passes this rank needs by the reference, and by the proximal policy."""
        return [len(self._passes(plan, name)) for name in (REFERENCE, PROXIMAL)]

    def logprobs(self, plan: StepPlan, counts: Sequence[int]) -> FrozenLogprobs:
        """Returns their log-probs, by the learner's own kernels. `counts` is `num_passes` of the rank that
        needs most. Collective.
        """
        samples = plan.samples
        if plan.step == 0:
            return FrozenLogprobs(samples.ref_logprobs_N, are_policy=frozenset(self._policies))
        reference_N, reference_T, proximal_T = samples.ref_logprobs_N.clone(), None, None
        must_be_finite: dict[str, Tensor] = {}
        if REFERENCE in self._policies:
            passes = self._passes(plan, REFERENCE)
            values = run_passes(self._policies[REFERENCE], plan, passes, counts[0], self._temperature)
            for each in passes:
                reference_N[each.stretch.samples] = 0.0
            for each, values_T in zip(passes, values, strict=True):
                reference_N += samples.sums(values_T, each.stretch)  # A sample may be in several passes.
            if "reference_tokens" in self._needs:
                reference_T = joined(plan, values)
            must_be_finite["log-probs by the reference"] = reference_N
        if PROXIMAL in self._policies:
            values = run_passes(self._policies[PROXIMAL], plan, plan.passes, counts[1], self._temperature)
            proximal_T = joined(plan, values)
            must_be_finite["log-probs by the proximal policy"] = samples.sums(proximal_T)
        return FrozenLogprobs(reference_N, reference_T, proximal_T, must_be_finite=must_be_finite)

    def _passes(self, plan: StepPlan, name: str) -> tuple[ForwardPass, ...]:
        if name not in self._policies or plan.step == 0:
            return ()
        is_stored = name == REFERENCE and self.keeps_reference and "reference_tokens" not in self._needs
        if not is_stored:
            return plan.passes
        # Sums by a reference that never moves come with the sample once they are known.
        has_reference_N = plan.samples.has_reference_N
        return tuple(each for each in plan.passes if not bool(has_reference_N[each.stretch.samples].all()))


@torch.no_grad()
def run_passes(
    policy: ScoringPolicy, plan: StepPlan, passes: Sequence[ForwardPass], count: int, temperature: float
) -> list[Tensor]:
    """Returns the log-probs of each of `passes`, without gradient. Idle passes follow, so that it runs
    `count` in all. Collective.
    """
    values = [policy.logprobs(each.inputs, temperature) for each in plan.filled(passes, count)]
    return values[: len(passes)]


def joined(plan: StepPlan, values: Sequence[Tensor]) -> Tensor:
    """Returns [T] the values of all passes, one after another; empty on a rank without passes."""
    return torch.cat((plan.samples.behaviour_logprobs_T[:0], *values))
