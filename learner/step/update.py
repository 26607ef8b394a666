"""One optimizer step from a Batch, exact for any sharding over ranks and micro-batches.

    groups --> this rank's share --> micro-batches --> log-probs --> objective --> gradient, summed over all --> step

Groups stay whole on a rank. Where a group fits a micro-batch, one forward pass serves the objective and the
gradient. Where it does not, pass 1 (no gradient) gives the log-probs of all its samples, the objective's
gradient with respect to each token's log-prob follows from them, and pass 2 accumulates sum_t c_t log pi_t
piece by piece: the same gradient.

Ranks may have unlike numbers of micro-batches, but ZeRO-3 gathers in every pass: those with fewer run empty
ones.

A number that is not finite skips the update on every rank, as if the batch had never been. What is found
before the first gradient is agreed upon with the number of passes. A rank that finds one later goes on with a
loss of NaN, since the others need its passes; then the gradient's norm is not finite either, which all of
them see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from core.config import Config
from core.records import Batch
from learner.objectives import Objective, TokenBatch, token_gradients
from learner.step.bad_batch import Skip
from learner.step.diagnostics import COLUMNS, objective_metrics
from learner.step.mismatch import MismatchCheck
from learner.step.packing import (
    MicroBatch,
    ModelInputs,
    TokenSequence,
    assign_groups,
    collate,
    plan_micro_batches,
)
from learner.step.rows import Row, batch_faults, by_row, note_faults, note_logprobs

VARIANCE_MEMORY = 0.5
"""How much of a prompt's running variance an earlier visit keeps; prompts come back an epoch later, to
another policy.
"""


class Policy(Protocol):
    """What an update needs of the policy (learner/policy/zero.py; a plain module in tests)."""

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, lr: float) -> float:
        """The gradient's norm before clipping. Not finite: the step was not done, the gradients are
        gone, nothing has changed.
        """
        ...

    def own_weights(self, bucket_bytes: int) -> Iterable[tuple[str, Tensor]]: ...


class FrozenPolicy(Protocol):
    """What an update needs of the reference and of the proximal policy."""

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor: ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...


def frozen_policies(objective: Objective) -> tuple[bool, bool]:
    """Whether the objective needs a reference, and a proximal policy: neither is loaded for nothing."""
    return bool({"reference", "reference_tokens"} & objective.needs), "proximal" in objective.needs


class Updater:
    """Turns Batches into optimizer steps on this rank."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reference: FrozenPolicy | None,
        objective: Objective,
        pad_id: int,
        device: torch.device,
        proximal: FrozenPolicy | None = None,
    ) -> None:
        self._config, self._policy, self._objective = config, policy, objective
        self._reference, self._proximal = reference, proximal
        self._pad_id, self._device = pad_id, device
        self._variances: dict[int, float] = {}  # By the prompt's row; for on_policy_baseline = running.
        self._moved: set[str] = set()
        self._is_base = False  # No step was done: policy, reference and proximal policy are the base model.
        self.skip: Skip | None = None
        """Why the last update was not done; None when it was."""
        self.mismatch: MismatchCheck | None = None
        """Compares fresh samples with what the actors say of them, before the step; None: nothing does."""
        self._rank, self._world_size = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )

    @property
    def keeps_reference(self) -> bool:
        """Whether reference log-probs stay true for later uses of a sample."""
        return self._reference is not None and not self._config.agro.ref_update_every

    def update(self, batch: Batch, lr: float) -> tuple[dict[str, float], dict[int, list[dict[str, float]]]]:
        """One step. Returns metrics and the samples' diagnostics by group, in the group's order; of all
        ranks, equal on every rank.

        Where a number is not finite the step is skipped: `skip` says why, the policy and its optimizer are as
        before, and so is what the updater keeps; there are no diagnostics then. Raises TrainingError, on
        every rank and before the step, when the actors sampled from something else than the policy
        (`mismatch`).
        """
        self.skip = None
        self._is_base = batch.step == 0
        self._move_frozen(batch.step)
        if reasons := batch_faults(batch):
            return self._skipped(Skip(reasons=reasons), lr)
        rows = self._rows_of_rank(batch)
        micro_batches = plan_micro_batches(
            [row.sequence.num_tokens for row in rows],
            [row.group_id for row in rows],
            self._config.learner.micro_batch_tokens,
            self._config.learner.layout,
        )
        self._fill_frozen(rows, micro_batches)
        split = [micro for micro in micro_batches if not micro.whole]
        coefficients, diagnostics = self._first_pass(rows, split, len(batch.groups))
        num_passes, is_faulty = self._largest([len(micro_batches), any(row.fault for row in rows)])
        if is_faulty:
            return self._skipped(self._gather_skip(rows, math.nan), lr)
        passes: list[MicroBatch | None] = [*micro_batches]
        passes += [None] * (num_passes - len(passes))
        for number, micro in enumerate(passes):
            logprobs_T = self._policy.logprobs(self._inputs(rows, micro), self._config.actors.temperature)
            loss, found = self._loss(rows, micro, logprobs_T, coefficients, len(batch.groups))
            self._policy.backward(loss, last=number == len(passes) - 1)
            diagnostics.update(found)
        compared = self._compare(batch, rows)
        grad_norm = self._policy.step(lr)
        if not math.isfinite(grad_norm):
            return self._skipped(self._gather_skip(rows, grad_norm), lr)
        samples = self._gather(rows, diagnostics)
        if "prompt_variance" in self._objective.needs:
            self._observe_variances(samples)
        per_group: dict[int, list[dict[str, float]]] = {}
        for values in zip(*samples.values(), strict=True):
            sample = dict(zip(samples, map(float, values), strict=True))
            per_group.setdefault(int(sample["group"]), []).append(sample)
        metrics = {"optim/grad_norm": grad_norm, "optim/lr": lr, **compared}
        return metrics | objective_metrics(samples, self._config.agro.beta), per_group

    @property
    def moved(self) -> frozenset[str]:
        """Which of "reference" and "proximal" are copies of the policy by now, no longer the base model."""
        return frozenset(self._moved)

    def get_state(self) -> dict[str, Any]:
        """What an update keeps for later ones besides the policies' weights, as JSON; equal on every rank."""
        return {"variances": sorted(self._variances.items()), "moved": sorted(self._moved)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `get_state` returned; the weights of what has `moved` are to be restored besides."""
        self._variances = {int(row): float(variance) for row, variance in state["variances"]}
        self._moved = set(state["moved"])

    # --- passes ---

    def _rows_of_rank(self, batch: Batch) -> list[Row]:
        shares = assign_groups([group.num_tokens for group in batch.groups], self._world_size)
        groups = [batch.groups[index] for index in shares[self._rank]]
        return [Row(group, index, batch.step) for group in groups for index in range(len(group.samples))]

    def _move_frozen(self, step: int) -> None:
        """Copy the policy into the reference (`agro.ref_update_every`) and the proximal policy when
        their time has come. Collective.
        """
        every = self._config.agro.ref_update_every
        bucket_bytes = int(self._config.weights.bucket_mib * 2**20)
        if self._reference is not None and every and step and step % every == 0:
            self._reference.load(self._policy.own_weights(bucket_bytes))
            self._moved.add("reference")
        if self._proximal is not None and step % self._config.rivals.proximal_every == 0:
            self._proximal.load(self._policy.own_weights(bucket_bytes))
            self._moved.add("proximal")

    def _fill_frozen(self, rows: list[Row], micro_batches: list[MicroBatch]) -> None:
        """Log-probs by the reference, and by the proximal policy, as the objective needs them; by the
        learner's own kernels.

        Sums by a reference that never moves come with the sample once they are known. At step 0 both are the
        policy: see `_note`.
        """
        if self._is_base:
            return
        if self._reference is not None:
            cached = "reference_tokens" not in self._objective.needs and self.keeps_reference
            missing = [
                m for m in micro_batches if not cached or any(rows[i].ref_logprob is None for i in m.indices)
            ]
            for index, values in self._frozen_logprobs(self._reference, "reference", rows, missing):
                rows[index].ref_logprobs, rows[index].ref_logprob = values, float(values.double().sum())
        if self._proximal is not None:
            for index, values in self._frozen_logprobs(
                self._proximal, "proximal policy", rows, micro_batches
            ):
                rows[index].proximal_logprobs = values

    def _note(self, rows: list[Row], micro: MicroBatch, logprobs_T: Tensor) -> None:
        """Let the rows have their log-probs by the policy; at step 0 those by its copies too: they need
        no passes then.
        """
        note_logprobs(rows, micro.indices, logprobs_T)
        if not self._is_base:
            return
        for index, values in zip(micro.indices, by_row(rows, micro.indices, logprobs_T), strict=True):
            row = rows[index]
            if self._reference is not None:
                row.ref_logprobs, row.ref_logprob = values, float(values.double().sum())
            if self._proximal is not None:
                row.proximal_logprobs = values

    def _frozen_logprobs(
        self, model: FrozenPolicy, name: str, rows: list[Row], micro_batches: list[MicroBatch]
    ) -> Iterable[tuple[int, Tensor]]:
        for number in range(self._most(len(micro_batches))):
            micro = micro_batches[number] if number < len(micro_batches) else None
            values_T = model.logprobs(self._inputs(rows, micro), self._config.actors.temperature)
            if micro:
                note_faults(rows, micro.indices, values_T, f"log-probs by the {name}")
                yield from zip(micro.indices, by_row(rows, micro.indices, values_T), strict=True)

    def _first_pass(
        self, rows: list[Row], split: list[MicroBatch], num_groups: int
    ) -> tuple[dict[int, Tensor], dict[int, dict[str, float]]]:
        """Per row of a split group: the loss's gradient with respect to each of its tokens' log-probs;
        and diagnostics.
        """
        logprobs: dict[int, Tensor] = {}
        for number in range(self._most(len(split))):
            micro = split[number] if number < len(split) else None
            with torch.no_grad():
                values_T = self._policy.logprobs(self._inputs(rows, micro), self._config.actors.temperature)
            if micro:
                self._note(rows, micro, values_T)
                logprobs.update(zip(micro.indices, by_row(rows, micro.indices, values_T), strict=True))
        if not logprobs or any(row.fault for row in rows):
            return {}, {}
        indices = sorted(logprobs)
        batch = self._token_batch(
            [rows[i] for i in indices], torch.cat([logprobs[i] for i in indices]), num_groups
        )
        gradients_T = token_gradients(self._objective, batch)
        note_faults(rows, indices, gradients_T, "loss")
        _, diagnostics = self._objective.loss(batch)
        coefficients = dict(zip(indices, by_row(rows, indices, gradients_T), strict=True))
        return coefficients, dict(zip(indices, _sample_values(batch, diagnostics), strict=True))

    def _loss(
        self,
        rows: list[Row],
        micro: MicroBatch | None,
        logprobs_T: Tensor,
        coefficients: dict[int, Tensor],
        num_groups: int,
    ) -> tuple[Tensor, dict[int, dict[str, float]]]:
        """The loss of one micro-batch, and diagnostics of its rows (none for split groups: the first pass
        gave them).

        NaN, differentiable like any loss, where something is not finite; the objective does not see such
        log-probs.
        """
        if micro is None:
            return 0.0 * logprobs_T.sum(), {}
        self._note(rows, micro, logprobs_T.detach())
        if any(rows[i].fault for i in micro.indices):
            return math.nan * logprobs_T.sum(), {}
        if not micro.whole:
            return (torch.cat([coefficients[i] for i in micro.indices]) * logprobs_T).sum(), {}
        batch = self._token_batch([rows[i] for i in micro.indices], logprobs_T, num_groups)
        loss, diagnostics = self._objective.loss(batch)
        if not math.isfinite(float(loss.detach())):
            note_faults(rows, micro.indices, logprobs_T.detach() * math.nan, "loss")
            return math.nan * logprobs_T.sum(), {}
        return loss, dict(zip(micro.indices, _sample_values(batch, diagnostics), strict=True))

    def _compare(self, batch: Batch, rows: list[Row]) -> dict[str, float]:
        """Metrics of how far the fresh samples' log-probs are from the actors'; none where there are no
        such samples. Collective.
        """
        if self.mismatch is None or not self.mismatch.any_fresh(batch):
            return {}
        mine = self.mismatch.sums(rows, batch.step)
        parts = [mine] * self._world_size
        if self._world_size > 1:
            dist.all_gather_object(parts, mine)
        return self.mismatch.judge(batch.step, parts)

    def _inputs(self, rows: list[Row], micro: MicroBatch | None) -> ModelInputs:
        sequences = (
            [rows[i].sequence for i in micro.indices]
            if micro
            else [TokenSequence((self._pad_id,), (self._pad_id,))]
        )
        return collate(sequences, self._config.learner.layout, self._pad_id, self._device)

    def _token_batch(self, rows: Sequence[Row], logprobs_T: Tensor, num_groups: int) -> TokenBatch:
        def tensor(values: list, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        def per_token(values: list[Tensor | None]) -> Tensor | None:
            known = [value for value in values if value is not None]
            return torch.cat(known) if known and len(known) == len(values) else None

        lengths = tensor([len(row.sample.token_ids) for row in rows], torch.int64)
        return TokenBatch(
            logprobs_T=logprobs_T,
            behaviour_logprobs_T=tensor(
                [value for row in rows for value in row.behaviour_logprobs], torch.float32
            ),
            sequence_T=torch.arange(len(rows), device=self._device).repeat_interleave(lengths),
            rewards_N=tensor([row.sample.reward for row in rows]),
            ref_logprobs_N=tensor([math.nan if row.ref_logprob is None else row.ref_logprob for row in rows]),
            groups_N=tensor([row.group_id for row in rows], torch.int64),
            staleness_N=tensor([row.staleness for row in rows]),
            num_groups=num_groups,
            ref_logprobs_T=per_token([row.ref_logprobs for row in rows]),
            proximal_logprobs_T=per_token([row.proximal_logprobs for row in rows]),
            prompt_variance_N=tensor([self._variances.get(row.prompt_row, math.nan) for row in rows]),
            answers_N=tensor([row.answer_id for row in rows], torch.int64),
            completions_N=tensor([row.completion_id for row in rows], torch.int64),
        )

    # --- over the ranks ---

    def _most(self, count: int) -> int:
        """The largest `count` of any rank."""
        return self._largest([count])[0]

    def _largest(self, counts: list[int]) -> list[int]:
        """Each the largest of any rank."""
        if self._world_size == 1:
            return counts
        values = torch.tensor(counts)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def _skipped(self, skip: Skip, lr: float) -> tuple[dict[str, float], dict[int, list[dict[str, float]]]]:
        """What `update` returns of a step that is not done."""
        self.skip = skip
        return {"optim/grad_norm": skip.grad_norm, "optim/lr": lr}, {}

    def _gather_skip(self, rows: list[Row], grad_norm: float) -> Skip:
        """What every rank knows of the step that is not done. Collective."""
        mine = [(row.group_id, row.index, row.fault, row.mean_logprob) for row in rows]
        parts = [mine] * self._world_size
        if self._world_size > 1:
            dist.all_gather_object(parts, mine)
        reasons: dict[int, str] = {}
        means: dict[int, list[float | None]] = {}
        for group_id, _, fault, mean_logprob in sorted(
            (row for part in parts for row in part), key=lambda row: row[:2]
        ):
            means.setdefault(group_id, []).append(mean_logprob)
            if fault:
                reasons.setdefault(group_id, fault)
        return Skip(
            reasons=reasons,
            grad_norm=grad_norm,
            mean_logprobs={group_id: tuple(values) for group_id, values in means.items()},
        )

    def _gather(self, rows: list[Row], diagnostics: dict[int, dict[str, float]]) -> dict[str, np.ndarray]:
        """The columns of learner/step/diagnostics.py over all ranks, ordered by group and place in it."""
        table = [self._values(rows[number], diagnostics[number]) for number in sorted(diagnostics)]
        tables = [np.array(table, dtype=np.float64).reshape(-1, len(COLUMNS))]
        if self._world_size > 1:
            mine, tables = tables[0], [tables[0]] * self._world_size
            dist.all_gather_object(tables, mine)
        samples = np.concatenate(tables)
        samples = samples[
            np.lexsort((samples[:, COLUMNS.index("index")], samples[:, COLUMNS.index("group")]))
        ]
        return {name: samples[:, number] for number, name in enumerate(COLUMNS)}

    def _values(self, row: Row, found: dict[str, float]) -> list[float]:
        known: dict[str, float] = {
            "group": row.group_id,
            "row": row.prompt_row,
            "index": row.index,
            "reward": math.nan if row.sample.reward is None else row.sample.reward,
            "staleness": row.staleness,
            "ref_logprob": math.nan if row.ref_logprob is None else row.ref_logprob,
        }
        return [{**known, **found}[name] for name in COLUMNS]

    def _observe_variances(self, samples: dict[str, np.ndarray]) -> None:
        """Let the residuals of this step count for their prompts' next visit."""
        residuals = samples["reward"] - self._config.agro.beta * samples["log_ratio"]
        for row in np.unique(samples["row"]):
            values = residuals[samples["row"] == row]
            if len(values) > 1:
                variance = float(np.var(values, ddof=1))
                before = self._variances.get(int(row), variance)
                self._variances[int(row)] = VARIANCE_MEMORY * before + (1 - VARIANCE_MEMORY) * variance


def _sample_values(batch: TokenBatch, diagnostics: dict[str, Tensor]) -> list[dict[str, float]]:
    """Per sample what the objective says of it, and what holds for any objective."""
    logprobs_T = batch.logprobs_T.detach().double()
    logprob_N = batch.sequence_sums(logprobs_T)
    columns = {
        "advantage": diagnostics["advantage"],
        "weight": diagnostics["weight"],
        "log_ratio": logprob_N - batch.ref_logprobs_N,
        "log_importance": batch.sequence_sums(logprobs_T - batch.behaviour_logprobs_T.double()),
        "loss": -diagnostics["weight"] * diagnostics["advantage"] * logprob_N,
    }
    return [
        dict(zip(columns, map(float, values), strict=True))
        for values in zip(*(c.tolist() for c in columns.values()), strict=True)
    ]
