"""OpenAI's chat completions as JSON: what a request asks, and how an answer, a stream and an error look.

What a policy in training cannot do is refused with the reason (several choices, constrained decoding, a tool
that must be called). How tokens are sampled is the run's own affair: `temperature`, `top_p`, `seed` and the
like of a request are not followed, since log-probs are of the run's temperature, and `ChatRequest.ignored`
names them to be told once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from actors.messages import ROLES, clean_messages
from core.errors import AgroError
from environments import ToolCall

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")


class ApiError(AgroError, ValueError):
    """A request that is answered with an error: `ApiError(400, "n is 2; ...", param="n")`."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def __str__(self) -> str:
        """Returns the message alone."""
        return self.message

    @property
    def json(self) -> dict[str, Any]:
        """Returns the error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks.

    messages      as a chat template takes them: content is text, arguments of calls are objects
    tools         JSON schemas that the template shows
    reads_calls   whether calls in the answer are read (`tool_choice` is not "none")
    stop          texts that end the answer
    max_tokens    how many tokens it asks for at most; None: as many as the run allows
    is_stream     whether the answer comes in events, with `has_usage` the tokens' count in the last
    has_logprobs  whether the log-probs of the tokens are wanted
    ignored       names of settings that are not followed
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    reads_calls: bool = True
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    is_stream: bool = False
    has_usage: bool = False
    has_logprobs: bool = False
    ignored: tuple[str, ...] = ()


class ChatAnswer(NamedTuple):
    """What is answered. `finish_reason` is "stop", "length" or "tool_calls"; `logprobs` are each token's text
    and log-prob.
    """

    content: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[tuple[str, float], ...] = ()


# --- Requests ---


def request_of(body: bytes) -> ChatRequest:
    """Returns what the body of a request asks. Raises ApiError, with the parameter, for what is wrong with it
    or cannot be done.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise ApiError(400, "the request is not a JSON object")
    asked = {key: value for key, value in asked.items() if value is not None}
    _refuse_what_cannot_be_done(asked)
    limit = asked.get("max_completion_tokens", asked.get("max_tokens"))
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ApiError(400, f"max_tokens is {limit!r}; expected a whole number from 1 on", param="max_tokens")
    options = asked.get("stream_options")
    return ChatRequest(
        messages=_messages(asked.get("messages")),
        tools=_tools(asked.get("tools", [])),
        reads_calls=asked.get("tool_choice") != "none",
        stop=_stop(asked.get("stop", [])),
        max_tokens=limit,
        is_stream=bool(asked.get("stream")),
        has_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        has_logprobs=bool(asked.get("logprobs")),
        ignored=tuple(name for name in _SAMPLING if name in asked),
    )


def _refuse_what_cannot_be_done(asked: Mapping[str, Any]) -> None:
    choice = asked.get("tool_choice", "auto")
    kind = asked.get("response_format", {"type": "text"})
    refused = {
        "n": asked.get("n", 1) != 1 and "one answer a call: call several times",
        "tool_choice": choice not in ("auto", "none")
        and "the policy itself chooses whether to call a tool: use 'auto' or 'none'",
        "response_format": (not isinstance(kind, dict) or kind.get("type") != "text")
        and "decoding is not constrained, since the policy is trained on what it would say: ask for the form in "
        "the messages",
        "logit_bias": bool(asked.get("logit_bias"))
        and "tokens are sampled as the policy has them, or their log-probs would be others'",
        "functions": "functions" in asked and "use tools",
        "top_logprobs": bool(asked.get("top_logprobs")) and "only the sampled tokens have log-probs",
        "modalities": asked.get("modalities", ["text"]) != ["text"] and "the policy writes text",
        "stream": not isinstance(asked.get("stream", False), bool) and "expected true or false",
    }
    for name, why in refused.items():
        if why:
            shown = json.dumps(asked[name])[:80]
            raise ApiError(400, f"{name} = {shown} is not supported: {why}", param=name, code="unsupported")


def _messages(found: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(found, list) or not found:
        raise ApiError(400, "messages is not a list of messages", param="messages")
    return tuple(_message(f"messages[{place}]", message) for place, message in enumerate(found))


def _message(what: str, message: Any) -> dict[str, Any]:
    """Returns a message as chat templates take it; what the developer says is the system's."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise ApiError(400, f"{what}.role is {role!r}; expected one of {', '.join(ROLES)}", param="messages")
    kept = {key: message[key] for key in _KEPT if message.get(key) is not None}
    content = kept.get("content", "")
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ApiError(400, f"{what}.content holds something that is no text", param="messages")
    kept |= {"content": content, "role": "system" if message["role"] == "developer" else message["role"]}
    if calls := kept.pop("tool_calls", None):
        kept["tool_calls"] = [_called(f"{what}.tool_calls", call) for call in _list(what, calls)]
    return clean_messages([kept])[0]


def _called(what: str, call: Any) -> dict[str, Any]:
    """Returns a call with its arguments as an object, where they are the JSON of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{what} holds something that calls no function", param="messages")
    arguments = function.get("arguments") or "{}"
    with contextlib.suppress(ValueError, RecursionError):  # Then the template shows what was written.
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _list(what: str, found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ApiError(400, f"{what} is not a list", param=what.partition("[")[0])
    return found


def _tools(found: Any) -> tuple[dict[str, Any], ...]:
    for tool in _list("tools", found):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(
                400,
                "a tool is {'type': 'function', 'function': {'name': ..., 'parameters': ...}}",
                param="tools",
            )
    return tuple(found)


def _stop(found: Any) -> tuple[str, ...]:
    texts = [found] if isinstance(found, str) else _list("stop", found)
    if not all(isinstance(text, str) and text for text in texts):
        raise ApiError(400, "stop is not a text, or a list of texts", param="stop")
    return tuple(texts)


# --- Answers ---


def message_of(answer: ChatAnswer) -> dict[str, Any]:
    """Returns the assistant's message, as the next request brings it back."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [_call_json(call) for call in answer.calls]
    return message


def _call_json(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def completion(answer: ChatAnswer, head: Mapping[str, Any], *, has_logprobs: bool) -> dict[str, Any]:
    """Returns the whole answer; `head` has its `id`, `created` and `model`."""
    choice = {
        "index": 0,
        "message": {**message_of(answer), "refusal": None},
        "finish_reason": answer.finish_reason,
        "logprobs": _logprobs(answer) if has_logprobs else None,
    }
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}


def events(answer: ChatAnswer, head: Mapping[str, Any], request: ChatRequest) -> Iterator[dict[str, Any]]:
    """Yields the answer as a stream has it: the role, the text, each call, why it ended, and where it is
    wanted the usage.
    """

    def event(
        delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        usage = {"usage": None} if request.has_usage else {}
        return {**head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    yield event({"role": "assistant", "content": ""})
    if answer.content:
        yield event({"content": answer.content}, logprobs=_logprobs(answer) if request.has_logprobs else None)
    for place, call in enumerate(answer.calls):
        yield event({"tool_calls": [{"index": place, **_call_json(call)}]})
    yield event({}, answer.finish_reason)
    if request.has_usage:
        yield {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}


def _usage(answer: ChatAnswer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _logprobs(answer: ChatAnswer) -> dict[str, Any]:
    content = [
        {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
        for token, logprob in answer.logprobs
    ]
    return {"content": content, "refusal": None}
