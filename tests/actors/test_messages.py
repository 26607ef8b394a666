"""Messages in the shapes that tables give them, by templates of every kind: rendered right, or one
reason why not.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.messages import message_problems
from actors.prompts import PromptRow, load_prompts
from actors.sources import Source
from core.config import DataConfig
from core.errors import DataError
from tests.support.tokenizers_made import byte_tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# As Llama 3.1 asks: whether the key is there, not what it holds.
ASKS_FOR_KEYS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls|length != 1 %}{{ "
    "raise_exception('one call only') }}{% endif %}"
    "{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})"
    "{% else %}{{ m.role }}{% if 'name' in m %} {{ m.name }}{% endif %}: {{ m.content | trim }}{% endif "
    "%};{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}<{{ m.role }}>{{ p.text }}{% "
    "endif %}{% endfor %}{% endfor %}"
)
INDEXES_PARTS = "{% for m in messages %}{{ m.content[0]['text'] }}|{% endfor %}"


def user(content: Any, role: str = "user", **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


@pytest.fixture
def render(tmp_path):
    def load(template: str, prompt: Any, **settings: Any) -> PromptRow:
        (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        (row,) = load_prompts(
            DataConfig(path=str(tmp_path), **settings), byte_tokenizer("<eos>", template=template)
        ).rows
        return row

    return load


def test_keys_that_a_table_filled_with_null_are_no_keys(tmp_path):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    conversation = [
        user("1+1?"),
        user(None, "assistant", tool_calls=[call]),
        user("2", "tool", name="add"),
        user("so?"),
    ]
    other = [
        user(None, "assistant", tool_calls=[{"function": {"name": "f", "arguments": {"b": 2}}}]),
        user("x", tool_calls=[]),
    ]
    pq.write_table(
        pa.Table.from_pylist([{"prompt": conversation, "answer": "2"}, {"prompt": other, "answer": "2"}]),
        tmp_path / "train.parquet",
    )
    filled = pq.read_table(tmp_path / "train.parquet").to_pylist()[0]["prompt"]
    assert filled[0]["tool_calls"] is None
    assert filled[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    rows = load_prompts(DataConfig(path=str(tmp_path)), byte_tokenizer("<eos>", template=ASKS_FOR_KEYS)).rows
    assert rows[0].text == 'user: 1+1?;add({"a": 1});tool add: 2;user: so?;'
    assert rows[1].text == 'f({"b": 2});user: x;'
    assert rows[0].columns["prompt"] == filled


def test_content_in_text_parts_is_text(render):
    parts = [{"type": "text", "text": "1+1", "image": None}, {"type": "text", "text": "= ?"}]
    assert render(PLAIN, [user(parts)]).text == "user: 1+1\n= ?\nassistant:"
    assert render(PLAIN, [user([{"text": "1+1"}]), user(["ok"], "tool")]).text.startswith(
        "user: 1+1\ntool: ok\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"), [(PARTS, "<system>brief<user>1+1"), (INDEXES_PARTS, "brief|1+1|")]
)
def test_a_template_that_takes_parts_only_gets_parts(render, template, expected):
    assert render(template, [user("1+1")], system_prompt="brief").text == expected


def test_an_array_of_messages_is_a_list_of_messages(monkeypatch):
    source = Source("rows", "row", {0: {"prompt": np.array([user("hi")], dtype=object)}})
    monkeypatch.setattr("actors.prompts.read_source", lambda *args, **kwargs: source)
    (row,) = load_prompts(DataConfig(path="rows"), byte_tokenizer("<eos>", template=PLAIN)).rows
    assert row.text == "user: hi\nassistant:"


REFUSED = [
    (
        PLAIN,
        [user([{"type": "image_url", "image_url": "x"}])],
        "part 1 of the content of message 1 of 'prompt' is of type 'image_url'",
    ),
    (
        PLAIN,
        [user([{"type": "text"}])],
        "the content of message 1 of 'prompt' is a list, expected text or a list of {'type': 'text'",
    ),
    (PLAIN, [user([])], "the content of message 1 of 'prompt' is a list, expected text"),
    (PLAIN, [user({"text": "hi"})], "the content of message 1 of 'prompt' is an object, expected text"),
    (PLAIN, [user([{"type": "text", "text": " "}])], "the content of message 1 of 'prompt' is empty"),
    (PLAIN, [user(None)], "the content of message 1 of 'prompt' is null, expected text"),
    (
        PLAIN,
        [{"speaker": "human", "value": "hi"}],
        "is not {'role': ..., 'content': ...}; it has 'speaker', 'value'",
    ),
    (PLAIN, [user("hi", role=None)], "message 1 of 'prompt' is not {'role'"),
    (
        "{% if %}",
        [user("hi")],
        "the chat template refuses the messages: TemplateSyntaxError: Expected an expression",
    ),
    (
        "{{ messages[0].content + 1 }}",
        [user("hi")],
        "the chat template refuses the messages: TypeError: can only concatenate",
    ),
    ("{{ messages[7].content.x }}", [user("hi")], "the chat template refuses the messages: UndefinedError"),
    ("{{ 1 / 0 }}", [user("hi")], "the chat template refuses the messages: ZeroDivisionError"),
    (
        "{% for i in range(10 ** 9) %}{% endfor %}",
        [user("hi")],
        "the chat template refuses the messages: OverflowError",
    ),
    ("{{ raise_exception('only\n one') }}", [user("hi")], "the chat template refuses the messages: only one"),
    ("fixed", [user("hi")], "the chat template leaves out what message 1 of 1 (user) says"),
    (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        [user("be brief", "system"), user("hi")],
        "message 1 of 2 (system)",
    ),
]


@pytest.mark.parametrize(("template", "prompt", "reason"), REFUSED)
def test_what_no_template_can_say_is_a_bad_row_with_its_reason(render, template, prompt, reason):
    with pytest.raises(DataError) as caught:
        render(template, prompt)
    assert f"line 1: {reason}" in str(caught.value) or reason in str(caught.value).splitlines()[1]
    assert len(str(caught.value).splitlines()) == 3


def test_a_system_prompt_that_the_template_drops_is_said(render):
    with pytest.raises(DataError, match=r"leaves out what message 1 of 2 \(system\) says"):
        render(
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "hi",
            system_prompt="Be brief.",
        )


def test_named_templates_need_a_default(render):
    named = {"tool_use": PLAIN, "rag": PLAIN}
    with pytest.raises(
        DataError,
        match=r"templates called 'tool_use', 'rag', but none called "
        r"'default'.*chat_template\.jinja",
    ):
        render(named, "hi")
    assert render({**named, "default": PLAIN}, "hi").text == "user: hi\nassistant:"


def test_all_that_is_wrong_with_a_part_that_is_no_text_is_told() -> None:
    assert len(list(message_problems("prompt", [user([{"type": "image"}])], None))) == 1
