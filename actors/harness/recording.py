"""What a harness has called, as the tokens of one sample.

    request --`ask`--> does it go on from something recorded?
        from where a conversation stands   its tokens go on
        from an earlier place of one       a further segment that begins with those tokens, shown, not sampled
        from nowhere                       a further segment, rendered from its first message
    Generation --`answer`--> its tokens are the segment's, sampled; the next request must bring its message

Only what was sampled here is sampled in the sample. An assistant's message counts as the one that was
answered when its role, text (but for white space around it) and calls are the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from actors.dialogue import Dialogue
from actors.episode import MAX_NEW_TOKENS, Ask, Generation, Trajectory
from actors.harness.chat import ApiError, ChatAnswer, ChatRequest, message_of
from actors.playing.played import MAX_SEQUENCE_TOKENS, MAX_TURNS, EpisodeLimits
from core.errors import DataError
from environments import ToolCall
from environments.tool_calls import Said, call_id

_Key: TypeAlias = tuple[Any, ...]


class Dialogues:
    """The dialogues of a policy, by the tools that requests show: `dialogues.of(request.tools)`."""

    _MOST = 64

    def __init__(
        self,
        tokenizer: Any,
        template_options: Mapping[str, Any] | None = None,
        chat_template: bool = True,
        *,
        end_ids: Sequence[int] = (),
    ) -> None:
        self._make = lambda tools: Dialogue(
            tokenizer, tools, template_options, chat_template, end_ids=end_ids
        )
        self._made: dict[str, Dialogue] = {}

    def of(self, tools: Sequence[Mapping[str, Any]]) -> Dialogue:
        """Returns the dialogue that shows these tools."""
        name = json.dumps(tools, sort_keys=True)
        found = self._made.pop(name, None)
        while len(self._made) >= self._MOST:
            del self._made[next(iter(self._made))]  # The one that was not asked for longest.
        self._made[name] = found = self._make(tools) if found is None else found
        return found


class _Segment:
    """A conversation in a context of its own.

    keys   its messages, as they are compared
    steps  its tokens in turn: shown, or as they were generated
    marks  after each answer, how many keys and how many steps there were; whether it ended in an end token
    """

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue = dialogue
        self.keys: list[_Key] = []
        self.steps: list[tuple[int, ...] | Generation] = []
        self.marks: list[tuple[int, int, bool]] = []

    @property
    def tokens(self) -> list[int]:
        """Returns all its tokens."""
        return [token for step in self.steps for token in _tokens(step)]


class _Open(NamedTuple):
    """A question that the engine has yet to answer: what becomes of the segment with the answer."""

    segment: _Segment
    is_new: bool
    keys: list[_Key]
    shown: tuple[int, ...]
    request: ChatRequest
    num_tokens: int


class Recording:
    """The calls of a sample's harness, one at a time: `ask(request)`, then `answer(generation)` or `drop()`.

    Of the limits, `max_turns` counts answers, and `max_sequence_tokens` bounds each segment. `too_long` says
    how long the last call was that left no room for an answer; "" where all had room.
    """

    def __init__(self, dialogues: Dialogues, limits: EpisodeLimits) -> None:
        self._dialogues, self._limits = dialogues, limits
        self._segments: list[_Segment] = []
        self._open: _Open | None = None
        self.num_asked = self.num_turns = self.num_tool_calls = self.num_sampled = 0
        self.limit = self.too_long = ""
        self.text = ""
        self.transcript: list[tuple[str, str]] = []

    def ask(self, request: ChatRequest) -> Ask | None:
        """Returns what the engine is to be asked; None where a limit leaves nothing to ask, and `limit` says
        which of the section `actors`.

        Raises ApiError where the chat template does not take the messages.
        """
        if self.num_turns >= self._limits.max_turns:
            self.limit = MAX_TURNS
            return None
        try:
            dialogue = self._dialogues.of(request.tools)
            self._open = opened = self._place_of(request, dialogue)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        tokens = [*([] if opened.is_new else opened.segment.tokens), *opened.shown]
        room = self._limits.max_sequence_tokens - len(tokens)
        if room < 1:
            self.limit, self._open = MAX_SEQUENCE_TOKENS, None
            self.too_long = (
                f"a call is {len(tokens)} tokens long, which leaves no room for an answer: "
                f"actors.max_sequence_tokens is {self._limits.max_sequence_tokens}"
            )
            return None
        self._open = opened._replace(num_tokens=len(tokens))
        self.num_asked += 1
        limit = min(room, self._limits.max_new_tokens, request.max_tokens or room)
        return Ask(tokens, self.num_asked - 1, limit, request.stop)

    def answer(self, generation: Generation) -> ChatAnswer:
        """Takes what the engine said, and returns what the harness is told."""
        opened, self._open = self._open, None
        assert opened is not None
        segment, request = opened.segment, opened.request
        if opened.is_new:
            self._segments.append(segment)
        answer = self._read(generation, segment.dialogue, opened)
        own = _key(message_of(answer))
        known = len(segment.keys)
        segment.keys = [*opened.keys, own]
        segment.steps += [opened.shown, generation]
        is_ended = segment.dialogue.is_ended(generation.tokens.numpy().tolist())
        segment.marks.append((len(segment.keys), len(segment.steps), is_ended))
        self.num_turns += 1
        self.num_tool_calls += len(answer.calls)
        self.num_sampled += len(generation.tokens)
        self.text = generation.text
        news = request.messages if opened.is_new else request.messages[known:]
        self.transcript += [*((message["role"], message["content"]) for message in news)]
        self.transcript.append(("assistant", generation.text))
        self._note_limit(generation, opened)
        return answer

    def drop(self) -> None:
        """Forgets the question: nobody waits for its answer."""
        self._open = None

    def cut_answer(self) -> ChatAnswer:
        """Returns what is answered when a limit leaves nothing to say."""
        return ChatAnswer("", (), "length", 0, 0)

    def trajectory(self) -> Trajectory:
        """Returns all segments, in the order in which they began."""
        whole = Trajectory()
        for number, segment in enumerate(self._segments):
            if number:
                whole.begin_segment(())
            for step in segment.steps:
                if isinstance(step, Generation):
                    whole.say(step)
                else:
                    whole.observe(step)
        return whole

    def _place_of(self, request: ChatRequest, dialogue: Dialogue) -> _Open:
        """Returns where the messages go on: at the longest beginning that was answered, or anew."""
        keys = [_key(message) for message in request.messages]
        best: tuple[_Segment, tuple[int, int, bool]] | None = None
        for segment in self._segments:
            for mark in segment.marks:
                count = mark[0]
                is_longer = best is None or count > best[1][0]
                if segment.dialogue is dialogue and is_longer and count < len(keys):
                    best = (segment, mark) if segment.keys[:count] == keys[:count] else best
        if best is None:
            return _Open(_Segment(dialogue), True, keys, dialogue.first(request.messages), request, 0)
        segment, (num_keys, num_steps, is_ended) = best
        shown = dialogue.continuation(request.messages[num_keys:], ended=is_ended)
        if num_keys == len(segment.keys):
            return _Open(segment, False, keys, shown, request, 0)
        before = tuple(token for step in segment.steps[:num_steps] for token in _tokens(step))
        return _Open(_Segment(dialogue), True, keys, before + shown, request, 0)

    def _read(self, generation: Generation, dialogue: Dialogue, opened: _Open) -> ChatAnswer:
        """Returns the answer: its text up to a stop text, and the calls, which are told only if all of them
        can be read.
        """
        request, tokens = opened.request, generation.tokens.numpy().tolist()
        said = dialogue.read(generation.text, tokens) if request.reads_calls else Said(generation.text)
        if any(call.problem for call in said.calls):
            said = Said(generation.text)
        content = said.text
        for stop in request.stop:
            content = content.partition(stop)[0]
        calls = tuple(
            ToolCall(call.name, call.arguments, "", call_id(self.num_tool_calls + number))
            for number, call in enumerate(said.calls)
        )
        logprobs: tuple[tuple[str, float], ...] = ()
        if request.has_logprobs:
            spelt = dialogue.spell(tokens)
            logprobs = tuple(zip(spelt, generation.logprobs.numpy().tolist(), strict=True))
        reason = "tool_calls" if calls else generation.finish_reason
        return ChatAnswer(content, calls, reason, opened.num_tokens, len(tokens), logprobs)

    def _note_limit(self, generation: Generation, opened: _Open) -> None:
        """Notes which limit of the run cut the answer, if one did and not the request's own."""
        self.limit = ""
        if generation.finish_reason == "length":
            num_sampled = len(generation.tokens)
            if opened.num_tokens + num_sampled >= self._limits.max_sequence_tokens:
                self.limit = MAX_SEQUENCE_TOKENS
            elif num_sampled >= self._limits.max_new_tokens:
                self.limit = MAX_NEW_TOKENS


def _tokens(step: tuple[int, ...] | Generation) -> Sequence[int]:
    return step.tokens.numpy().tolist() if isinstance(step, Generation) else step


def _key(message: Mapping[str, Any]) -> _Key:
    """Returns what of a message makes it the same message."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        calls.append((call["function"]["name"], json.dumps(arguments, sort_keys=True)))
    return (
        message["role"],
        (message.get("content") or "").strip(),
        tuple(calls),
        message.get("tool_call_id") if message["role"] == "tool" else None,
    )
