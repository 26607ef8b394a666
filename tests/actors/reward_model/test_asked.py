"""What reward models say joins what functions say; late, dead and silent ones cost their samples, and are
counted.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.prompts import PromptRow
from actors.reward_model import RewardModelClient
from actors.reward_model.asked import ModelRewards, gathered, hosted_here, whole_conversation
from actors.scoring import Scorer
from core.calls import Calls, Local
from core.config import RewardsConfig
from core.errors import RewardError, TrainingError
from core.records import Sample
from rewards.hosted import hosted_models
from rewards.scoring import Scored
from tests.support.classifiers import make_classifier

NAME = "reward_model:org/model?timeout_s=2"
PROMPT = PromptRow(0, "rendered", (1,), {"question": "2+2="})


def sample(text: str, transcript: tuple[tuple[str, str], ...] = ()) -> Sample:
    return Sample.one_turn(
        (1,), (2,), version_spans=(), finish_reason="stop", text=text, transcript=transcript
    )


class Model:
    """Stands in for a RewardModel: the value of a conversation is the number that it ends with."""

    def __init__(self, behaviour: str = "") -> None:
        self.behaviour, self.asked = behaviour, []

    async def score(self, conversations: list[Any]) -> list[float | str]:
        self.asked.append(conversations)
        if self.behaviour == "late":
            await asyncio.sleep(60)
        if self.behaviour == "dead":
            raise TrainingError("the reward model died: SIGKILL")
        texts = [conversation[-1]["content"] for conversation in conversations]
        return [float(text) if text.isdigit() else "no number" for text in texts]


def rewards_of(model: Model, weight: float = 2.0) -> ModelRewards:
    client = RewardModelClient(Local(model), "the reward model")
    return ModelRewards({"exact_match": 1.0, NAME: weight}, {NAME: client}, Calls(60.0))


def added(model: Model, rewards: list[float], *texts: str) -> tuple[list[Scored], ModelRewards]:
    """Scores by the environment's own rewards and the model."""
    asked = rewards_of(model)
    samples = [
        msgspec.structs.replace(sample(text), reward=own) for text, own in zip(texts, rewards, strict=True)
    ]
    scorer = Scorer(RewardsConfig(functions={"environment": 1.0, NAME: 2.0}), lambda _: asked)
    return scorer.score(PROMPT, samples).result(60), asked


def test_a_models_value_times_its_weight_joins_the_sum_and_errors_of_either_are_the_samples() -> None:
    found, _ = added(Model(), [1.0, 1.0, math.nan], "3", "x", "4")
    assert found[0] == Scored(7.0)
    assert found[1].reward is None
    assert "no number" in str(found[1].error)
    assert found[2].error == f"the weighted sum of environment, {NAME} is nan: 1 * nan, 2 * 4"


@pytest.mark.parametrize(("behaviour", "words"), [("late", "within 2 s"), ("dead", "SIGKILL")])
def test_a_model_that_does_not_answer_costs_the_samples_and_is_counted(behaviour: str, words: str) -> None:
    found, rewards = added(Model(behaviour), [1.0] * 2, "1", "2")
    assert all(scored.reward is None and words in str(scored.error) for scored in found)
    assert (rewards.num_timeouts, rewards.num_failures) == (
        2 * (behaviour == "late"),
        2 * (behaviour == "dead"),
    )


def test_a_model_gets_the_conversation() -> None:
    model = Model()
    added(model, [0.0], "4")
    assert model.asked == [[[{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]]]
    turns = (("assistant", "call"), ("tool", "7"), ("assistant", "It is 7."))
    messages = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "q"})
    prompt = PromptRow(0, "rendered", (1,), {}, messages=messages)
    conversation = whole_conversation(prompt, sample("It is 7.", turns))
    assert [message["role"] for message in conversation] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    written = PromptRow(0, "rendered", (1,), {"prompt": [{"role": "user", "content": "written"}]})
    assert whole_conversation(written, sample("a"))[0] == {"role": "user", "content": "written"}
    assert whole_conversation(PromptRow(0, "rendered", (1,), {}), sample("a"))[0]["content"] == "rendered"
    asked = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "gold"}]
    row = PromptRow(0, "rendered", (1,), {"conversations": asked})
    conversation = whole_conversation(row, sample("a"), "be kind")
    assert [message["content"] for message in conversation] == ["be kind", "q", "a"]


def test_a_model_that_nobody_hosts_is_refused() -> None:
    with pytest.raises(RewardError, match="not hosted"):
        ModelRewards({NAME: 1.0}, {}, Calls(60.0))
    assert not ModelRewards({"exact_match": 1.0}, {}, Calls(60.0))


def test_gathered_is_done_with_the_last() -> None:
    first, second = Future[int](), Future[int]()
    both = gathered([first, second])
    second.set_result(2)
    assert not both.done()
    first.set_result(1)
    assert both.result(60) == [1, 2]
    assert gathered([]).result(60) == []
    third: Future[int] = Future()
    failed = gathered([first, third])
    third.set_exception(ZeroDivisionError("by a client"))
    assert isinstance(failed.exception(1), ZeroDivisionError), "told, and not open for ever"


def test_without_a_run_a_model_is_loaded_where_it_is_asked(tmp_path: Path) -> None:
    name = f"reward_model:{make_classifier(tmp_path)}"
    models_for = hosted_here(hosted_models([name]), 60.0)
    (asked,) = models_for({name: 0.5}).ask(PROMPT, [sample("4"), sample("5")])
    values = asked.values.result(60)
    assert all(isinstance(value, float) for value in values)
    assert not hosted_here({}, 60.0)({"exact_match": 1.0})
