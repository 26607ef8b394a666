"""How far a run is, and the learning rate of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from core.config import LearnerConfig
from core.records import GroupHead


class Progress(msgspec.Struct):
    """What the training loop counts, and a checkpoint carries on: `progress.observe(trained, metrics)` after
    each step.

    step           optimizer steps done, skipped ones included
    published      the newest version on its way to the actors; -1 before the first
    samples        samples trained so far
    tokens         sampled tokens of these
    staleness_sum  the steps' mean staleness, added up, learner steps
    staleness_max  of the oldest token of any step, learner steps; NaN where all samples were offline
    """

    step: int = 0
    published: int = -1
    samples: int = 0
    tokens: int = 0
    staleness_sum: float = 0.0
    staleness_max: float = math.nan

    def observe(self, trained: Iterable[GroupHead], batch: Mapping[str, float]) -> None:
        """Counts a step on these groups, none when it was skipped; `batch` holds the metrics of its batch."""
        self.step += 1
        for group in trained:
            self.samples += len(group.samples)
            self.tokens += sum(sample.num_sampled for sample in group.samples)
        self.staleness_sum += batch["staleness/mean"]
        self.staleness_max = float(np.fmax(self.staleness_max, batch["staleness/oldest_token"]))

    def metrics(self) -> dict[str, float]:
        """Returns the counts by their names in metrics.jsonl."""
        return {
            "progress/step": self.step,
            "progress/samples": self.samples,
            "progress/sampled_tokens": self.tokens,
            "weights/version": float(self.published),
        }

    def totals(self) -> dict[str, float]:
        """Returns the totals of the run, for its summary."""
        return {
            "steps": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "staleness_mean": self.staleness_sum / (self.step or 1),
            "staleness_max": self.staleness_max,
        }


def learning_rate(step: int, learner: LearnerConfig, num_steps: int) -> float:
    """Returns the learning rate of step number `step`, from 0: a linear warm-up, then constant or down to 10
    % at the last step.
    """
    (warmup_steps, course), peak = learner.schedule, learner.lr
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if course == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    shape = 1.0 - progress if course == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (0.1 + 0.9 * shape)
