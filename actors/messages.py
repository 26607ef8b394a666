"""A prompt of messages: what is wrong with it, and its text by the tokenizer's chat template.

Messages come in many shapes. Tables fill the keys that other rows have with null (`tool_calls: null`), and
templates that ask `'tool_calls' in message` are misled: keys that hold null are left out. Content may be a
list of text parts, and templates differ in which of the two they take: text is tried first, parts where text
does not come through. What no template says is told, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.sources import Bad, kind_of
from core.tokenizer import NO_OPTIONS, render_messages

ROLES = ("system", "user", "assistant", "tool", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_OTHER = "OTHER CONTENT"


def text_problems(what: str, text: str) -> Iterator[str]:
    """Yields what is wrong with a text called `what`."""
    if not text.strip():
        yield f"{what} is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        yield f"{what} holds half a surrogate pair, which is no character"


def message_problems(column: str, messages: Sequence[Any], system_prompt: str | None) -> Iterator[str]:
    """Yields what is wrong with the messages in `column`."""
    if not messages:
        yield f"{column!r} is an empty list of messages"
        return
    for number, message in enumerate(messages, start=1):
        what = f"message {number} of {column!r}"
        if (
            not isinstance(message, dict)
            or message.get("role") is None
            or not ("content" in message or message.get("tool_calls"))
        ):
            keys = (
                f"; it has {', '.join(map(repr, message))}" if isinstance(message, dict) and message else ""
            )
            yield f"{what} is not {{'role': ..., 'content': ...}}{keys}"
            return
        if message["role"] not in ROLES:
            yield f"{what} has the role {message['role']!r}, expected one of {', '.join(ROLES)}"
        yield from _content_problems(f"the content of {what}", message)
    if messages[-1]["role"] == "assistant":
        yield f"the last message of {column!r} is the assistant's: nothing is left to answer"
    if system_prompt is not None and any(message["role"] == "system" for message in messages):
        yield f"{column!r} has a system message of its own, but data.system_prompt is set"


def _content_problems(what: str, message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, list) and content:
        for number, part in enumerate(content, start=1):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _TEXT_PARTS:
                yield f"part {number} of {what} is of type {kind!r}; a language model takes text"
                return
            if not isinstance(part, str) and not (
                isinstance(part, dict) and isinstance(part.get("text"), str)
            ):
                yield f"{what} is a list, expected text or a list of {{'type': 'text', 'text': ...}}"
                return
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        yield f"{what} is {kind_of(content)}, expected text"
        return
    if not message.get("tool_calls"):
        yield from text_problems(what, _text(content))


def clean_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages without keys that hold nothing, their contents as text."""
    return [
        {
            **{key: value for key, value in _without_nulls(message).items() if value not in ([], {})},
            "content": _text(message.get("content")),
        }
        for message in messages
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _text(content: Any) -> str:
    """Returns text parts on lines of their own, as vLLM's server puts them together."""
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    return content or ""


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    options: Mapping[str, Any] = NO_OPTIONS,
) -> tuple[str, tuple[int, ...] | None] | Bad:
    """Returns the text of clean messages, up to where the answer begins, or what is wrong with them.

    `tools` are JSON schemas that the template shows as well, `options` are `data.template_options`. Tokens
    come along where the tokenizer makes them itself, else None.
    """
    first = _render_checked(tokenizer, messages, tools, options)
    if not isinstance(first, Bad):
        return first
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    second = _render_checked(tokenizer, parts, tools, options)
    return first if isinstance(second, Bad) else second


def _render_checked(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    options: Mapping[str, Any],
) -> tuple[str, tuple[int, ...] | None] | Bad:
    """Renders the messages; returns Bad where the template raises, or renders the same whatever a message
    says.
    """
    try:
        rendered = render_messages(tokenizer, messages, tools, options)
        for number, message in enumerate(messages):
            content = (
                message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
            )
            if message["role"] == "assistant" or content.strip() in rendered[0]:
                continue
            other = _OTHER if isinstance(message["content"], str) else [{"type": "text", "text": _OTHER}]
            changed = [*messages[:number], {**message, "content": other}, *messages[number + 1 :]]
            if render_messages(tokenizer, changed, tools, options) == rendered:
                return Bad(
                    f"the chat template leaves out what message {number + 1} of {len(messages)} "
                    f"({message['role']}) says"
                )
    except Exception as error:  # noqa: BLE001 -- a template is a program of the model's maker
        reason = " ".join(str(error).split())[:300]
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        return Bad(f"the chat template refuses the messages: {kind}{reason}")
    return rendered
