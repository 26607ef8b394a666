"""A conversation in tokens: how it begins, what follows an answer, and what an answer says.

    first(messages, observation) -> tokens --policy--> tokens, kept as sampled --read--> Said(text, calls)
                                                ^                                          |
                                                `-- continuation(messages) <-- environment-'

What was sampled is never rendered again: chat templates leave thoughts out of earlier turns, write tool calls
anew, strip white space. The tokens of new messages are found on a conversation of our own, a question and its
answer, rendered with the new messages behind it: what comes after the token that ends the answer.
The whole is tokenised and cut, so that no tokenizer makes something else of a piece. `check` tries at
the start whether turn after turn gives what the template itself makes of the whole conversation.

    the template's own way to write the whole                               then
    the same tokens                                                         nothing to say
    other earlier turns, the same end (thoughts left out, tools moved)      a note: kept as sampled and shown
    the end depends on what came before; nothing ends an answer; a message  refused
    is lost; the end of an answer is one token with what follows
    no role "tool"                                                          a note: shown as the user's message
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.messages import clean_messages
from core.errors import DataError
from core.newest import Newest
from core.tokenizer import Detokenizer, closing_ids, is_mistral, text_prefix, tokenise, with_prefix
from environments import ToolCall
from environments.tool_calls import FORMS, Said, call_id, call_of, read_calls

Message = Mapping[str, Any]

_QUESTION, _ANSWER, _SHOWN, _THOUGHT = "QQUESTION", "QANSWERQ", "QSHOWNQ", "QTHOUGHTQ"
"""Words that no template, tool or system prompt has; a message is found again by them."""
_REMEDY = (
    "Put a template that only appends (chat_template.jinja) into the model's directory, use another model, or "
    "set data.chat_template=false to write the conversation as plain text"
)
KNOWN, KNOWN_TOKENS = 256, 2048
"""So many beginnings and continuations are kept, the newest, if they are no longer than that: the samples of
a group begin with the same words and are often answered the same, and a template takes longer to write them
than an engine a token.
"""
_KEPT = "the policy goes on from what it was shown and what it sampled, and is trained on that"


class Dialogue:
    """The conversations of one policy, by its tokenizer's chat template. Example:

    dialogue = Dialogue(tokenizer, tools=spec.tools, template_options={}, chat_template=True, end_ids=ends)
    notes = dialogue.check()
    tokens = dialogue.first([{"role": "user", "content": "1+1?"}], observation="")
    tokens += generation.tokens
    said = dialogue.read(generation.text, generation.tokens)
    tokens += dialogue.continuation([{"role": "tool", "name": "add", "content": "2"}])
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]] = (),
        template_options: Mapping[str, Any] | None = None,
        chat_template: bool = True,
        *,
        end_ids: Sequence[int] = (),
    ) -> None:
        """Takes the tools' JSON schemas, `data.template_options`, `data.chat_template`, and the tokens that
        end an answer (`core.tokenizer.end_token_ids`; empty: the tokenizer's own).
        """
        self._tokenizer, self._options = tokenizer, dict(template_options or {})
        self._tools = [dict(tool) for tool in tools]
        self._chat_template = chat_template
        own = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()
        self._closing = closing_ids(tokenizer, end_ids or own, chat_template=chat_template)
        self._ends = {*end_ids, *self._closing[-1:]}
        names = sorted((str(tokenizer.convert_ids_to_tokens(end)) for end in self._ends), key=len)
        self._end = re.compile("|".join(map(re.escape, reversed(names))) or r"(?!)")
        self._detokenizer = Detokenizer(tokenizer, sorted(self._ends))
        self._firsts: Newest[tuple[int, ...]] = Newest(KNOWN)
        self._continuations: Newest[tuple[int, ...]] = Newest(KNOWN)
        self._head: tuple[str, tuple[int, ...]] = ("", ())  # What ends in an answer, and its tokens.
        self._has_tool_role, self._form, self._opening = True, None, ""
        if self._tools and chat_template and not is_mistral(tokenizer):
            self._has_tool_role = self._shows(_message("tool", _SHOWN))
            self._opening = self._render([_message("user", _QUESTION)])
            self._form = self._form_of(self._call_as_written())
        elif self._tools and chat_template:
            self._form = "mistral"

    @property
    def closing(self) -> tuple[int, ...]:
        """Returns what the template writes after an answer's last word, the end token last."""
        return self._closing

    def first(self, messages: Sequence[Message], observation: str = "") -> tuple[int, ...]:
        """Returns the tokens of a conversation's beginning, up to where the first answer begins.

        `observation`, what an environment shows first, is appended to the last message of the user as it is
        (TRL's way), or becomes one. Raises DataError where the template does not take the messages.
        """
        key = repr((messages, observation))
        if (known := self._firsts.get(key)) is not None:
            return known
        shown = clean_messages([dict(message) for message in messages])
        if observation and shown and shown[-1]["role"] == "user":
            shown[-1] = {**shown[-1], "content": shown[-1]["content"] + observation}
        elif observation:
            shown.append({"role": "user", "content": observation})
        if not shown:
            raise DataError("there is no message and no observation to begin a conversation with.")
        return _remembered(self._firsts, key, self._tokens(shown))

    def continuation(self, messages: Sequence[Message], *, ended: bool = True) -> tuple[int, ...]:
        """Returns the tokens that follow an answer's end token when these messages come next, up to where the
        next answer begins.

        `ended` False: the answer has no end token (a stop string ended it), so the tokens begin with the
        closing. Raises DataError where the template does not take the messages.
        """
        key = repr(messages)
        if (found := self._continuations.get(key)) is None:
            shown = clean_messages([dict(message) for message in messages])
            if not shown:
                raise DataError("no message follows the answer: an observation is needed to go on.")
            if not self._has_tool_role:
                shown = _as_user(shown)
            found = _remembered(self._continuations, key, self._after_answer(shown))
        return found if ended else (*self._closing, *found)

    def read(self, text: str, tokens: Sequence[int] = ()) -> Said:
        """Returns what an answer says to others and which tools it calls; without tools the text as it is.

        `tokens` of the answer, where given, are read instead of the text, which may lack special tokens.
        """
        if not self._tools:
            return Said(text)
        return self._said(self._detokenizer.text(tokens) if len(tokens) else text)

    def is_ended(self, tokens: Sequence[int]) -> bool:
        """Returns whether an answer ends in an end token."""
        return bool(tokens) and tokens[-1] in self._ends

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """Returns each token as text."""
        return [str(self._tokenizer.decode([token])) for token in tokens]

    def check(self) -> tuple[str, ...]:
        """Returns what is to be told at the start; raises DataError where the template is no continuation,
        with the reason.
        """
        if not self._chat_template:
            return tuple(self._text_notes())
        if not self._closing:
            raise _refusal("it puts no end token after an answer")
        if is_mistral(self._tokenizer):
            self.continuation([_message("user", _SHOWN)])
            return ()
        return (*self._tool_notes(), *self._continuation_notes())

    # --- Checks ---

    def _text_notes(self) -> Iterator[str]:
        if self._tools:
            yield (
                f"warning: with data.chat_template=false nothing shows the policy its tools "
                f"({', '.join(map(_name, self._tools))}): say in the rows' prompts what they are and how to call "
                f"them, in one of the forms {', '.join(FORMS)}, or let the chat template show them"
            )

    def _tool_notes(self) -> Iterator[str]:
        if not self._tools:
            return
        unseen = [name for name in map(_name, self._tools) if name not in self._opening]
        if unseen:
            yield (
                f"warning: the chat template does not show the policy its tools ({', '.join(unseen)}): say in "
                "data.system_prompt what they are and how to call them, or use a template that shows them"
            )
        if not self._has_tool_role:
            yield (
                "the chat template has no role 'tool': what a tool answers is shown as the user's next message"
            )
        written = self._call_as_written()
        if written and not _is_ours(self._said(written)):
            raise _refusal(
                f"it writes a tool call as {written!r}, which is in none of the forms {', '.join(FORMS)} and not "
                "read back by the tokenizer's response_template. Give the tokenizer one "
                "(`response_template` in tokenizer_config.json)"
            )
        if not written:
            yield (
                "warning: the chat template does not show how a tool is called: calls are read in the forms "
                f"{', '.join(FORMS)}"
            )

    def _continuation_notes(self) -> Iterator[str]:
        """Yields how the template's own way to write two rounds differs from round after round."""
        shown = _message("tool" if self._tools else "user", _SHOWN)
        shown = shown if self._has_tool_role else _as_user([shown])[0]
        question = [_message("user", _QUESTION)]
        try:
            followed, answer = self._after_answer([shown]), self._answer_before(shown)
            one = self._render([*question, answer, shown])
            two = self._render([*question, answer, shown, answer, shown])
        except DataError as error:
            raise _refusal(str(error)) from None
        ending = one.rpartition(_ANSWER)[2]
        if _SHOWN not in ending:
            raise _refusal(f"it leaves out what a message of the role {shown['role']!r} says after an answer")
        if (
            two.count(_ANSWER) != 2
            or self._ids(two)[-len(followed) :] != followed
            or not two.endswith(ending)
        ):
            raise _refusal("what it writes after an answer depends on what came before")
        if written := self._written_anew(question, [answer, shown]):
            yield f"the chat template writes earlier turns anew ({written}): {_KEPT}"
        elif written := self._written_anew([_message("system", _QUESTION), *question], [answer, shown]):
            yield f"after a system message the chat template writes earlier turns anew ({written}): {_KEPT}"
        if "think" in str(self._tokenizer.chat_template):
            thought = {**answer, "content": f"<think>\n{_THOUGHT}\n</think>\n\n{answer['content']}"}
            if _THOUGHT not in self._render([*question, thought, shown]):
                yield f"the chat template leaves out what the policy thought in earlier turns: {_KEPT}"

    def _written_anew(self, start: Sequence[Message], turn: Sequence[Message]) -> str:
        """Returns where the template writes two rounds other than one after the other; empty where it does
        not, or takes no such start.
        """
        try:
            opening = self._render(start)
            one, two = self._render([*start, *turn]), self._render([*start, *turn, *turn])
        except DataError:
            return ""
        if not one.startswith(opening):
            return _difference(opening, one)
        again = one + one[len(opening) :]
        return _difference(again, two) if again != two else ""

    def _answer_before(self, shown: Message) -> Message:
        """Returns the answer after which the template takes the message."""
        return next(answer for answer in self._answers([shown]) if self._takes(answer, shown))

    def _takes(self, answer: Message, shown: Message) -> bool:
        try:
            return _ANSWER in self._render([_message("user", _QUESTION), answer, shown])
        except DataError:
            return False

    def _shows(self, shown: Message) -> bool:
        """Returns whether the template takes a message after an answer, and says what it says."""
        question = _message("user", _QUESTION)
        for answer in self._answers([shown]):
            try:
                text = self._render([question, answer, shown])
            except DataError:
                continue
            if _ANSWER in text and _SHOWN in text.rpartition(_ANSWER)[2]:
                return True
        return False

    # --- Tool calls ---

    def _call_as_written(self) -> str:
        """Returns how the template writes an answer that calls a tool; empty where it does not."""
        conversation = [
            _message("user", _QUESTION),
            _calling([("tool", call_id(0))]),
            _message("tool", _SHOWN),
        ]
        for messages in (conversation, conversation[:2]):
            try:
                text = self._render(messages, opened=len(messages) > 2)
            except DataError:
                continue
            if _ANSWER not in text:
                continue
            start = (
                len(self._opening)
                if text.startswith(self._opening)
                else text.index(_QUESTION) + len(_QUESTION)
            )
            end = self._end.search(text, text.index(_ANSWER))
            return text[start : len(text) if end is None else end.start()]
        return ""

    def _form_of(self, written: str) -> str | None:
        """Returns the form of calls that a call as the template writes it has; None for none."""
        return next((form for form in FORMS if _is_ours(read_calls(written, form))), None)

    def _said(self, written: str) -> Said:
        if getattr(self._tokenizer, "response_template", None) is None:
            return read_calls(written, self._form)
        try:
            found = self._tokenizer.parse_response(written, prefix=self._opening, tools=self._tools)
        except Exception as error:  # noqa: BLE001 -- a response template is a program of the model's maker
            problem = " ".join(str(error).split())[:200] or type(error).__name__
            return Said(written, (ToolCall("", None, f"the answer cannot be read: {problem}", call_id(0)),))
        calls = [call_of(call) for call in found.get("tool_calls") or ()]
        content = found.get("content")
        return Said(
            content if isinstance(content, str) else "",
            tuple(call._replace(id=call_id(number)) for number, call in enumerate(calls)),
        )

    # --- Rendering ---

    def _render(self, messages: Sequence[Message], *, opened: bool = True) -> str:
        """Returns the text of the messages, `opened` up to where an answer begins. Raises DataError where the
        template does not take them.
        """
        if not self._chat_template:
            return "".join(message["content"] for message in messages)
        return str(self._apply(messages, tokenize=False, add_generation_prompt=opened))

    def _tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Returns the tokens of the messages, up to where an answer begins; special tokens once."""
        if self._chat_template and is_mistral(self._tokenizer):
            return tuple(self._apply(messages, tokenize=True, return_dict=False))
        return self._ids(self._render(messages))

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        options = {"tools": self._tools, **self._options} if self._tools else self._options
        try:
            return self._tokenizer.apply_chat_template(list(map(dict, messages)), **options, **how)
        except Exception as error:  # noqa: BLE001 -- a template is a program of the model's maker
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"the chat template does not take messages of {roles}: {reason}") from None

    def _ids(self, text: str) -> tuple[int, ...]:
        found, failed = tokenise(self._tokenizer, {0: text})
        if failed:
            raise DataError(failed[0])
        prefix = () if self._chat_template else text_prefix(self._tokenizer, {0: text}, found)
        return with_prefix(self._tokenizer, prefix, found[0])

    def _after_answer(self, shown: Sequence[Message]) -> tuple[int, ...]:
        """Returns the tokens that follow the end token of an answer of ours when `shown` comes next."""
        problem: DataError | None = None
        for answer in self._answers(shown):
            try:
                return self._after_end([_message("user", _QUESTION), answer, *shown])
            except DataError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _answers(self, shown: Sequence[Message]) -> Iterator[Message]:
        """Yields answers that the messages could follow: calls of the tools that answer, one call, words."""
        results = [message for message in shown if message["role"] == "tool"]
        if results and self._chat_template:
            ids = [message.get("tool_call_id", call_id(number)) for number, message in enumerate(results)]
            names = [message.get("name", "tool") for message in results]
            yield _calling(list(zip(names, ids, strict=True)))
            if len(results) > 1:
                yield _calling([(names[0], ids[0])])
        yield _message("assistant", _ANSWER)

    def _after_end(self, conversation: Sequence[Message]) -> tuple[int, ...]:
        """Returns the tokens behind the end token of the one answer in a conversation."""
        if self._chat_template and is_mistral(self._tokenizer):
            token_ids = self._tokens(conversation)
            return token_ids[token_ids.index(self._tokenizer.eos_token_id) + 1 :]
        if not self._chat_template and not self._closing:
            return self._tokens(conversation[2:])
        text = self._written(conversation)
        _, answer, tail = text.partition(_ANSWER)
        if not answer:
            raise DataError("the chat template leaves out what the assistant says")
        end = self._end.search(tail)
        if end is None:
            raise DataError("the chat template puts no end token after an answer")
        start = text[: len(text) - len(tail) + end.end()]
        if self._head[0] != start:  # It is nearly always the same.
            self._head = start, self._ids(start)
        head, whole = self._head[1], self._ids(text)
        if whole[: len(head)] != head:
            raise DataError(
                f"the tokenizer makes one token of the end of an answer, {end[0]!r}, and what follows"
            )
        return whole[len(head) :]

    def _written(self, conversation: Sequence[Message]) -> str:
        if self._chat_template:
            return self._render(conversation)
        question, answer, *shown = (message["content"] for message in conversation)
        end = self._tokenizer.convert_ids_to_tokens(self._closing[-1]) if self._closing else ""
        return "".join((question, answer, end, *shown))


def _remembered(known: Newest[tuple[int, ...]], key: str, found: tuple[int, ...]) -> tuple[int, ...]:
    """Returns what was found, kept where it is short: 256 of 32k tokens would be 300 MB."""
    if len(found) <= KNOWN_TOKENS:
        known[key] = found
    return found


# --- Messages of our own ---


def _message(role: str, content: str) -> dict[str, Any]:
    named = {"name": "tool", "tool_call_id": call_id(0)} if role == "tool" else {}
    return {"role": role, "content": content, **named}


def _calling(calls: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Returns an answer that calls the tools of these names and ids, the last of them with _ANSWER."""
    written = [
        {
            "id": called,
            "type": "function",
            "function": {"name": name, "arguments": {"x": _ANSWER if number == len(calls) else ""}},
        }
        for number, (name, called) in enumerate(calls, start=1)
    ]
    return {"role": "assistant", "content": "", "tool_calls": written}


def _is_ours(said: Said) -> bool:
    return [call[:2] for call in said.calls] == [("tool", {"x": _ANSWER})]


def _as_user(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns messages without the role "tool": one of the user has what tools answer, one below the other,
    and what the user says then.
    """
    shown: list[dict[str, Any]] = []
    for message in messages:
        role = "user" if message["role"] == "tool" else message["role"]
        if shown and role == shown[-1]["role"] == "user":
            shown[-1]["content"] += "\n" + message["content"]
        else:
            shown.append({"role": role, "content": message["content"]})
    return shown


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def _difference(shown: str, written: str) -> str:
    """Returns where two texts begin to differ, in a few words."""
    place = next(
        (place for place, pair in enumerate(zip(shown, written, strict=False)) if pair[0] != pair[1]),
        min(len(shown), len(written)),
    )
    return f"{written[place : place + 30]!r} where {shown[place : place + 30]!r} was shown"


def _refusal(why: str) -> DataError:
    return DataError(f"the tokenizer's chat template cannot go on after an answer: {why}. {_REMEDY}.")
