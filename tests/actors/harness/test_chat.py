"""OpenAI's JSON: what requests ask, what is refused and why, and how answers look."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from actors.harness.chat import ApiError, ChatAnswer, ChatRequest, completion, events, request_of
from environments import ToolCall

HI = [{"role": "user", "content": "hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "policy"}
ANSWER = ChatAnswer(
    "five", (ToolCall("add", {"a": 2}, "", "call00000"),), "tool_calls", 7, 3, (("five", -0.5),)
)


def asked(**keys: Any) -> ChatRequest:
    return request_of(json.dumps({"model": "x", "messages": HI, **keys}).encode())


def test_a_request_is_read():
    request = asked(
        tools=[ADD],
        tool_choice="auto",
        stop="END",
        max_completion_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        temperature=0.2,
        seed=None,
    )
    assert request == ChatRequest(
        tuple(HI), (ADD,), True, ("END",), 5, True, True, True, ignored=("temperature",)
    )
    assert asked() == ChatRequest(tuple(HI))
    assert asked(max_tokens=4).max_tokens == 4
    assert not asked(tools=[ADD], tool_choice="none").reads_calls


def test_messages_are_what_chat_templates_take():
    called = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    found = asked(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None, "audio": None},
            {"role": "tool", "tool_call_id": "c", "content": ""},
        ]
    ).messages
    arguments = {"name": "add", "arguments": {"a": 1}}
    assert found == (
        {"role": "system", "content": "Be\nbrief"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": arguments}],
        },
        {"role": "tool", "tool_call_id": "c", "content": ""},
    )


REFUSED = [
    ({"n": 2}, "n = 2 is not supported: one answer a call: call several times", "n"),
    ({"tool_choice": "required"}, "the policy itself chooses", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "the policy itself", "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "decoding is not constrained", "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
    ({"functions": [{}]}, "use tools", "functions"),
    ({"top_logprobs": 3, "logprobs": True}, "only the sampled", "top_logprobs"),
    ({"modalities": ["audio"]}, "the policy writes text", "modalities"),
    ({"messages": []}, "messages is not a list", "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role is 'robot'", "messages"),
    ({"messages": [5]}, "messages[0].role is 5", "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content holds something that is no text",
        "messages",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "calls no function", "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "is not a list", "messages"),
    ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens is '5'", "max_tokens"),
    ({"stop": [""]}, "stop is not a text", "stop"),
    ({"tools": [{"name": "add"}]}, "a tool is", "tools"),
    ({"tools": 3}, "tools is not a list", "tools"),
]


@pytest.mark.parametrize(("keys", "reason", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_with_its_parameter(keys, reason, param):
    with pytest.raises(ApiError) as refused:
        asked(**keys)
    assert reason in str(refused.value)
    error = refused.value.json["error"]
    assert (refused.value.status, error["param"], error["type"]) == (400, param, "invalid_request_error")


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ApiError, match="not"):
        request_of(body)


def test_an_answer_is_one_that_the_openai_package_reads():
    found = ChatCompletion.model_validate(completion(ANSWER, HEAD, has_logprobs=True))
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("five", "tool_calls")
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].to_dict()["function"] == {"name": "add", "arguments": '{"a": 2}'}
    assert choice.logprobs is not None
    assert [(token.token, token.logprob) for token in choice.logprobs.content or ()] == [("five", -0.5)]
    assert found.usage is not None
    assert found.usage.total_tokens == 10


def test_a_stream_ends_with_the_reason_and_the_usage_where_it_is_wanted():
    request = ChatRequest(tuple(HI), is_stream=True, has_usage=True, has_logprobs=True)
    found = [ChatCompletionChunk.model_validate(event) for event in events(ANSWER, HEAD, request)]
    deltas = [chunk.choices[0].delta for chunk in found[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == "five"
    assert [call.function.name for delta in deltas for call in delta.tool_calls or () if call.function] == [
        "add"
    ]
    assert found[-2].choices[0].finish_reason == "tool_calls"
    assert found[-1].choices == []
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == 3
    assert not any(chunk.usage for chunk in found[:-1])
