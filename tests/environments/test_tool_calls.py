"""Tool calls in the forms that policies write, right and wrong."""

from __future__ import annotations

import pytest

from environments.tool_calls import read_calls

READ = [
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", {"a": 1})]),
    (
        "hermes",
        'I add.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "sub", "arguments": "{\\"b\\": 2}"}</tool_call>',
        "I add.",
        [("add", {"a": 1}), ("sub", {"b": 2})],
    ),
    ("hermes", '<tool_call>{"name": "now"}', "", [("now", {})]),
    ("hermes", "no call {}", "no call {}", []),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (
        "llama",
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}',
        "",
        [("add", {"a": 1}), ("now", {})],
    ),
    ("llama", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama", 'So: {"name": "add", "parameters": {}}', 'So: {"name": "add", "parameters": {}}', []),
    (
        "mistral",
        'ok[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "x"}, {"name": "now", "arguments": {}}]',
        "ok",
        [("add", {"a": 1}), ("now", {})],
    ),
    (
        "mistral",
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}',
        "",
        [("add", {"a": 1}), ("now", {})],
    ),
    (
        "hermes",
        '<think>\n<tool_call>{"name": "no"}</tool_call></think>\n\nyes<tool_call>{"name": "add"}</tool_call>',
        "yes",
        [("add", {})],
    ),
    ("hermes", '<think><tool_call>{"name": "add"}</tool_call>', "", []),
]


@pytest.mark.parametrize(("form", "text", "words", "calls"), READ)
def test_calls_are_read_in_their_form(form, text, words, calls):
    for asked in (form, None):
        said = read_calls(text, asked)
        assert said.text == words
        assert [call[:2] for call in said.calls] == calls
        assert [call.id for call in said.calls] == [f"call{n:05d}" for n in range(len(calls))]
        assert not any(call.problem for call in said.calls)


BROKEN = [
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "is not JSON"),
    ("hermes", "<tool_call>add(1)</tool_call>", "is not JSON"),
    ("hermes", '<tool_call>["add"]</tool_call>', "is a JSON object with a name"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "is a JSON object with a name"),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "are not an object: [1]"),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{1"}</tool_call>', "arguments of add are not JSON"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogate"),
    ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "is not JSON"),
    ("llama", "<|python_tag|>search.call(query='x')", "is not JSON"),
    ("llama", '{"name": "add", "parameters": {"a": 1}', "is not JSON"),
    ("mistral", '[TOOL_CALLS][{"name": "add"', "is not JSON"),
    ("mistral", "[TOOL_CALLS]add[ARGS]{", "arguments of add are not JSON"),
]


@pytest.mark.parametrize(("form", "text", "problem"), BROKEN)
def test_a_call_that_cannot_be_read_is_a_call_with_its_problem(form, text, problem):
    (call,) = read_calls(text, form).calls
    assert call.arguments is None
    assert problem in call.problem
    assert len(call.problem) < 250


def test_a_broken_call_beside_a_good_one_costs_itself():
    said = read_calls('<tool_call>{"name": "add"}</tool_call><tool_call>{</tool_call>', "hermes")
    assert [bool(call.problem) for call in said.calls] == [False, True]
