"""The forms in which datasets keep conversations, made into messages with a role and a content.

    {"role": "user", "content": "1+1?"}           OpenAI, TRL, verl
    {"from": "human", "value": "1+1?"}            ShareGPT (`conversations`)
    [{"type": "text", "text": "1+1?"}]            the content of one message, in parts
    a last message of the assistant               in `messages` and `conversations` the answer, split off

What is none of these is left as it is, for `actors.messages.message_problems` to name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from actors.sources import Bad, kind_of

CONVERSATIONS = ("messages", "conversations")
"""Columns whose conversations may end with the answer, as those for fine-tuning do."""
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class Conversation(NamedTuple):
    """A prompt as messages, the answer that stood behind it (None: none did), and how that was read."""

    messages: list[Any]
    answer: str | None = None
    forms: tuple[str, ...] = ()


def conversation_of(column: str, value: list[Any]) -> Conversation | Bad:
    """Returns the messages in `value`, or what is wrong with them that only their form can tell."""
    forms = []
    messages = value
    if value and all(_is_part(entry) for entry in value):
        messages = [{"role": "user", "content": value}]
        forms.append(f"{column!r} is the content of one message of the user, in parts")
    elif value and all(
        isinstance(entry, dict) and "from" in entry and "role" not in entry for entry in value
    ):
        renamed = [_renamed(column, number, entry) for number, entry in enumerate(value, start=1)]
        if bad := next((message for message in renamed if isinstance(message, Bad)), None):
            return bad
        messages = list(renamed)
        forms.append(f"{column!r} is a conversation in the keys 'from' and 'value'")
    if column not in CONVERSATIONS or not messages or not _is_assistants(messages[-1]):
        return Conversation(messages, None, tuple(forms))
    answer = messages[-1].get("content")
    if isinstance(answer, list) and all(
        _is_part(part) and isinstance(part.get("text"), str) for part in answer
    ):
        answer = "\n".join(part["text"] for part in answer)
    if not isinstance(answer, str) or not answer.strip():
        return Bad(
            f"the last message of {column!r} is the assistant's and its content is "
            f"{'empty' if isinstance(answer, str) else kind_of(answer)}: it is no answer. Take it off"
        )
    return Conversation(messages[:-1], answer, tuple(forms))


def _is_part(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and "type" in entry
        and not entry.keys() & {"role", "from", "content", "value"}
    )


def _is_assistants(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _renamed(column: str, number: int, entry: Mapping[str, Any]) -> dict[str, Any] | Bad:
    speaker = entry["from"]
    if speaker not in _SPEAKERS:
        return Bad(
            f"message {number} of {column!r} is from {speaker!r}, expected one of {', '.join(_SPEAKERS)}. "
            "Write it as {'role': ..., 'content': ...}"
        )
    rest = {key: value for key, value in entry.items() if key not in ("from", "value")}
    return {"role": _SPEAKERS[speaker], "content": entry.get("value"), **rest}
