"""Rows as prompts: in which environment, with which tools, with or without a prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.prompts import PromptSet, load_prompts
from core.config import DataConfig
from core.config.environments import ONLY
from core.errors import DataError
from tests.support.tokenizers_made import byte_tokenizer

SHOWS_TOOLS = (
    "{% if tools %}tools: {{ tools | map(attribute='function') | map(attribute='name') | join(',') }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def load(tmp_path):
    def load(*rows: dict[str, Any], environments: Any = None, **settings: Any) -> PromptSet:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(
            DataConfig(path=str(tmp_path / "train.jsonl"), **settings),
            byte_tokenizer("<eos>", template=SHOWS_TOOLS),
            environments=environments or {},
        )

    return load


def test_the_first_thing_shown_may_be_that_of_reset_where_there_is_an_environment(load):
    (row,) = load({"word": "apple"}, environments={"guess": ()})
    assert (row.text, row.token_ids, row.messages, row.environment) == ("", (), None, "guess")
    (row,) = load({"word": "apple"}, environments={"guess": ()}, system_prompt="Guess.")
    assert row.messages == ({"role": "system", "content": "Guess."},)
    with pytest.raises(DataError, match="no column 'prompt' or 'question'; it has 'word'"):
        load({"word": "apple"})


def test_messages_come_clean_and_with_the_system_prompt_where_an_environment_goes_on_from_them(load):
    told = [{"role": "user", "content": [{"type": "text", "text": "1+1?"}], "name": None}]
    rows = load({"prompt": told}, {"prompt": "2+2?"}, environments={"a": ()}, system_prompt="Add.").rows
    system = {"role": "system", "content": "Add."}
    assert [row.messages for row in rows] == [
        (system, {"role": "user", "content": "1+1?"}),
        (system, {"role": "user", "content": "2+2?"}),
    ]
    assert load({"prompt": "2+2?"})[0].messages is None


def test_the_tools_of_its_environment_count_as_tokens_of_a_prompt(load):
    rows = [{"prompt": "1+1?", "environment": name} for name in ("calculator", "game")]
    environments = {"calculator": (ADD,), "game": ()}
    first, second = load(*rows, environments=environments).rows
    assert (first.text, second.text) == ("tools: add\nuser: 1+1?\nassistant:", "user: 1+1?\nassistant:")
    assert (first.environment, second.environment) == ("calculator", "game")
    with pytest.raises(DataError, match="line 1: the prompt is 32 tokens long"):
        load(*rows, environments=environments, max_prompt_tokens=31)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({}, "no column 'environment', which says which of the environments it is for: 'game', 'maths'"),
        (
            {"environment": "gamee"},
            "'environment' is 'gamee', which is none of the environments: 'game', 'maths'",
        ),
        ({"environment": None}, "'environment' is null, which is none of the environments: 'game', 'maths'"),
        ({"environment": ["game"]}, "'environment' is a list, which is none of the environments"),
    ],
)
def test_a_row_for_no_environment_that_there_is_is_bad(load, column, reason):
    rows = [{"prompt": "1", "environment": "game"}, {"prompt": "1", **column}]
    environments = {"game": (), "maths": ()}
    with pytest.raises(DataError, match=f"line 2: {reason}"):
        load(*rows, environments=environments)
    prompts = load(*rows, environments=environments, on_bad_row="skip")
    assert (len(prompts), prompts.num_bad_rows, prompts[0].environment) == (1, 1, "game")


def test_one_environment_needs_no_column_and_takes_no_other_name(load):
    assert load({"prompt": "1"}, environments={"game": ()})[0].environment == "game"
    with pytest.raises(
        DataError, match="'environment' is 'maths', which is none of the environments: 'game'"
    ):
        load({"prompt": "1", "environment": "maths"}, environments={"game": ()})
    (row,) = load({"prompt": "1", "environment": "a kitchen"}, environments={ONLY: ()})
    assert (row.environment, row.columns["environment"]) == (ONLY, "a kitchen")
