"""What tests of the update share: random batches, an updater without DeepSpeed, and a policy that tells
what it is asked."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import msgspec
import torch

from benchmarks.studies.lag_lab import PlainPolicy
from core.arrays import Bits, Float32s, Int32s
from core.config import Config
from core.records import Batch, Group, Sample, VersionSpan
from learner.objectives import Objective, TokenBatch, load_objective
from learner.step.frozen import frozen_names
from learner.step.share import Share
from learner.step.update import Updater
from tests.support.configs import LR, update_config

STEPS = 10


def random_batches(vocab_size: int, *, segments: bool = False) -> list[Batch]:
    """Groups of mixed sizes, lengths and ages; some too large for one micro-batch of 96 tokens. With
    `segments` some samples have several, and some of these are too large by themselves.
    """
    rng, more = random.Random(0), random.Random(1)
    batches = []
    for step in range(STEPS):
        groups = []
        for number in range(5):
            drawn = []
            for _ in range(rng.choice([2, 3, 8])):
                length = rng.randint(1, 8)
                answer = [rng.randrange(vocab_size) for _ in range(length)]
                logprobs = [-rng.uniform(1, 4) for _ in range(length)]
                spans = (VersionSpan(max(0, step - rng.randint(0, 3)), 0, length),)
                drawn.append((answer, logprobs, spans, float(rng.random() < 0.5)))
            prompt = [rng.randrange(3, vocab_size) for _ in range(rng.randint(3, 12))]
            samples = tuple(
                with_segments(
                    Sample.one_turn(
                        prompt, answer, logprobs, version_spans=spans, finish_reason="stop", reward=reward
                    ),
                    max(0, more.randint(-6, 6)) if segments else 0,
                )
                for answer, logprobs, spans, reward in drawn
            )
            groups.append(
                Group(
                    group_id=100 * step + number,
                    prompt_index=number,
                    source_row=number,
                    prompt="",
                    samples=samples,
                )
            )
        batches.append(Batch(step, tuple(groups)))
    return batches


def with_segments(sample: Sample, count: int) -> Sample:
    """The sample with `count` further segments, in which the same is said again in a shorter context."""
    bits, length = sample.is_sampled.numpy(), sample.num_tokens
    first = int(bits.argmax()) - 1
    tokens, again = sample.tokens.numpy().tolist(), sample.tokens.numpy()[first:].tolist()
    spans = [(span.version, span.end - span.start) for span in sample.version_spans] * (count + 1)
    ends = list(itertools.accumulate(size for _, size in spans))
    return msgspec.structs.replace(
        sample,
        tokens=Int32s.of(tokens + again * count),
        is_sampled=Bits.of([*bits, *list(bits[first:]) * count]),
        logprobs=Float32s.joined([sample.logprobs] * (count + 1)),
        version_spans=tuple(
            VersionSpan(version, end - size, end) for (version, size), end in zip(spans, ends, strict=True)
        ),
        turns=1 + count,
        segments=tuple(length + len(again) * number for number in range(count)),
    )


def plain_updater(config: Config, objective: Objective) -> tuple[PlainPolicy, Updater]:
    policy = PlainPolicy(config, trained=True)
    frozen = {name: PlainPolicy(config, trained=False) for name in frozen_names(objective)}
    return policy, Updater(config, policy, objective, frozen, pad_id=0, device=torch.device("cpu"))


class Spy:
    """An objective that keeps the batches it sees."""

    def __init__(self, objective: Objective, *more: str) -> None:
        self._objective, self.needs, self.seen = objective, objective.needs | set(more), list[TokenBatch]()

    def loss(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen.append(batch)
        return self._objective.loss(batch)


def spied(model_dir: Path, steps: int, *, moving: bool = False) -> tuple[Spy, list[Batch], Updater]:
    config = update_config(str(model_dir), moving=moving, micro_batch_tokens=4096)
    spy = Spy(load_objective(config.objective), "prompt_variance")
    policy, updater = plain_updater(config, spy)
    batches = random_batches(policy.module.config.vocab_size)[:steps]
    for batch in batches:
        updater.update(Share.of(batch), LR)
    return spy, batches, updater
