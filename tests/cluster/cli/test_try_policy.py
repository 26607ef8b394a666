"""A policy asked by itself: the prompt is made, the answer ended and read as in a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.cli.try_policy import chat
from core.config import ModelConfig
from core.errors import ConfigError, DataError
from core.tokenizer import end_token_ids
from recipes.arithmetic import make_tokenizer


@pytest.fixture
def policy(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_models["tied"], tmp_path / "policy")
    return tmp_path / "policy"


def end_at(policy: Path, *token_ids: int) -> None:
    found = json.loads((policy / "generation_config.json").read_text())
    (policy / "generation_config.json").write_text(json.dumps({**found, "eos_token_id": list(token_ids)}))


def test_an_answer_ends_at_any_end_token_and_shows_none(policy):
    whole = chat(str(policy), "3+4=", max_new_tokens=12)
    ids = make_tokenizer()(whole)["input_ids"]
    assert len(ids) > 3
    end_at(policy, 1, ids[2])
    place = ids.index(ids[2])
    assert end_token_ids(ModelConfig(path=str(policy)), make_tokenizer()) == tuple(sorted({1, ids[2]}))
    assert chat(str(policy), "3+4=", max_new_tokens=12) == "".join(
        make_tokenizer().convert_ids_to_tokens(ids[:place])
    )


def test_what_cannot_be_asked_is_one_line(policy, tmp_path):
    with pytest.raises(DataError, match="prompt 1: the tokenizer knows no part of 'hello'"):
        chat(str(policy), "hello")
    with pytest.raises(DataError, match="prompt 1: 'prompt' is empty"):
        chat(str(policy), " ")
    with pytest.raises(
        ConfigError,
        match=r"the prompt is 600 tokens long: .* has no position left for an "
        r"answer",
    ):
        chat(str(policy), "1+" * 300)
    (policy / "chat_template.jinja").write_text("{{ messages[1].content }}")
    with pytest.raises(DataError, match="prompt 1: the chat template refuses the messages: UndefinedError"):
        chat(str(policy), "1+1=")
    (policy / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError,
        match=r"has no tokenizer\.json, but .*Copy the tokenizer's files of the "
        r"base model there",
    ):
        chat(str(policy), "1+1=")
    with pytest.raises(ConfigError, match="is no Hugging Face model directory"):
        chat(str(tmp_path), "1+1=")
