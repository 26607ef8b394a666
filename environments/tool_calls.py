"""Tool calls as policies write them, read from what one said.

    form      what it looks like                                                    whose
    hermes    <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>     Qwen, Hermes, SmolLM3
    llama     {"name": "add", "parameters": {"a": 1}}, perhaps after <|python_tag|> Llama 3
    mistral   [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]                  Mistral, and its newer
              [TOOL_CALLS]add[ARGS]{"a": 1}

Several calls may stand side by side. What looks like a call and cannot be read is a ToolCall with a
`problem`, from which the policy learns; what does not look like one is text. What a policy thinks
(`<think>...</think>`) is neither called nor part of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from environments import ToolCall

_THOUGHTS = re.compile(r"\A.*?</think>", re.DOTALL)
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_LLAMA_TAG, _MISTRAL_TAG, _MISTRAL_ARGUMENTS = "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"
_LLAMA_BARE = re.compile(r"\s*\{(?=.*\"name\")(?=.*\"(?:parameters|arguments)\")", re.DOTALL)
_BETWEEN = re.compile(r"[\s;,]*")
_UNREADABLE = (ValueError, RecursionError)  # Of JSON: the second is what a thousand brackets come to.
_SHOWN = 80
"""How many characters of a call that cannot be read its problem shows."""


class Said(NamedTuple):
    """What a policy said in a turn: the text that is for others, and the tools that it calls, in order."""

    text: str
    calls: tuple[ToolCall, ...] = ()


def read_calls(text: str, form: str | None) -> Said:
    """Returns the calls that are written in `text` in the `form` named (one of `FORMS`), and the text without
    them.

    Without a form, the first of all that looks like one counts.
    """
    spoken = _spoken(text)
    for reader in FORMS.values() if form is None else (FORMS[form],):
        found = reader(spoken)
        if found is not None:
            words, calls = found
            return Said(words.strip(), tuple(call._replace(id=call_id(n)) for n, call in enumerate(calls)))
    return Said(spoken)


def call_id(number: int) -> str:
    """Returns the name by which the answer to a turn's call `number` is told: nine letters and digits, since
    Mistral's templates take no other.
    """
    return f"call{number:05d}"


def call_of(found: Any) -> ToolCall:
    """Returns the call that a JSON value describes.

    Arguments are `arguments` or `parameters`, an object or the JSON of one; none at all is an empty object.
    """
    if isinstance(found, dict) and isinstance(inner := found.get("function"), dict):
        found = inner
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name:
        what = f"a tool call is a JSON object with a name and arguments, not {_shown(found)}"
        return ToolCall("", None, what)
    arguments = found.get("arguments", found.get("parameters"))
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ToolCall("", None, "the tool call holds half a surrogate pair, which is no character")
    except _UNREADABLE as error:
        return ToolCall(name, None, f"the arguments of {name} are not JSON: {error}")
    if arguments is not None and not isinstance(arguments, dict):
        return ToolCall(name, None, f"the arguments of {name} are not an object: {_shown(arguments)}")
    return ToolCall(name, arguments or {})


def _shown(value: Any) -> str:
    return json.dumps(value)[:_SHOWN]


def _spoken(text: str) -> str:
    """Returns the text after the thoughts; nothing where they have no end."""
    if "</think>" in text:
        return _THOUGHTS.sub("", text, count=1).lstrip("\n")
    return "" if text.lstrip().startswith("<think>") else text


def _hermes(text: str) -> tuple[str, list[ToolCall]] | None:
    if "<tool_call>" not in text:
        return None
    return _HERMES.sub("", text), [_parsed(found[1]) for found in _HERMES.finditer(text)]


def _mistral(text: str) -> tuple[str, list[ToolCall]] | None:
    words, tag, written = text.partition(_MISTRAL_TAG)
    if not tag:
        return None
    if _MISTRAL_ARGUMENTS not in written:
        return words, list(_values(written, one_list=True))
    calls = []
    for part in written.split(_MISTRAL_TAG):
        name, _, arguments = part.partition(_MISTRAL_ARGUMENTS)
        name = name.partition("[CALL_ID]")[0].strip()
        calls.append(call_of({"name": name, "arguments": arguments.strip() or {}}))
    return words, calls


def _llama(text: str) -> tuple[str, list[ToolCall]] | None:
    words, tag, written = text.partition(_LLAMA_TAG)
    if tag:
        return words, list(_values(written))
    if not _LLAMA_BARE.match(text):
        return None
    return "", list(_values(text))


def _values(written: str, *, one_list: bool = False) -> Iterator[ToolCall]:
    """Yields the calls of JSON values one behind the other, or of one list of them."""
    decoder, place = json.JSONDecoder(), 0
    while (place := _after_separators(written, place)) < len(written):
        try:
            found, place = decoder.raw_decode(written, place)
        except _UNREADABLE as error:
            yield _unreadable(written[place:], error)
            return
        yield from map(call_of, found if one_list and isinstance(found, list) else [found])


def _after_separators(written: str, place: int) -> int:
    found = _BETWEEN.match(written, place)
    return place if found is None else found.end()


def _parsed(written: str) -> ToolCall:
    try:
        return call_of(json.loads(written))
    except _UNREADABLE as error:
        return _unreadable(written, error)


def _unreadable(written: str, error: Exception) -> ToolCall:
    return ToolCall("", None, f"the tool call is not JSON ({error}): {written.strip()[:_SHOWN]}")


FORMS: dict[str, Callable[[str], tuple[str, list[ToolCall]] | None]] = {
    "hermes": _hermes,
    "mistral": _mistral,
    "llama": _llama,
}
