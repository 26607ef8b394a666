"""One rank of tests/learner/step/test_guards.py: `main(DIR, RANK)`, with DIR/config.json; rank 0 writes
DIR/found.json.

Two policies train side by side, each its own ZeRO-3 engine with moments: one gets every batch, some spoilt,
the other only the good ones.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from core.arrays import Float32s
from core.records import Batch, StoredGroup, VersionSpan, encode_batch
from learner.step.packing import collate
from learner.step.ranks import Ranks
from learner.step.samples import sequences_of
from learner.step.share import Share

STEPS = (
    "good",
    "good",
    "policy",
    "good",
    "gradient",
    "first pass",
    "good",
    "reference",
    "loss",
    "reward",
    "good",
)
"""What is spoilt in each learner step, on the last rank only where it can be."""


class Spoilt:
    """A policy or reference that at `now` gives one NaN, or an infinite gradient."""

    def __init__(self, policy: Any, *kinds: str) -> None:
        self._policy, self._kinds, self.now, self._calls = policy, kinds, "good", 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def start(self, kind: str) -> None:
        self.now, self._calls = kind if kind in self._kinds else "good", 0

    def logprobs(self, inputs: Any, temperature: float) -> torch.Tensor:
        values_T = self._policy.logprobs(inputs, temperature)
        self._calls += torch.is_grad_enabled()
        # In the middle of the step: micro-batches of this rank and the other come before and after.
        in_policy = self.now == "policy" and torch.is_grad_enabled() and self._calls == 2
        if in_policy or self.now == "reference" or (self.now == "first pass" and not torch.is_grad_enabled()):
            spoil = torch.zeros_like(values_T)
            spoil[0] = math.nan
            return values_T + spoil
        return values_T

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._policy.backward(loss * 1e38 * 1e3 if self.now == "gradient" and last else loss, last=last)


class SpoiltObjective:
    """An objective whose loss is infinite at `now`."""

    def __init__(self, objective: Any) -> None:
        self._objective, self.needs, self.now = objective, objective.needs, "good"

    def loss(self, batch: Any) -> Any:
        loss, diagnostics = self._objective.loss(batch)
        return loss * (math.inf if self.now == "loss" else 1.0), diagnostics


def digest(policy: Any) -> str:
    """Of this rank's fp32 weights, moments, count of steps, and of the weights as the model has them."""
    found = hashlib.sha256(str(policy.adam_steps).encode())
    for part in policy.parts():
        found.update(part.key.encode() + part.values.float().contiguous().numpy().tobytes())
    for name, tensor in policy.named_weights(4096):
        found.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return found.hexdigest()


def with_infinite_reward(batch: Batch) -> Batch:
    first, *others = batch.groups
    sample = msgspec.structs.replace(first.samples[0], reward=math.inf)
    return Batch(batch.step, (msgspec.structs.replace(first, samples=(sample, *first.samples[1:])), *others))


def main(out_dir: Path, rank: int) -> None:
    """STEPS on a policy whose parts are spoilt in turn, beside one that only sees the good ones."""
    from core.errors import TrainingError
    from learner.catalogue import parse_config
    from learner.objectives import load_objective
    from learner.policy.zero import ZeroFrozen, ZeroPolicy, init_process_group
    from learner.step.guards import Guards
    from learner.step.update import Updater
    from tests.support.configs import LR
    from tests.support.learning.updates import random_batches
    from tests.support.scenarios.zero_scenario import meet

    torch.set_num_threads(1)
    config = parse_config(json.loads((out_dir / "config.json").read_text()))
    ranks = config.learner.ranks
    device = init_process_group(rank, ranks, "127.0.0.1", meet(out_dir, rank), use_gpu=False, timeout_s=120)
    objective = SpoiltObjective(load_objective(config.objective))
    policy, plain = (ZeroPolicy(config.model, config.learner) for _ in range(2))
    reference = Spoilt(ZeroFrozen(config.model, config.learner), "reference")
    spoilt = Spoilt(policy, "policy", "gradient", "first pass")
    updater, untouched = (
        Updater(config, trained, objective, {"reference": reference}, pad_id=0, device=device)
        for trained in (spoilt, plain)
    )

    events: list[str] = []
    guards = Guards(out_dir / "bad-batches", rank, tell=events.append, share=Ranks().first)
    batches = random_batches(policy.module.config.vocab_size)
    found: dict[str, Any] = {"events": events, "steps": []}
    for step, kind in enumerate(STEPS):
        batch = Batch(step, batches[step % len(batches)].groups)
        given = with_infinite_reward(batch) if kind == "reward" else batch
        before = digest(policy)
        for part in (reference, spoilt):
            part.start(kind if rank == ranks - 1 else "good")
        objective.now = kind if rank == ranks - 1 else "good"
        result = updater.update(Share.of(given), LR)
        objective.now = "good"
        reference.start("good")
        if kind == "good":
            untouched.update(Share.of(batch), LR)
        skip = result.skip
        same = digest(policy) == before, digest(policy) == digest(plain)
        found["steps"].append(told_of(kind, result, same))
        payload = encode_batch(step, [StoredGroup.of(group)._replace(uses=1) for group in given.groups])
        try:
            guards.judge(step, payload, result.metrics(), skip)
        except TrainingError as error:
            found["stopped"] = {"step": step, "errors": share_all(str(error)), "metrics": guards.metrics()}
            break
    found["mismatch"] = mismatches(config, policy, untouched, batches[0])
    if rank == 0:
        (out_dir / "found.json").write_text(json.dumps(found))


def told_of(kind: str, result: Any, same: tuple[bool, bool]) -> dict[str, Any]:
    """What all ranks say of a step. `same`: whether the policy is unchanged, and as the untouched one."""
    skip = result.skip
    return {
        "kind": kind,
        "is_unchanged": all(share_all(same[0])),
        "is_as_untouched": all(share_all(same[1])),
        "skips": share_all(skip and (skip.reasons, len(skip.mean_logprobs), skip.grad_norm)),
        "groups": len(result.by_group("advantage")),
        "grad_norm": result.grad_norm,
    }


def mismatches(config: Any, policy: Any, updater: Any, batch: Batch) -> dict[str, Any]:
    """What becomes of a batch that the policy drew itself, and of one in which others drew a single
    group, which is on one rank only.
    """
    from core.errors import TrainingError
    from learner.step.mismatch import MismatchCheck
    from tests.support.configs import LR

    plain, told = updater._policy, []
    updater.mismatch = MismatchCheck(config, policy.module.config, tell=told.append)
    metrics = updater.update(Share.of(drawn(batch, plain, config.learner.layout)), LR).metrics()
    found: dict[str, Any] = {
        "told": told,
        "metrics": share_all({k: v for k, v in metrics.items() if k.startswith("mismatch/")}),
    }

    first, *others = drawn(batch, plain, config.learner.layout).groups
    wrong = [
        msgspec.structs.replace(sample, logprobs=Float32s.of(sample.logprobs.numpy() / 0.7))
        for sample in first.samples
    ]
    before = digest(plain)
    updater.mismatch = MismatchCheck(config, policy.module.config)
    try:
        updater.update(
            Share.of(Batch(0, (msgspec.structs.replace(first, samples=tuple(wrong)), *others))), LR
        )
    except TrainingError as error:
        found["errors"] = share_all(str(error))
    return found | {"is_unchanged": share_all(digest(plain) == before)}


def share_all(value: Any) -> list[Any]:
    """Every rank's value."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def drawn(batch: Batch, policy: Any, layout: Any) -> Batch:
    """The batch as if `policy` had drawn it just now: its log-probs, the batch's version."""
    groups = []
    for group in batch.groups:
        samples = [sequences_of(sample) for sample in group.samples]
        with torch.no_grad():
            values = [policy.logprobs(collate(segments, layout, 0), 1.0).tolist() for segments in samples]
        samples = [
            msgspec.structs.replace(
                sample, logprobs=Float32s.of(found), version_spans=(VersionSpan(batch.step, 0, len(found)),)
            )
            for sample, found in zip(group.samples, values, strict=True)
        ]
        groups.append(msgspec.structs.replace(group, samples=tuple(samples)))
    return Batch(batch.step, tuple(groups))
