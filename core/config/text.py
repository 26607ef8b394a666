"""The text of config files: YAML 1.2's core schema, read strictly and written so that everything can be seen.

PyYAML finds the parts of a text, but reads their values by YAML 1.1: 0600 is 384, 1:30 is 90, `yes` is true,
2024-01-31 a date. Values are therefore read here. What would change a text silently is refused, with a way to
write it: escapes that swallow a backslash ("\\boxed" in double quotes), a ` #` that cuts a sentence, anchors,
aliases and tags (`&a`, `*a`, `!a` at a text's beginning; nested aliases also grow without end), and a key
given twice, of which the last would count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"([-+]?\.(?:inf|Inf|INF))|\.nan|\.NaN|\.NAN")
_MAX_DIGITS = 400
"""A float has at most 309 before the point; Python refuses to read integers of thousands."""

MAX_DEPTH = 100
"""Lists in lists and mappings in mappings: a config has three, and a stack has an end."""

_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_COMMENT = re.compile(r"[ \t]+(#.*)|[ \t]*\n([ \t]*)(#.*)")
_COMMAND_OF_TEX = re.compile(
    r"\\t[A-Za-z]|\\n(?:abla|atural|e|eq|ot|otin|eg|earrow|warrow|exists|i|icefrac|u|olimits|oindent|onumber|ew(?:line|page|command|environment)"
    r"|(?:leq|geq|less|gtr|mid|sim|cong|prec|succ|parallel|subset|supset|subseteq|supseteq|leftarrow|rightarrow|vdash|vDash)(?:q|slant)?)"
    r"(?![A-Za-z])"
)
"""What is \\times or \\nabla rather than a tab or a new line and a word."""
_SPOKEN = {
    "\b": "backspace",
    "\f": "form feed",
    "\r": "carriage return",
    "\a": "bell",
    "\x1b": "escape",
    "\t": "tab",
    "\n": "line break",
}
_PLAIN = re.compile(r"[A-Za-z./~_][A-Za-z0-9./~_+@=-]*(:[A-Za-z0-9_][A-Za-z0-9./~_+@=-]*)?")


class TextError(ValueError):
    """The text cannot be read, or not without a doubt; the message says where, why, and what to write."""


def read(text: str, prose: Iterable[str] = (), *, comments: bool = True) -> Any:
    """The value that `text` describes: None, bool, int, float, str, lists of them, dicts with text as keys.
    Raises TextError.

    `prose` are keys whose value is free text: behind such a value no comment is taken for one, unless it
    stands in quotes. Without `comments` there are none at all, as on the command line.
    """
    reader = _Reader(text, frozenset(prose), comments)
    try:
        return reader.whole()
    except yaml.MarkedYAMLError as error:
        raise TextError(_in_words(error)) from None
    except yaml.reader.ReaderError as error:
        raise TextError(
            f"not YAML: character {error.position + 1} (U+{int(error.character):04X}) is none of "
            "its characters"
        ) from None
    except TextError:
        raise
    except (ValueError, OverflowError):  # PyYAML asks for the character of any number.
        raise TextError(
            r"not YAML: a \U escape in double quotes is no character; write the text in single "
            r"quotes, '...'"
        ) from None
    except RecursionError:
        raise TextError("not YAML for a config: lists or mappings are nested too deeply") from None


def _in_words(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(
        filter(None, (error.context if (error.context or "").startswith("expected") else "", error.problem))
    )
    if "escape" in problem:
        problem += "; a backslash in double quotes begins an escape: write the text in single quotes, '...'"
    elif "mapping values are not allowed" in problem:
        problem += "; a text that holds `: ` wants quotes"
    elif "alphabetic or numeric" in problem:
        problem += "; a text that begins with & or * wants quotes"
    elif "but got '?'" in problem:
        problem += "; a text with a question mark wants quotes between braces and brackets"
    elif "cannot start any token" in problem:
        problem += "; indent with spaces, and put a text that begins with such a character in quotes"
    mark = error.problem_mark or error.context_mark
    return f"not YAML: {problem}" if mark is None else f"not YAML: {_where(mark)}: {problem}"


def _where(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Reader:
    """One text on its way to a value."""

    def __init__(self, text: str, prose: frozenset[str], comments: bool) -> None:
        self._text, self._prose, self._comments = text, prose, comments

    def whole(self) -> Any:
        loader = _Composer(self._text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if not self._comments:
            self._refuse_comments(node)
        return None if node is None else self._value(node, None)

    def _value(self, node: yaml.Node, key: yaml.ScalarNode | None) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, key) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return dict(self._pairs(node))
        assert isinstance(node, yaml.ScalarNode)
        if node.style == '"':
            self._check_escapes(node)
        elif node.style is None:
            self._check_comment(node, key)
        return _scalar(node)

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, Any]]:
        """Keys as they are written, whatever they look like."""
        seen = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise TextError(f"{_where(key_node.start_mark)}: a list or a mapping is no key")
            key = str(key_node.value)
            if key in seen:
                raise TextError(f"{_where(key_node.start_mark)}: the key {key[:60]!r} is there twice")
            seen.add(key)
            yield key, self._value(value_node, key_node)

    def _check_escapes(self, node: yaml.ScalarNode) -> None:
        """Raises TextError where a backslash in double quotes was hardly meant as YAML's."""
        written = self._text[node.start_mark.index : node.end_mark.index - 1]
        for escape in _ESCAPE.finditer(written):
            if escape[1] not in '\\"nxuUt\n' or _COMMAND_OF_TEX.match(written, escape.start()):
                raise TextError(
                    f"{_where(node.start_mark)}: `{escape[0]}` of "
                    f"`{written[escape.start() : escape.start() + 12]}` is an escape in double "
                    "quotes, so that the text would be another one: write it in single quotes, '...'"
                )

    def _check_comment(self, node: yaml.ScalarNode, key: yaml.ScalarNode | None) -> None:
        """Raises TextError where a ` #` behind a plain text may belong to it."""
        found, value = _COMMENT.match(self._text, node.end_mark.index), _scalar(node)
        if found is None or not isinstance(value, str | None):
            return
        is_prose = key is not None and key.value in self._prose
        comment, is_below = found[1] or found[3], found[1] is None
        if is_below and (key is None or len(found[2]) <= key.start_mark.column):
            return
        is_glued = not comment.startswith("# ") and comment != "#"
        if is_prose or " " in node.value or (is_glued and not is_below):
            raise TextError(
                f"{_where(node.start_mark)}: `{comment[:40]}` behind the text `{node.value[-40:]}` would be "
                "a comment. If it belongs to "
                "the text, put all of it in single quotes; if not, put the text in quotes, or the comment on "
                "a line of its own"
            )

    def _refuse_comments(self, root: yaml.Node | None) -> None:
        """Raises TextError for a `#` outside of quoted texts, where there are no comments."""
        scalars = [] if root is None else _scalars(root)
        quoted = [(node.start_mark.index, node.end_mark.index) for node in scalars if node.style is not None]
        for comment in re.finditer(r"(?<!\S)#.*", self._text):
            if not any(start <= comment.start() < end for start, end in quoted):
                raise TextError(f"`{comment[0][:40]}` would be a comment; put it in quotes, or leave it out")


class _Composer(yaml.SafeLoader):
    """The parts of a text, without anchors, aliases and tags."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        found = ""
        if isinstance(event, yaml.AliasEvent):
            found = f"*{event.anchor} is an alias"
        elif getattr(event, "anchor", None):
            found = f"&{event.anchor} is an anchor"
        elif getattr(event, "tag", None):
            found = f"{event.tag} is a tag"
        if found:
            hint = "a text that begins like this wants quotes; a value that is used twice is written twice"
            raise TextError(f"{_where(event.start_mark)}: {found[:80]}, which a config does without: {hint}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    else:
        for item in node.value:
            for inner in item if isinstance(item, tuple) else (item,):
                yield from _scalars(inner)


def _scalar(node: yaml.ScalarNode) -> Any:
    """Returns the value by YAML 1.2's core schema; what stands in quotes or in a block is text."""
    text = str(node.value)
    if node.style is not None:
        return text
    if _NULL.fullmatch(text):
        return None
    if found := _BOOL.fullmatch(text):
        return bool(found[1])
    if _FLOAT.fullmatch(text) or _OCTAL_OR_HEX.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise TextError(
                f"{_where(node.start_mark)}: {text[:20]}... is a number of {len(text)} characters"
            )
        if _OCTAL_OR_HEX.fullmatch(text):
            return int(text, 0)
        return int(text) if _INT.fullmatch(text) else float(text)
    if found := _NO_NUMBER.fullmatch(text):
        return float(found[1].replace(".", "")) if found[1] else float("nan")
    return text


# --- Characters ---


def strange_character(text: str, *, is_prose: bool) -> str:
    """What is wrong with the first character that no text here should hold, as a clause; empty when there is
    none.

    Control characters, and half surrogate pairs, which bytes that are no UTF-8 become on the command line.
    Line breaks and tabs are fine in prose.
    """
    for character in text:
        if 0xD800 <= ord(character) <= 0xDFFF:
            return f"{character!r} is no character: the text was not UTF-8"
        is_control = ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0
        if is_control and not (is_prose and character in "\n\t"):
            name = _SPOKEN.get(character, "control character")
            article = "an" if name[0] in "aeiou" else "a"
            return (
                f"the text holds {article} {name} (U+{ord(character):04X}). If a backslash was meant, write "
                "the text in single quotes: "
                "in double quotes YAML reads \\b, \\f, \\t and others as such characters"
            )
    return ""


# --- Writing ---


def write(tree: dict[str, Any]) -> str:
    """Sections of keys and values as YAML that `read` turns into the same: a line a key, every text so
    that its ends are seen.
    """
    lines = []
    for section, values in tree.items():
        if not isinstance(values, dict):
            lines.append(f"{section}: {_written(values)}")
            continue
        lines += [f"{section}:", *(f"  {key}: {_written(value)}" for key, value in values.items())]
    return "\n".join([*lines, ""])


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(str(key))}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return _written_text(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def _written_text(text: str) -> str:
    """Plain where nothing can be misread, else in single quotes; in double quotes, escaped, what could
    not be seen in these.
    """
    if _PLAIN.fullmatch(text) and read(text) == text:
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return '"' + "".join(_escaped(text, index) for index in range(len(text))) + '"'


def _escaped(text: str, index: int) -> str:
    character = text[index]
    if character in '"\\':
        return "\\" + character
    if character == "\n" and not _COMMAND_OF_TEX.match("\\n" + text[index + 1 : index + 12]):
        return "\\n"
    if character.isprintable():
        return character
    code = ord(character)
    letter, width = next(
        (letter, width) for letter, width in (("x", 2), ("u", 4), ("U", 8)) if code < 16**width
    )
    return f"\\{letter}{code:0{width}X}"
