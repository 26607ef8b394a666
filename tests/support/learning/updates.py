"""What tests of the update share: random batches, an updater without DeepSpeed, and a policy that tells
what it is asked."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from benchmarks.lag_lab import PlainPolicy
from core.config import Config
from core.records import Batch, Group, Sample, VersionSpan
from learner.objectives import Objective, TokenBatch, load_objective
from learner.step.frozen import frozen_names
from learner.step.share import Share
from learner.step.update import Updater
from tests.support.configs import LR, update_config

STEPS = 10


def random_batches(vocab_size: int) -> list[Batch]:
    """Groups of mixed sizes, lengths and ages; some too large for one micro-batch of 96 tokens."""
    rng = random.Random(0)
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
                Sample.one_turn(
                    prompt, answer, logprobs, version_spans=spans, finish_reason="stop", reward=reward
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
