"""Groups that await their rewards: nothing is lost between two looks."""

from concurrent.futures import Future
from typing import Any

from actors.groups import OpenGroup
from actors.prompts import PromptRow
from actors.scoring import Scoring
from core.records import Sample, WorkItem
from rewards.scoring import Scored


class LateFuture(Future[Any]):
    """Done a moment after it was first asked, as a reward worker's answer may arrive between two looks."""

    asked = 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def result(self, timeout: float | None = None) -> Any:
        return [Scored(2.0)]


def ready() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result([Scored(1.0)])
    return future


class Answers:
    """Stands in for a Scorer: gives one future after the other."""

    def __init__(self, *futures: Future[Any]) -> None:
        self._futures = iter(futures)

    def score(self, prompt: PromptRow, samples: list[Sample]) -> Future[Any]:
        return next(self._futures)


def group(ordinal: int) -> OpenGroup:
    sample = Sample.one_turn((1,), (2,), version_spans=(), finish_reason="stop", text="4")
    return OpenGroup(WorkItem(ordinal, 0, 0), PromptRow(0, "q", (1,), {}), [sample])


def test_a_reward_that_arrives_while_the_actor_looks_is_not_lost() -> None:
    scoring = Scoring(Answers(ready(), LateFuture(), ready()))  # type: ignore[arg-type]
    for ordinal in range(3):
        scoring.submit(group(ordinal))

    def take() -> list[tuple[Any, float | None]]:
        return [(found.item.ordinal, samples[0].reward) for found, samples in scoring.take()]  # type: ignore[union-attr]

    assert take() == [(0, 1.0), (2, 1.0)]
    assert take() == [(1, 2.0)]
    assert len(scoring) == 0
