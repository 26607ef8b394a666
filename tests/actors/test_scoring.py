"""Groups that await their rewards: nothing is lost between two looks."""

import contextlib
from concurrent.futures import Future
from typing import Any

import psutil
import pytest

from actors.groups import OpenGroup
from actors.prompts import PromptRow, row_messages
from actors.scoring import Scorer, Scoring
from core.config import RewardsConfig
from core.records import Sample, WorkItem
from core.users import pictures
from rewards.registry import WeightedReward
from rewards.scoring import Completions, Scored, call


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

    def score(self, prompt: PromptRow, samples: list[Sample], attributes: Any = ()) -> Future[Any]:
        return next(self._futures)


PROMPT = PromptRow(0, "q", (1,), {})


def sample(**more: Any) -> Sample:
    return Sample.one_turn((1,), (2, 3), version_spans=(), finish_reason="stop", **{"text": "4", **more})


def group(ordinal: int) -> OpenGroup:
    return OpenGroup(WorkItem(ordinal, 0, 0), PROMPT, [sample()])


def test_a_reward_that_arrives_while_the_actor_looks_is_not_lost() -> None:
    scoring = Scoring(Answers(ready(), LateFuture(), ready()), max_pending=3)  # type: ignore[arg-type]
    for ordinal in range(3):
        assert not scoring.is_full
        scoring.submit(group(ordinal))
    assert scoring.is_full

    def take() -> list[tuple[Any, float | None]]:
        return [(found.item.ordinal, samples[0].reward) for found, samples in scoring.take()]  # type: ignore[union-attr]

    assert take() == [(0, 1.0), (2, 1.0)]
    assert take() == [(1, 2.0)]
    assert len(scoring) == 0


class Game:
    def __init__(self, score: float) -> None:
        self.score = score


def scorer(**functions: float) -> contextlib.closing[Scorer]:
    return contextlib.closing(Scorer(RewardsConfig(functions=functions)))


def test_the_environments_own_reward_is_a_function_like_any_other() -> None:
    before = set(psutil.Process().children())
    with scorer(environment=2.0) as scoring:
        found = scoring.score(PROMPT, [sample(reward=0.5), sample(), sample(error="it hung")]).result(0)
        assert found[0] == Scored(1.0)
        assert found[1] == Scored(error="environment returned None (could not score)")
        assert found[2] == Scored(error="it hung"), "the sample's own error stays"
        assert set(psutil.Process().children()) <= before, "nothing to call, no process"
    with scorer(environment=2.0, **{"overlong?from=1&to=3": 1.0}) as scoring:
        found = scoring.score(PROMPT, [sample(reward=0.5), sample()]).result(60)
        assert found == [Scored(0.5), Scored(-0.5)], "two tokens cost a half; a reward of None is left out"


def test_an_environment_that_gave_no_reward_is_named_with_what_to_do() -> None:
    def told(name: str) -> str:
        paths = {"environment": "mine:agent", "game": "mine:Game"}
        prompt = PromptRow(0, "q", (1,), {}, environment=name)
        with contextlib.closing(Scorer(RewardsConfig(functions={"environment": 1.0}), paths=paths)) as made:
            return str(made.score(prompt, [sample()]).result(0)[0].error)

    assert told("environment") == (
        "environment mine:agent returned None (could not score): let it return a number as the reward, or name "
        "another function in rewards.functions"
    )
    assert told("game").startswith("environment game returned None")


def test_functions_see_environments_and_conversations() -> None:
    name = "tests.support.reward_functions:{}".format
    said = (("assistant", "3"), ("user", "higher"), ("assistant", "4"))
    with scorer(**{name("score_of_environment"): 1.0, name("num_messages?messages"): 10.0}) as scoring:
        attributes = [pictures.take(Game(0.25)), None]
        found = scoring.score(PROMPT, [sample(transcript=said), sample()], attributes).result(60)
        assert found[0] == Scored(30.25)
        assert "the environment's 'score' is not here" in str(found[1].error)
        assert "keep what it needs in an attribute" in str(found[1].error), "the remedy is not cut off"
        found = scoring.score(PROMPT, [sample()]).result(60)
        assert "needs 'environments', and this run has none" in str(found[0].error)


def test_a_rollouts_reward_is_part_of_the_sum_and_a_logs_reward_stands() -> None:
    logged = sample(reward=7.0)
    open_group = OpenGroup(WorkItem(0, 0, 0), PROMPT, [sample(reward=0.5), None], [logged])
    with scorer(environment=2.0) as made:
        scoring = Scoring(made, max_pending=1)
        scoring.submit(open_group)
        ((_, samples),) = scoring.take()
    assert [found.reward for found in samples] == [1.0, 7.0]


def test_an_environment_that_was_silent_at_a_deadline_is_named_where_nothing_else_scores() -> None:
    silence = "environment game: had not answered at actors.straggler_timeouts_s"

    def taken(**functions: float) -> list[tuple[float | None, str | None]]:
        open_group = OpenGroup(WorkItem(0, 0, 0), PROMPT, [None, sample(), sample(reward=0.5)])
        open_group.silences = {0: silence, 1: silence}
        with scorer(**functions) as made:
            scoring = Scoring(made, max_pending=1)
            scoring.submit(open_group)
            scoring.futures[0].result(60)
            ((_, samples),) = scoring.take()
        return [(found.reward, found.error) for found in samples]

    none = "environment returned None (could not score)"
    assert taken(environment=2.0) == [(None, f"{silence}; {none}"), (1.0, None)]
    assert taken(environment=2.0, **{"overlong?from=1&to=3": 1.0}) == [(-0.5, None), (0.5, None)]


def test_sums_beyond_floats_and_whatever_is_raised_leave_no_future_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "tests.support.reward_functions:{}".format
    with scorer(environment=1e10, **{name("far_beyond"): 1.0, name("far_beyond?messages"): 1.0}) as scoring:
        (found,) = scoring.score(PROMPT, [sample(reward=1e308)]).result(60)
        assert "is inf: 1 * 1.5e+308, 1 * 1.5e+308, 1e+10 * 1e+308" in str(found.error)

        def joined(*_: Any) -> None:
            raise ZeroDivisionError("no sum")

        monkeypatch.setattr("actors.scoring.joined", joined)
        found = scoring.score(PROMPT, [sample(reward=1.0)] * 2).result(60)
        assert found == [Scored(error="the rewards cannot be added up: ZeroDivisionError: no sum")] * 2


@pytest.mark.parametrize(
    "columns",
    [
        {"problem": "1+1?"},
        {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
        {"conversations": [{"from": "human", "value": "1+1?"}]},
        {"question": "1+1?"},
    ],
)
def test_functions_of_messages_get_the_prompt_as_its_row_says_it_in_any_form(columns):
    prompt = PromptRow(0, "<user>1+1?<assistant>", (1,), columns)
    assert row_messages(prompt) == [{"role": "user", "content": "1+1?"}]
    asked = Completions(prompt.text, ["2"], columns, {}, row_messages(prompt))
    seen: list[Any] = []

    def see(prompts, completions):
        seen.extend(prompts)
        return [1.0] * len(completions)

    assert call(WeightedReward("see", 1.0, see, messages=True), asked) == [1.0]
    assert seen == [[{"role": "user", "content": "1+1?"}]]
