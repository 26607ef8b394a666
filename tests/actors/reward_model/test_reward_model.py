"""A reward model gives every conversation what the classifier gives it alone, by its own template, or says
why not.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from actors.reward_model import RewardModel, check_classifier
from core.errors import RewardError
from rewards.hosted import HostedModel, hosted_models, path_of
from tests.support.classifiers import make_classifier


def said(answer: str, asked: str = "2+2=") -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [said("4"), said("five, or so"), said("4", "what is 1 + 3, please?"), said("22")]


def alone(path: Path, conversation: list[dict[str, str]], label: int = 0) -> float:
    """What Hugging Face's own classifier says of one conversation."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, label])


def hosted(path: Path, **settings: Any) -> RewardModel:
    return RewardModel(f"reward_model:{path}", HostedModel(**settings), str(path))


def scores(model: RewardModel, *asked: list[list[dict[str, str]]]) -> list[Any]:
    """What callers get who ask at once."""

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(model.score(conversations) for conversations in asked))

    return asyncio.run(ask_all())


@pytest.mark.parametrize("pad", [True, False], ids=["with a pad token", "without"])
def test_conversations_of_several_callers_are_scored_together_as_they_would_be_alone(
    tmp_path: Path, pad: bool
) -> None:
    path = make_classifier(tmp_path, pad=pad)
    model = hosted(path)
    found = scores(model, CONVERSATIONS[:2], CONVERSATIONS[2:])
    expected = [alone(path, conversation) for conversation in CONVERSATIONS]
    assert [value for values in found for value in values] == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == len(expected)
    counts = asyncio.run(model.counts())
    assert counts["scored"] == 4
    # "4" and "22" are of one length no two of these conversations have.
    assert counts["passes"] <= 2 if pad else counts["passes"] == 4


def test_a_batch_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    model = hosted(make_classifier(tmp_path), batch=3)
    scores(model, [said(str(number)) for number in range(7)])
    assert asyncio.run(model.counts())["passes"] == 3


def test_a_label_is_chosen_by_its_name_and_must_be_where_there_are_several(tmp_path: Path) -> None:
    path = make_classifier(tmp_path, ("bad", "good"))
    assert scores(hosted(path, label="good"), [CONVERSATIONS[0]])[0] == pytest.approx(
        [alone(path, CONVERSATIONS[0], label=1)], abs=1e-5
    )
    for label, words in (
        ("", "2 labels; say which is the reward with label=NAME"),
        ("fine", "no label 'fine'"),
    ):
        with pytest.raises(RewardError, match=words) as caught:
            hosted(path, label=label)
        assert "bad, good" in str(caught.value)


def test_a_conversation_that_is_too_long_is_said_to_be_and_never_truncated(tmp_path: Path) -> None:
    model = hosted(make_classifier(tmp_path, max_tokens=64))
    (values,) = scores(model, [said("4"), said("4" * 200)])
    assert isinstance(values[0], float)
    assert "tokens long, and the model takes 64" in values[1]
    shorter = hosted(tmp_path, max_tokens=5)
    assert "takes 5" in scores(shorter, [said("4")])[0][0]


def test_a_template_that_refuses_a_conversation_is_told(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    model = hosted(make_classifier(tmp_path, template=template))
    (values,) = scores(model, [[{"role": "system", "content": "s"}, *said("4")], said("4")])
    assert "cannot be rendered" in values[0]
    assert "no system" in values[0]
    assert isinstance(values[1], float)


def test_without_a_template_it_takes_prompt_and_completion_as_a_pair_where_told_to(tmp_path: Path) -> None:
    path = make_classifier(tmp_path, template=None)
    with pytest.raises(RewardError, match=r"no chat template.*chat_template=false"):
        hosted(path)
    assert isinstance(scores(hosted(path, chat_template=False), [said("4")])[0][0], float)


def test_what_is_no_classifier_is_refused_before_anything_loads(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(RewardError, match="is LlamaForCausalLM, expected a sequence classifier"):
        check_classifier("reward_model:x", HostedModel(), str(tiny_models["tied"]))
    with pytest.raises(RewardError, match="no directory"):
        check_classifier("reward_model:x", HostedModel(), str(tmp_path / "nowhere"))
    with pytest.raises(RewardError, match="no model and tokenizer"):
        check_classifier("reward_model:x", HostedModel(), str(tmp_path))


def test_names_are_read_with_their_parameters(tmp_path: Path) -> None:
    name = f"reward_model:{tmp_path}?num_gpus=1&batch=8&label=good"
    found = hosted_models({"exact_match": 1.0, name: 0.5})
    assert found == {name: HostedModel(num_gpus=1, batch=8, label="good")}
    assert path_of(name) == str(tmp_path)
    assert path_of("reward_model:org/model?batch=1") == "org/model"
    for wrong, words in (
        ("reward_model:", "names no model"),
        ("reward_model", "names no model"),
        ("reward_model:x?gpus=1", "its parameters are num_cpus, num_gpus"),
        ("reward_model:x?batch=0", "batch=0, expected at least 1"),
        ("reward_model:x?num_gpus=2", "num_gpus=2, expected at most 1"),
        ("reward_model:x?num_cpus=0.00001", "num_cpus=1e-05, expected 0 or at least 0.0001"),
    ):
        with pytest.raises(RewardError, match=words):
            hosted_models([wrong])
