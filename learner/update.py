"""One optimizer step from a Batch, exact for any sharding over ranks and micro-batches.

    groups --> this rank's share --> micro-batches --> log-probs --> objective --> gradient, summed over all --> step

Groups stay whole on a rank. Where a group fits a micro-batch, one forward pass serves the objective and the gradient.
Where it does not, pass 1 (no gradient) gives the log-probs of all its samples, the objective's gradient with respect to
each token's log-prob follows from them, and pass 2 accumulates sum_t c_t log pi_t piece by piece: the same gradient.

Ranks may have unlike numbers of micro-batches, but ZeRO-3 gathers in every pass: those with fewer run empty ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from buffer.records import Batch, Group, Sample
from cluster.config import Config
from cluster.errors import TrainingError
from learner.objectives import Objective, TokenBatch, token_gradients
from learner.packing import MicroBatch, ModelInputs, TokenSequence, assign_groups, collate, plan_micro_batches


class Policy(Protocol):
    """What an update needs of the policy (learner/zero.py; a plain module in tests)."""

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor: ...

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, lr: float) -> float: ...


class Reference(Protocol):
    """What an update needs of the reference."""

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor: ...


class Row:
    """One sample with what belongs to it, as the learner handles it."""

    def __init__(self, group: Group, index: int, step: int) -> None:
        self.sample: Sample = group.samples[index]
        self.group_id, self.index = group.group_id, index
        self.staleness = step - self.sample.oldest_version
        self.sequence = TokenSequence(group.prompt_ids, self.sample.token_ids)
        self.ref_logprob = self.sample.ref_logprob


class Updater:
    """Turns Batches into optimizer steps on this rank."""

    def __init__(
        self, config: Config, policy: Policy, reference: Reference, objective: Objective, pad_id: int, device: torch.device
    ) -> None:
        self._config, self._policy, self._reference, self._objective = config, policy, reference, objective
        self._pad_id, self._device = pad_id, device
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def update(self, batch: Batch, lr: float) -> tuple[dict[str, float], dict[int, list[dict[str, float]]]]:
        """One step. Returns metrics of the whole batch (equal on every rank) and this rank's diagnostics per group and sample.

        Raises TrainingError on every rank when a log-prob of any is not finite, before the parameters are touched.
        """
        _check_batch(batch)
        rows = self._rows_of_rank(batch)
        micro_batches = plan_micro_batches(
            [row.sequence.num_tokens for row in rows],
            [row.group_id for row in rows],
            self._config.learner.micro_batch_tokens,
            self._config.learner.layout,
        )
        self._fill_reference(rows, micro_batches)
        split = [micro for micro in micro_batches if not micro.whole]
        coefficients, diagnostics = self._first_pass(rows, split, len(batch.groups))
        passes: list[MicroBatch | None] = [*micro_batches]
        passes += [None] * (self._most(len(passes)) - len(passes))
        for number, micro in enumerate(passes):
            logprobs_T = self._policy.logprobs(self._inputs(rows, micro), self._config.actors.temperature)
            self._check_finite(logprobs_T)
            loss, found = self._loss(rows, micro, logprobs_T, coefficients, len(batch.groups))
            self._policy.backward(loss, last=number == len(passes) - 1)
            diagnostics.update(found)
        grad_norm = self._policy.step(lr)
        per_group: dict[int, list[dict[str, float]]] = {}
        for row_number in sorted(diagnostics):
            row = rows[row_number]
            per_group.setdefault(row.group_id, []).append({**diagnostics[row_number], "ref_logprob": row.ref_logprob or 0.0})
        return {"optim/grad_norm": grad_norm, "optim/lr": lr, **self._metrics(rows, diagnostics)}, per_group

    # --- passes ---------------------------------------------------------------------------------------------------

    def _rows_of_rank(self, batch: Batch) -> list[Row]:
        shares = assign_groups([group.num_tokens for group in batch.groups], self._world_size)
        groups = [batch.groups[index] for index in shares[self._rank]]
        return [Row(group, index, batch.step) for group in groups for index in range(len(group.samples))]

    def _fill_reference(self, rows: list[Row], micro_batches: list[MicroBatch]) -> None:
        """log pi_ref of every sample that does not carry it yet, by the learner's own kernels."""
        missing = [micro for micro in micro_batches if any(rows[i].ref_logprob is None for i in micro.indices)]
        for number in range(self._most(len(missing))):
            micro = missing[number] if number < len(missing) else None
            inputs = self._inputs(rows, micro)
            sums = _sequence_sums(self._reference.logprobs(inputs, self._config.actors.temperature), inputs)
            for index, value in zip(micro.indices if micro else (), sums.tolist(), strict=micro is not None):
                rows[index].ref_logprob = value

    def _first_pass(
        self, rows: list[Row], split: list[MicroBatch], num_groups: int
    ) -> tuple[dict[int, Tensor], dict[int, dict[str, float]]]:
        """Per row of a split group: the loss's gradient with respect to each of its tokens' log-probs; and diagnostics."""
        logprobs: dict[int, Tensor] = {}
        for number in range(self._most(len(split))):
            micro = split[number] if number < len(split) else None
            inputs = self._inputs(rows, micro)
            with torch.no_grad():
                values_T = self._policy.logprobs(inputs, self._config.actors.temperature)
            if micro:
                logprobs.update(zip(micro.indices, _by_sequence(values_T, inputs), strict=True))
        if not logprobs:
            return {}, {}
        indices = sorted(logprobs)
        batch = self._token_batch([rows[i] for i in indices], torch.cat([logprobs[i] for i in indices]), num_groups)
        gradients = token_gradients(self._objective, batch).split([len(rows[i].sample.token_ids) for i in indices])
        _, diagnostics = self._objective.loss(batch)
        return dict(zip(indices, gradients, strict=True)), _per_row(indices, diagnostics)

    def _loss(
        self, rows: list[Row], micro: MicroBatch | None, logprobs_T: Tensor, coefficients: dict[int, Tensor], num_groups: int
    ) -> tuple[Tensor, dict[int, dict[str, float]]]:
        """The loss of one micro-batch, and diagnostics of its rows (none for split groups: the first pass gave them)."""
        if micro is None:
            return 0.0 * logprobs_T.sum(), {}
        if not micro.whole:
            return (torch.cat([coefficients[i] for i in micro.indices]) * logprobs_T).sum(), {}
        loss, diagnostics = self._objective.loss(self._token_batch([rows[i] for i in micro.indices], logprobs_T, num_groups))
        return loss, _per_row(micro.indices, diagnostics)

    def _inputs(self, rows: list[Row], micro: MicroBatch | None) -> ModelInputs:
        sequences = [rows[i].sequence for i in micro.indices] if micro else [TokenSequence((self._pad_id,), (self._pad_id,))]
        return collate(sequences, self._config.learner.layout, self._pad_id, self._device)

    def _token_batch(self, rows: Sequence[Row], logprobs_T: Tensor, num_groups: int) -> TokenBatch:
        def tensor(values: list, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        lengths = tensor([len(row.sample.token_ids) for row in rows], torch.int64)
        return TokenBatch(
            logprobs_T=logprobs_T,
            behaviour_logprobs_T=tensor([value for row in rows for value in row.sample.logprobs], torch.float32),
            sequence_T=torch.arange(len(rows), device=self._device).repeat_interleave(lengths),
            rewards_N=tensor([row.sample.reward for row in rows]),
            ref_logprobs_N=tensor([row.ref_logprob for row in rows]),
            groups_N=tensor([row.group_id for row in rows], torch.int64),
            staleness_N=tensor([row.staleness for row in rows]),
            num_groups=num_groups,
        )

    # --- over the ranks -------------------------------------------------------------------------------------------

    def _most(self, count: int) -> int:
        """The largest `count` of any rank."""
        if self._world_size == 1:
            return count
        value = torch.tensor([count])
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def _check_finite(self, values: Tensor) -> None:
        if self._most(0 if bool(torch.isfinite(values).all()) else 1):
            raise TrainingError(
                "the policy's log-probs are not finite on some rank. Lower learner.lr, or check the model with transformers."
            )

    def _metrics(self, rows: list[Row], diagnostics: dict[int, dict[str, float]]) -> dict[str, float]:
        """Means over all samples of all ranks; the residual's spread is taken within groups."""
        by_group: dict[int, list[float]] = {}
        for number, values in diagnostics.items():
            by_group.setdefault(rows[number].group_id, []).append(values["residual"])
        spread = sum(sum((r - sum(residuals) / len(residuals)) ** 2 for r in residuals) for residuals in by_group.values())
        names = ("residual", "log_ratio", "weight", "advantage_abs")
        totals = [sum(values.get(name, math.nan) for values in diagnostics.values()) for name in names]
        freedom = sum(len(residuals) - 1 for residuals in by_group.values())
        sums = torch.tensor([float(len(diagnostics)), spread, float(freedom), *totals], dtype=torch.float64)
        if self._world_size > 1:
            dist.all_reduce(sums)
        count, spread, freedom_all, *totals = sums.tolist()
        residual, log_ratio, weight, advantage = (total / count for total in totals)
        return {
            "agro/residual_mean": residual,
            "agro/residual_std": math.sqrt(spread / max(freedom_all, 1.0)),
            "agro/kl_ref": log_ratio,
            "agro/weight_mean": weight,
            "agro/advantage_abs_mean": advantage,
        }


def _check_batch(batch: Batch) -> None:
    """Every rank looks at the whole batch, so that all of them stop together."""
    for group in batch.groups:
        for sample in group.samples:
            if not math.isfinite(sum(sample.logprobs)) or sample.reward is None or not math.isfinite(sample.reward):
                raise TrainingError(f"group {group.group_id} holds a sample without finite reward and log-probs: {sample}")


def _sequence_sums(values_T: Tensor, inputs: ModelInputs) -> Tensor:
    num_sequences = int(inputs.sequence_T[-1]) + 1
    return values_T.new_zeros(num_sequences).index_add(0, inputs.sequence_T, values_T)


def _by_sequence(values_T: Tensor, inputs: ModelInputs) -> tuple[Tensor, ...]:
    return values_T.split(torch.bincount(inputs.sequence_T).tolist())


def _per_row(indices: Sequence[int], diagnostics: dict[str, Tensor]) -> dict[int, dict[str, float]]:
    columns = {name: values.tolist() for name, values in diagnostics.items()}
    found = {index: {name: float(column[n]) for name, column in columns.items()} for n, index in enumerate(indices)}
    return {index: {**values, "advantage_abs": abs(values["advantage"])} for index, values in found.items()}
