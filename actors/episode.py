"""A sample that is being generated: what the policy has seen and said so far, and what the engine is asked
next.

    what was shown --`observe`: tokens, not sampled--+--> `Trajectory` --Ask--> engine --Generation--+
                                                     ^                                               |
                                                     `-- `say`: tokens, sampled, never tokenised again

Tokens in, tokens out. An `Episode` is a prompt and its answer, which is all that runs without environments
have; actors/playing/played.py has the episodes of several turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from core.arrays import Bits, Float32s, Int32s
from core.records import Sample, VersionSpan

MAX_NEW_TOKENS, DEADLINE = "max_new_tokens", "straggler_timeouts_s"


class Generation(NamedTuple):
    """The tokens that an engine sampled for one request. `version_spans` count them from 0; `text` is what
    they say.
    """

    tokens: Int32s
    logprobs: Float32s
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    text: str


class Ask(NamedTuple):
    """What an episode asks of the engine: to go on from `tokens`.

    turn        counts the questions of an episode from 0; with the item's seed and the sample's number it
                gives the seed
    max_tokens  may be sampled; None: `actors.max_new_tokens`
    stop        texts that end the answer, besides an end token
    """

    tokens: Sequence[int]
    turn: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


class Trajectory:
    """The tokens of an open sample. Example: `Trajectory([5, 6])`, then `say(generation)`, `observe([7])`."""

    def __init__(self, first: Sequence[int] = ()) -> None:
        """Begins with `first`, the tokens of what the policy sees first."""
        self.num_tokens = self.num_sampled = 0
        self._pieces: list[Int32s] = []
        self._lengths: list[int] = []  # Of what was not sampled and what was, in turn: the runs of the mask.
        self._logprobs: list[Float32s] = []
        self._spans: list[VersionSpan] = []
        self._segments: list[int] = []
        self.finish_reason = ""
        self.observe(first)

    @property
    def tokens(self) -> list[int]:
        """Returns all tokens so far, of all segments."""
        return [token for piece in self._pieces for token in piece.numpy().tolist()]

    def observe(self, tokens: Sequence[int]) -> None:
        """Appends the tokens of what the policy is shown; they are not sampled."""
        self._append(Int32s.of(tokens), is_sampled=False)

    def say(self, generation: Generation) -> None:
        """Appends what the policy said."""
        start = self.num_sampled
        self._append(generation.tokens, is_sampled=True)
        self._logprobs.append(generation.logprobs)
        for span in generation.version_spans:
            self._spans.append(VersionSpan(span.version, start + span.start, start + span.end))
        self.finish_reason = generation.finish_reason

    def begin_segment(self, first: Sequence[int]) -> None:
        """Begins a context of its own, which sees nothing of what was before it."""
        self._segments.append(self.num_tokens)
        self.observe(first)

    def sample(self, **rest: Any) -> Sample:
        """Returns the trajectory as it is now; `rest` are the other fields of the sample."""
        return Sample(
            tokens=Int32s.joined(self._pieces),
            is_sampled=Bits.runs(*self._lengths),
            logprobs=Float32s.joined(self._logprobs),
            version_spans=tuple(self._spans),
            segments=tuple(self._segments),
            **rest,
        )

    def _append(self, tokens: Int32s, *, is_sampled: bool) -> None:
        count = len(tokens)
        self._pieces.append(tokens)
        self.num_tokens += count
        if is_sampled:
            self.num_sampled += count
        if len(self._lengths) % 2 == is_sampled:  # The next run is one of this kind.
            self._lengths.append(count)
        else:
            self._lengths[-1] += count


class Episode:
    """One open sample. This one is a prompt and its answer: `Episode([5, 6])`, whose `poll` has one question
    for the engine, `act(0, generation)`, `sample()`. Those of several turns go on from there.

    is_over             whether nothing is asked of anybody any more
    failure             why an environment ended it, one of its kinds of failure; "" if none did
    silence             which environment had not answered when a deadline ended it, and at which setting; "" if
                        none was silent
    limit               the setting that cut it, a name of the section `actors`; "" where none did
    num_tool_calls, num_tool_errors     tool calls, and those that gave no result
    attributes          what reward functions may see of its environment, packed
    environment_s, num_answers          seconds that it waited for its environment, and for how many answers
    """

    is_over = False
    failure = silence = limit = ""
    num_tool_calls = num_tool_errors = num_answers = 0
    environment_s = 0.0
    attributes: bytes | None = None

    def __init__(self, first: Sequence[int]) -> None:
        self._first, self._trajectory = first, Trajectory(first)
        self._is_asked = False
        self._text = ""

    @property
    def futures(self) -> Sequence[Future[Any]]:
        """Returns what it waits for besides the engine; empty while it waits for the engine alone."""
        return ()

    @property
    def is_ready(self) -> bool:
        """Returns whether something that it waits for is there, for `poll` to take."""
        return self.is_over

    @property
    def num_asked(self) -> int:
        """Returns how many questions for the engine it has had."""
        return int(self._is_asked)

    @property
    def num_sampled(self) -> int:
        """Returns how many tokens the policy has said."""
        return self._trajectory.num_sampled

    def poll(self) -> Sequence[Ask]:
        """Takes answers that came; returns what the engine is to be asked now."""
        if self._is_asked:
            return ()
        self._is_asked = True
        return (Ask(self._first),)

    def act(self, turn: int, generation: Generation) -> None:
        """Takes what the engine answered to the question `turn`."""
        del turn
        self._trajectory.say(generation)
        self._text = generation.text
        if generation.finish_reason == "length":
            self.limit = MAX_NEW_TOKENS
        self.is_over = True

    def end_late(self, said: Mapping[int, Generation]) -> None:
        """Ends it at a deadline, with what it had said by then to each question; the engine has nothing of it
        any more.
        """
        for generation in said.values():
            self._trajectory.say(generation)
            self._text = generation.text
        self.is_over = True

    def note_silence(self, name: str) -> None:
        """Notes that a deadline ended it while its environment `name` had yet to answer. What it said is
        kept: reward functions may score it without the environment.
        """
        self.failure, self.silence = "timeout", f"environment {name}: had not answered at actors.{DEADLINE}"

    def fail(self, text: str) -> None:
        """Ends it without anything to keep, for what `text` says."""
        del text
        self.is_over = True

    def close(self) -> None:
        """Frees whatever it has a place in."""

    def sample(self) -> Sample | None:
        """Returns what is kept of it; None where that is nothing."""
        if not self._trajectory.num_sampled:
            return None
        return self._trajectory.sample(finish_reason=self._trajectory.finish_reason, text=self._text)
