"""Rows as prompts: the forms that datasets have, and what environments make of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.dataset.template_options import option_notes
from actors.prompts import PromptSet, load_prompts
from core.config import DataConfig
from core.errors import DataError
from core.text import ONLY
from tests.support.tokenizers_made import byte_tokenizer

SHOWS_TOOLS = (
    "{% if tools %}tools: {{ tools | map(attribute='function') | map(attribute='name') | join(',') }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def user(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


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


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


FORMS = [
    ({"problem": "1+1?", "answer": "2"}, "user: 1+1?\n", "2", ["the prompts are in 'problem' (1 rows)"]),
    (
        {"messages": [user("1+1?"), user("2", "assistant"), user("so?")], "answer": "2"},
        "user: 1+1?\nassistant: 2\nuser: so?\n",
        "2",
        ["the prompts are in 'messages' (1 rows)"],
    ),
    (
        {"messages": [user("1+1?"), user("2", "assistant")]},
        "user: 1+1?\n",
        "2",
        [
            "the prompts are in 'messages' (1 rows)",
            "the last message of 'messages', the assistant's, is no part of the prompt: it is the answer (1 rows)",
        ],
    ),
    (
        {"messages": [user("1+1?"), user("It is 2", "assistant")], "solution": "2"},
        "user: 1+1?\n",
        "2",
        [
            "the prompts are in 'messages' (1 rows)",
            "the last message of 'messages', the assistant's, is no part of the prompt: the answer is in 'solution' "
            "(1 rows)",
        ],
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "Add."},
                human("1+1?"),
                {"from": "gpt", "value": "2"},
            ]
        },
        "system: Add.\nuser: 1+1?\n",
        "2",
        [
            "the prompts are in 'conversations' (1 rows)",
            "'conversations' is a conversation in the keys 'from' and 'value' (1 rows)",
            "the last message of 'conversations', the assistant's, is no part of the prompt: it is the answer (1 rows)",
        ],
    ),
    (
        {"prompt": [{"type": "text", "text": "1+1"}, {"type": "text", "text": "=?"}], "answer": "2"},
        "user: 1+1\n=?\n",
        "2",
        ["'prompt' is the content of one message of the user, in parts (1 rows)"],
    ),
    (
        {
            "data_source": "sums",
            "prompt": [user("1+1?")],
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": 0},
        },
        "user: 1+1?\n",
        "2",
        ["the answers are those in reward_model.ground_truth"],
    ),
]


@pytest.mark.parametrize(("row", "text", "answer", "notes"), FORMS, ids=[str([*row]) for row, *_ in FORMS])
def test_a_form_that_datasets_have_is_read_and_it_is_said_how(load, row, text, answer, notes):
    prompts = load(row)
    assert (prompts[0].text, prompts[0].columns) == (f"{text}assistant:", {**row, "answer": answer})
    assert [note.partition("train.jsonl: ")[2] for note in prompts.notes] == notes


BAD = [
    (
        {"instruction": "1+1?"},
        {},
        "it has 'instruction'. 'problem', 'messages', 'conversations' are read too; name",
    ),
    (
        {"prompt": [human("hi"), {"from": "gpt", "value": "2"}]},
        {},
        "the last message of 'prompt' is the assistant's",
    ),
    ({"messages": [user("2", "assistant")]}, {}, "'messages' is an empty list of messages"),
    (
        {"messages": [user("a"), user(" ", "assistant")]},
        {},
        "its content is empty: it is no answer. Take it off",
    ),
    ({"messages": [user("a"), user(None, "assistant")]}, {}, "its content is null: it is no answer"),
    (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        {},
        "is from 'narrator', expected one of human, user, gpt",
    ),
    (
        {"conversations": [{"from": "human", "value": None}]},
        {},
        "content of message 1 of 'conversations' is null",
    ),
    (
        {"prompt": [{"type": "image", "image": "x"}]},
        {},
        "part 1 of the content of message 1 of 'prompt' is of type 'image'",
    ),
    ({"conversations": json.dumps([human("hi")])}, {}, "'conversations' is messages written out as text"),
    ({"prompt": "x"}, {"answer": "extra.gold"}, "answer = extra.gold: the row has no 'extra', but 'prompt'"),
    ({"prompt": "x", "e": {"a": 1}}, {"answer": "e.gold"}, "answer = e.gold: 'e' has no 'gold', but 'a'"),
    (
        {"prompt": "x", "e": "gold"},
        {"answer": "e.gold"},
        "answer = e.gold: 'e' is text ('gold'), which has no 'gold'",
    ),
    (
        {"prompt": "x", "e": ["a"]},
        {"answer": "e.1"},
        "answer = e.1: 'e' is a list of 1, which has no '1'; expected a number",
    ),
    ({"prompt": "x", "e": None}, {"answer": "e.1"}, "answer = e.1: 'e' is null, which has no '1'"),
    ({"prompt": "x", "e": {"gold": None}}, {"answer": "e.gold"}, "'answer' is null"),
]


@pytest.mark.parametrize(("row", "columns", "reason"), BAD, ids=[reason for *_, reason in BAD])
def test_what_cannot_be_read_is_named_with_what_is_there(load, row, columns, reason):
    good = {"prompt": "x", "e": {"gold": "1"}} if "e" in row else {"prompt": "x", "extra": {"gold": "1"}}
    with pytest.raises(DataError) as caught:
        load(good, {**row}, columns=columns)
    assert "line 2: " in str(caught.value)
    assert reason in str(caught.value)


def test_columns_are_found_by_paths_and_reach_the_rewards_under_their_names(load):
    row = {
        "extra": {"question": "1+1?", "levels": [1, {"name": "easy"}]},
        "reward_model": {"ground_truth": "2"},
        "flat.key": "yes",
        "answer": "no",
    }
    columns = {
        "prompt": "extra.question",
        "answer": "reward_model.ground_truth",
        "level": "extra.levels.-1.name",
        "flat": "flat.key",
    }
    (found,) = load(row, columns=columns)
    assert found.text == "user: 1+1?\nassistant:"
    assert found.columns == {**row, "prompt": "1+1?", "answer": "2", "level": "easy", "flat": "yes"}


THINKS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_options_reach_the_template_and_those_it_does_not_know_are_told(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "hi"}) + "\n")
    tokenizer = byte_tokenizer("<eos>", template=THINKS)
    for options, text in (({}, "hi"), ({"enable_thinking": False}, "hi<think></think>")):
        data = DataConfig(path=str(tmp_path), template_options=options)
        assert load_prompts(data, tokenizer)[0].text == text
    assert [*option_notes(tokenizer, {"enable_thinking": False})] == []
    (near,) = option_notes(tokenizer, {"enable_thinkin": False})
    assert near.endswith("knows no 'enable_thinkin' and ignores it; did you mean 'enable_thinking'?")
    (far,) = option_notes(tokenizer, {"date_string": "x"})
    assert far.endswith("knows no 'date_string' and ignores it; it asks for enable_thinking")
