"""What finished samples are worth: the one place where everything that gives rewards is asked and summed.

    a group that is generated --submit--> `Scorer`: reward functions in killable processes (rewards/pool.py)
                                                    hosted reward models (actors/reward_model/)
                                                    the environment's own reward, which the samples bring
                              <--take--- its samples, each with a reward or an error

`Scorer` asks for the samples of one prompt; `Scoring` holds the groups of an actor that await their rewards,
and says when there are too many of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from actors.groups import OpenGroup
from actors.prompts import PromptRow, row_messages
from actors.reward_model.asked import ModelsFor, gathered, no_models
from actors.scored import with_scores
from core.config import RewardsConfig
from core.config.rewards import ENVIRONMENT
from core.records import Sample
from core.text import shown_name
from rewards.pool import RewardPool
from rewards.scoring import Completions, Scored, Summand, complete, joined

REMEDY = "let it return a number as the reward, or name another function in rewards.functions"


class Scores(Protocol):
    """Whoever says what samples are worth: a `Scorer`, also one that is not there yet."""

    def score(
        self, prompt: PromptRow, samples: Sequence[Sample], attributes: Sequence[bytes | None] = ()
    ) -> Future[list[Scored]]:
        """Returns a future of one Scored per sample, in order; its result is never an exception."""
        ...

    @property
    def counters(self) -> dict[str, float]:
        """Returns the totals so far that metrics are made of."""
        ...

    def close(self) -> None:
        """Ends the processes of the functions."""


class Scorer:
    """Asks what samples are worth. Example: `Scorer(config.rewards).score(prompt, samples).result()`.

    The constructor raises RewardError, in one line, when a reward function cannot be loaded or a reward model
    is not hosted.
    """

    def __init__(
        self,
        config: RewardsConfig,
        models_for: ModelsFor = no_models,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        """`models_for` gives, for functions and their weights, who asks the reward models among them; `paths`
        are those of the environments by name.
        """
        self.models_for = models_for
        self._models = models_for(config.functions)
        self._pool = RewardPool(config)
        self._environment_weight = config.functions.get(ENVIRONMENT)
        self._paths = paths or {}

    def score(
        self, prompt: PromptRow, samples: Sequence[Sample], attributes: Sequence[bytes | None] = ()
    ) -> Future[list[Scored]]:
        """Returns a future of one Scored per sample, in order; its result is never an exception.

        A sample with an error keeps it, and no function sees it. A sample's reward is what its environment
        says of it; `attributes` are what functions may see of the environments (`core.users.pictures`).
        """
        places = [place for place, sample in enumerate(samples) if sample.error is None]
        asked = [samples[place] for place in places]
        own: dict[str, Sequence[Any]] = {"num_tokens": [sample.num_sampled for sample in asked]}
        if any(sample.transcript for sample in asked):
            own["messages"] = [sample.transcript for sample in asked]
        if attributes:
            own["environments"] = [attributes[place] for place in places]
        texts = [sample.text for sample in asked]
        local = self._pool.values(Completions(prompt.text, texts, prompt.columns, own, row_messages(prompt)))
        models = self._models.ask(prompt, asked) if asked else []
        from_models = gathered([model.values for model in models])
        scored: Future[list[Scored]] = Future()
        scored.set_running_or_notify_cancel()  # Nobody can cancel it from here on.

        def sums() -> list[Scored]:
            functions = local.result()
            parts = list(functions.parts)
            if self._environment_weight is not None:
                rewards = [sample.reward for sample in asked]
                parts.append(self._of_environment(prompt.environment, self._environment_weight, rewards))
            for model, values in zip(models, from_models.result(), strict=True):
                parts.append(Summand(model.name, model.weight, values))
            found = iter(joined(parts, len(asked), functions.votes))
            return [next(found) if sample.error is None else Scored(error=sample.error) for sample in samples]

        def add_up(_: object) -> None:
            complete(scored, len(samples), sums)

        # One after the other: both are there when the last callback runs.
        local.add_done_callback(lambda _: from_models.add_done_callback(add_up))
        return scored

    def _of_environment(
        self, environment: str | None, weight: float, rewards: Sequence[float | None]
    ) -> Summand:
        if environment is None:
            return Summand(ENVIRONMENT, weight, rewards)
        shown = shown_name(environment, self._paths.get(environment, environment))
        return Summand(f"environment {shown}", weight, rewards, REMEDY)

    @property
    def counters(self) -> dict[str, float]:
        """Returns the totals so far that metrics are made of (`reward/*` in core/metrics.py)."""
        pool, models = self._pool, self._models
        return {
            "reward_groups": float(pool.num_groups),
            "reward_queue_s": pool.queue_s,
            "reward_timeouts": float(pool.num_timeouts + models.num_timeouts),
            "reward_crashes": float(pool.num_crashes + models.num_failures),
            "reward_busy_s": pool.busy_s,
            "reward_worker_s": pool.worker_s,
        }

    def close(self) -> None:
        """Ends the processes of the functions; what was not scored gets an error that says so."""
        self._pool.close()


class Scoring:
    """The groups of an actor whose samples are all generated, until their rewards are there.

    `max_pending` is how many may wait before the actor should start no others (`rewards.max_pending`).
    """

    def __init__(self, scorer: Scores, max_pending: int) -> None:
        self._scorer, self._max_pending = scorer, max_pending
        self._pending: list[tuple[OpenGroup, Future[list[Scored]]]] = []

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def is_full(self) -> bool:
        """Returns whether rewards come too slowly for more groups to be started."""
        return len(self._pending) >= self._max_pending

    @property
    def futures(self) -> list[Future[list[Scored]]]:
        """Returns what is awaited, for a caller that waits for any of it."""
        return [future for _, future in self._pending]

    @property
    def counters(self) -> dict[str, float]:
        """Returns the scorer's totals so far."""
        return self._scorer.counters

    def submit(self, group: OpenGroup, by: Scores | None = None) -> None:
        """Asks for the rewards of a group that has no unfinished sample: `by` another scorer than the run's,
        where one is given.
        """
        generated = [sample for sample in group.samples if sample is not None]
        # What a log says of its samples is no environment's reward; it stands, and only votes are asked for.
        logged = [msgspec.structs.replace(sample, reward=None) for sample in group.offline]
        scorer = by or self._scorer
        attributes = group.member_attributes if group.attributes else ()
        self._pending.append((group, scorer.score(group.prompt, [*generated, *logged], attributes)))

    def take(self) -> list[tuple[OpenGroup, list[Sample]]]:
        """Returns the groups whose rewards are there, no longer pending, with their scored samples."""
        scored, waiting = [], []
        # Each asked once: a future may be done a moment after it was not.
        for group, future in self._pending:
            if future.done():
                scored.append((group, _scored_members(group, future.result())))
            else:
                waiting.append((group, future))
        self._pending = waiting
        return scored

    def close(self) -> None:
        """Ends the processes of the functions."""
        self._scorer.close()


def _scored_members(group: OpenGroup, scores: Sequence[Scored]) -> list[Sample]:
    """Returns the group's members with what they are worth; an environment's reward is part of the sum. The
    error of one that nothing could score names the environment that had not answered.
    """
    numbers = [number for number, sample in enumerate(group.samples) if sample is not None]
    generated = [
        sample if sample.reward is None else msgspec.structs.replace(sample, reward=None)
        for sample in group.members[: len(numbers)]
    ]
    members = with_scores([*generated, *group.offline], scores)
    for place, number in enumerate(numbers):
        error, silence = members[place].error, group.silences.get(number)
        if error is not None and silence is not None:
            members[place] = msgspec.structs.replace(members[place], error=f"{silence}; {error}")
    return members
