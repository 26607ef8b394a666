"""What finished samples are worth: the one place where everything that gives rewards is asked and summed.

    a group without an unfinished sample --submit--> `Scorer`: reward functions in killable processes (rewards/pool.py)
                                         <--take--- its samples, each with a reward or an error

`Scorer` asks for the samples of one prompt; `Scoring` holds the groups of an actor that await their rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from actors.groups import OpenGroup
from actors.prompts import PromptRow
from actors.reward_model.asked import ModelsFor, no_models
from actors.scored import with_scores
from core.config import RewardsConfig
from core.records import Sample
from rewards.pool import RewardPool
from rewards.scoring import Scored


class Scores(Protocol):
    """Whoever says what samples are worth: a `Scorer`, also one that is not there yet."""

    def score(self, prompt: PromptRow, samples: Sequence[Sample]) -> Future[list[Scored]]:
        """Returns a future of one Scored per sample, in order; its result is never an exception."""
        ...


class Scorer:
    """Asks what samples are worth. Example: `Scorer(config.rewards).score(prompt, samples).result()`.

    The constructor raises RewardError, in one line, when a reward function cannot be loaded or a reward model
    is not hosted.
    """

    def __init__(self, config: RewardsConfig, models_for: ModelsFor = no_models) -> None:
        """`models_for` gives, for functions and their weights, who asks the reward models among them."""
        self.models_for = models_for
        self._models = models_for(config.functions)
        self._pool = RewardPool(config)

    def score(self, prompt: PromptRow, samples: Sequence[Sample]) -> Future[list[Scored]]:
        """Returns a future of one Scored per sample, in order; its result is never an exception."""
        if samples:
            texts = [sample.text for sample in samples]
            own = {"num_tokens": [sample.num_sampled for sample in samples]}
            local = self._pool.submit(prompt.text, texts, prompt.columns, own)
            return self._models.added_to(local, prompt, samples) if self._models else local
        nothing: Future[list[Scored]] = Future()
        nothing.set_result([])
        return nothing

    def close(self) -> None:
        """Ends the processes of the functions; what was not scored gets an error that says so."""
        self._pool.close()


class Scoring:
    """The groups of an actor whose samples are all generated, until their rewards are there."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._pending: list[tuple[OpenGroup, Future[list[Scored]]]] = []

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def futures(self) -> list[Future[list[Scored]]]:
        """Returns what is awaited, for a caller that waits for any of it."""
        return [future for _, future in self._pending]

    def submit(self, group: OpenGroup, by: Scores | None = None) -> None:
        """Asks for the rewards of a group that has no unfinished sample: `by` another scorer than the run's,
        where one is given.
        """
        scorer = by or self._scorer
        self._pending.append((group, scorer.score(group.prompt, group.members)))

    def take(self) -> list[tuple[OpenGroup, list[Sample]]]:
        """Returns the groups whose rewards are there, no longer pending, with their scored samples."""
        scored, waiting = [], []
        # Each asked once: a future may be done a moment after it was not.
        for group, future in self._pending:
            if future.done():
                scored.append((group, with_scores(group.members, future.result())))
            else:
                waiting.append((group, future))
        self._pending = waiting
        return scored

    def close(self) -> None:
        """Ends the processes of the functions."""
        self._scorer.close()
