"""One optimizer step from a rank's share of a batch, exact for any sharding over ranks and passes.

    Share --plan_step--> StepPlan --frozen policies--> FrozenLogprobs --first pass--> gradients of split groups
                            `--gradient passes: log-probs --> objective --> backward--> step --> StepResult

Groups stay whole on a rank. A sample's segments are sequences of their own in the passes, and one sample to
the objective. Where a group fits a micro-batch, one forward pass serves the objective and the
gradient. Where it does not, a first pass without gradient gives the log-probs of all its samples, the
objective's gradient with respect to each token's log-prob follows from them, and the gradient passes
accumulate sum_t c_t log pi_t piece by piece: the same gradient.

A number that is not finite skips the step on every rank, as if the batch had never been. What is found before
the first gradient is agreed upon. A rank that finds one later goes on with a loss of NaN, since the others
need its passes; then the gradient's norm is not finite either, which all of them see.

Tensor letters: N samples of this rank, T sampled tokens of all of them, both in the order of the passes; K
columns of FOUND.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.config import Config
from learner.objectives import Objective, TokenBatch, token_gradients
from learner.step.frozen import FrozenLogprobs, FrozenPolicies, joined, run_passes
from learner.step.mismatch import MismatchCheck
from learner.step.plan import ForwardPass, StepPlan, plan_step
from learner.step.policies import FrozenPolicy, TrainedPolicy
from learner.step.ranks import Ranks
from learner.step.result import FOUND, StepResult, found_of, gather_samples, gather_skip
from learner.step.samples import Stretch, faults_of
from learner.step.share import Share
from learner.step.variances import PromptVariances


class PassValues(NamedTuple):
    """What passes by the policy gave for the samples of `stretch`.

    logprobs_T  log-probs by the policy, detached
    loss_T      what of the loss reaches each token: not finite where the loss is not
    found_NK    the columns FOUND; NaN where the loss could not be computed
    """

    stretch: Stretch
    logprobs_T: Tensor
    loss_T: Tensor
    found_NK: Tensor


class Agreed(NamedTuple):
    """What the ranks agree on before their first pass: the largest value of any rank."""

    reference_passes: int
    proximal_passes: int
    split_passes: int
    passes: int
    has_fault: int
    has_fresh: int


class Updater:
    """Turns batches into optimizer steps on this rank: `updater.update(share, lr)` on all ranks at once.

    `mismatch` compares fresh samples with what the actors say of them, before the step; None compares
    nothing.
    """

    def __init__(
        self,
        config: Config,
        policy: TrainedPolicy,
        objective: Objective,
        frozen: Mapping[str, FrozenPolicy] | None = None,
        *,
        pad_id: int,
        device: torch.device,
    ) -> None:
        """`frozen` holds a policy for each of the objective's `frozen_names`."""
        self._learner, self._temperature = config.learner, config.actors.temperature
        self._beta = config.objective.beta
        self._policy, self._objective = policy, objective
        self._frozen = FrozenPolicies(frozen or {}, config, objective.needs)
        self._pad_id, self._device = pad_id, device
        self._variances = PromptVariances()
        self._ranks = Ranks(config.learner.sequence_parallel)
        self.mismatch: MismatchCheck | None = None

    @property
    def keeps_reference(self) -> bool:
        """True where a reference never moves: its log-probs stay true for later uses of a sample."""
        return self._frozen.keeps_reference

    @property
    def moved(self) -> frozenset[str]:
        """Which of "reference" and "proximal" are copies of the policy by now, no longer the base model."""
        return frozenset(self._frozen.moved)

    def update(self, share: Share, lr: float) -> StepResult:
        """Takes one optimizer step at learning rate `lr`, or none; the result is equal on every rank.
        Collective.

        Where a number is not finite the step is skipped: the policy and its optimizer are as before, and so
        is what the updater keeps. Raises TrainingError, on every rank and before the step, when the actors
        sampled from something else than the policy.
        """
        self._frozen.move(self._policy, share.index.step)
        plan = plan_step(
            share,
            self._learner,
            needs=self._objective.needs,
            pad_id=self._pad_id,
            device=self._device,
            shares_beginnings=self._policy.shares_beginnings,
        )
        agreed = self._agree(plan)
        if agreed.has_fault:
            return self._skipped(plan, lr, plan.samples.faults())
        frozen = self._frozen.logprobs(plan, (agreed.reference_passes, agreed.proximal_passes))
        split = self._first_pass(plan, frozen, agreed.split_passes)
        faults = _faults(plan, frozen, split)
        if self._ranks.largest([any(faults)])[0]:
            return self._skipped(plan, lr, faults, split)
        values = self._gradient_passes(plan, frozen, split, agreed.passes)
        faults = _faults(plan, frozen, values)
        mismatch = self._compare(plan, values, faults) if agreed.has_fresh else {}
        grad_norm = self._policy.step(lr)
        if not math.isfinite(grad_norm):
            return self._skipped(plan, lr, faults, values, grad_norm)
        samples = gather_samples(self._ranks, plan.samples, values.found_NK)
        if "prompt_variance" in self._objective.needs:
            self._variances.observe(samples, self._beta)
        return StepResult(plan.step, lr, grad_norm, self._beta, samples, mismatch)

    def get_state(self) -> dict[str, Any]:
        """Returns what a step keeps for later ones besides the policies' weights, as JSON; equal on every
        rank.
        """
        return {"variances": self._variances.get_state(), "moved": sorted(self._frozen.moved)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned; the weights of what has `moved` are to be restored
        besides.
        """
        self._variances.set_state(state["variances"])
        self._frozen.set_moved(state["moved"])

    # --- verbs of a step ------------------------------------------------------------------------------------

    def _agree(self, plan: StepPlan) -> Agreed:
        reference_passes, proximal_passes = self._frozen.num_passes(plan)
        mine = Agreed(
            reference_passes=reference_passes,
            proximal_passes=proximal_passes,
            split_passes=len(plan.split_passes),
            passes=len(plan.passes),
            has_fault=any(plan.samples.faults()),
            has_fresh=self.mismatch is not None and self.mismatch.any_fresh(plan.samples, plan.step),
        )
        return Agreed(*self._ranks.largest(mine))

    def _first_pass(self, plan: StepPlan, frozen: FrozenLogprobs, count: int) -> PassValues:
        """Returns the log-probs of all split groups, without gradient, and the loss's gradient with respect
        to each of them. Collective.
        """
        stretch = plan.split_stretch
        values = run_passes(self._policy, plan, plan.split_passes, count, self._temperature)
        logprobs_T = joined(plan, values)
        without_loss = _without_loss(stretch, logprobs_T)
        if not len(stretch) or any(_faults(plan, frozen, without_loss)):
            return without_loss
        batch = self._token_batch(plan, stretch, logprobs_T, frozen)
        gradient_T = token_gradients(self._objective, batch)
        _, diagnostics = self._objective.loss(batch)
        return PassValues(stretch, logprobs_T, gradient_T, found_of(batch, diagnostics))

    def _gradient_passes(
        self, plan: StepPlan, frozen: FrozenLogprobs, split: PassValues, count: int
    ) -> PassValues:
        """Accumulates the gradient over all passes of the plan, and idle ones, `count` in all. Collective."""
        passes, values = plan.filled(plan.passes, count), []
        for number, each in enumerate(passes):
            logprobs_T = self._policy.logprobs(each.inputs, self._temperature)
            loss, found = self._loss(plan, each, logprobs_T, frozen, split)
            self._policy.backward(loss, last=number == len(passes) - 1)
            values.append(found)
        # A sample of a split group may be in several passes, and is in `split` once.
        whole = [found for each, found in zip(passes, values, strict=True) if each.is_whole]
        return PassValues(
            plan.samples.whole,
            torch.cat([found.logprobs_T for found in values]),
            torch.cat([found.loss_T for found in values]),
            torch.cat([found.found_NK for found in (*whole, split)]),
        )

    def _loss(
        self, plan: StepPlan, each: ForwardPass, logprobs_T: Tensor, frozen: FrozenLogprobs, split: PassValues
    ) -> tuple[Tensor, PassValues]:
        """Returns the loss of one pass, differentiable in `logprobs_T`, and what is to be kept of the pass.

        The loss is NaN where something is not finite; the objective does not see log-probs that are not.
        """
        stretch, values_T = each.stretch, logprobs_T.detach()
        if each is plan.idle:
            return 0.0 * logprobs_T.sum(), _without_loss(stretch, values_T[:0])
        if not bool(values_T.isfinite().all()):
            return math.nan * logprobs_T.sum(), _without_loss(stretch, values_T)
        if not each.is_whole:
            gradient_T = split.loss_T[stretch.within(split.stretch).tokens]
            found = PassValues(stretch, values_T, gradient_T, split.found_NK[:0])
            return (gradient_T * logprobs_T).sum(), found
        batch = self._token_batch(plan, stretch, logprobs_T, frozen)
        loss, diagnostics = self._objective.loss(batch)
        found = PassValues(stretch, values_T, loss.detach().expand_as(values_T), found_of(batch, diagnostics))
        is_sound = math.isfinite(float(loss.detach()))
        return (loss if is_sound else math.nan * logprobs_T.sum()), found

    def _token_batch(
        self, plan: StepPlan, stretch: Stretch, logprobs_T: Tensor, frozen: FrozenLogprobs
    ) -> TokenBatch:
        """Returns what the objective sees of `stretch`, whose log-probs by the policy are `logprobs_T`."""
        mine, policy_T = plan.samples.of(stretch), logprobs_T.detach()
        theirs = frozen.of(stretch, policy_T, mine.sums(policy_T))
        variances_N = None
        if "prompt_variance" in self._objective.needs:
            variances_N = self._variances.of(mine.prompts_N)
        return TokenBatch(
            logprobs_T=logprobs_T,
            behaviour_logprobs_T=mine.behaviour_logprobs_T,
            sequence_T=mine.sequence_T,
            rewards_N=mine.rewards_N,
            ref_logprobs_N=theirs.reference_N,
            groups_N=mine.groups_N,
            staleness_N=mine.staleness_N,
            num_groups=plan.num_groups,
            ref_logprobs_T=theirs.reference_T,
            proximal_logprobs_T=theirs.proximal_T,
            prompt_variance_N=variances_N,
            answers_N=mine.answers_N,
            completions_N=mine.completions_N,
        )

    def _compare(
        self, plan: StepPlan, values: PassValues, faults: Sequence[str | None]
    ) -> Mapping[str, float]:
        """Returns metrics of how far the fresh samples' log-probs are from the actors'. Collective."""
        assert self.mismatch is not None
        is_sound_N = torch.tensor([fault is None for fault in faults], device=self._device)
        mine = self.mismatch.sums(plan.samples, values.logprobs_T, plan.step, is_sound_N)
        return self.mismatch.judge(plan.step, self._ranks.gather(mine))

    def _skipped(
        self,
        plan: StepPlan,
        lr: float,
        faults: Sequence[str | None],
        values: PassValues | None = None,
        grad_norm: float = math.nan,
    ) -> StepResult:
        """Returns the result of a step that is not done. `values` are what the policy gave by then.
        Collective.
        """
        means = [None] * len(plan.samples) if values is None else _mean_logprobs(plan, values)
        skip = gather_skip(self._ranks, plan.samples, faults, means, grad_norm)
        return StepResult(plan.step, lr, skip.grad_norm, self._beta, skip=skip)


def _without_loss(stretch: Stretch, logprobs_T: Tensor) -> PassValues:
    """Returns the values of passes whose loss is not known."""
    unknown_NK = logprobs_T.new_full((len(stretch), len(FOUND)), math.nan, dtype=torch.float64)
    return PassValues(stretch, logprobs_T, torch.zeros_like(logprobs_T), unknown_NK)


def _faults(plan: StepPlan, frozen: FrozenLogprobs, values: PassValues) -> list[str | None]:
    """Returns what of each sample is not finite after these passes; None for a sound sample."""
    return faults_of(
        {
            **frozen.must_be_finite,
            "log-probs by the policy": plan.samples.sums(values.logprobs_T, values.stretch),
            "loss": plan.samples.sums(values.loss_T, values.stretch),
        }
    )


def _mean_logprobs(plan: StepPlan, values: PassValues) -> list[float | None]:
    """Returns the mean log-prob of each sample's tokens by the policy, nats; None for samples out of
    `values`.
    """
    means_N = plan.samples.sums(values.logprobs_T, values.stretch) / plan.samples.sizes_N
    seen = range(len(plan.samples))[values.stretch.samples]
    return [mean if index in seen else None for index, mean in enumerate(means_N.tolist())]
