"""An episode of several turns: what the policy says goes to an environment, what it shows to the policy.

    place.reset --Turn--> dialogue.first ----> Ask --engine--> Generation --> dialogue.read --> place.act
                                                ^                                                  |
                                                `------------- dialogue.continuation <------Turn---'

It waits for one of the two at a time: while its environment works, its engine slot serves others. It is over
when the environment says so, fails, or a limit cuts it. What a limit cut is kept as it is, after the
environment was asked what it is worth (`place.finish`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, Protocol

from actors.episode import DEADLINE, MAX_NEW_TOKENS, Ask, Episode, Generation, Trajectory
from core.errors import DataError
from core.records import Sample
from core.sums import total
from core.users import pictures
from environments import EnvironmentFailure, Observation, ToolCall, Turn

MAX_TURNS, MAX_SEQUENCE_TOKENS = "max_turns", "max_sequence_tokens"


class Answered(Protocol):
    """What an answer says to others, and the tools it calls: environments/tool_calls.py has one."""

    @property
    def text(self) -> str:
        """Returns what it says."""
        ...

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Returns the calls."""
        ...


class Speech(Protocol):
    """How a conversation is written in tokens; `actors.dialogue.Dialogue` says more of each method."""

    def first(self, messages: Sequence[Mapping[str, Any]], observation: str = "") -> tuple[int, ...]:
        """Returns the tokens up to where the first answer begins."""
        ...

    def continuation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Returns the tokens from an answer's end up to where the next begins."""
        ...

    def read(self, text: str, tokens: Sequence[int] = ()) -> Answered:
        """Returns what an answer says."""
        ...


class Played(Protocol):
    """An open place of an environment; `environments.pool.Place` says more of each method."""

    def reset(self) -> Future[Turn]:
        """Begins."""
        ...

    def act(self, text: str, calls: tuple[ToolCall, ...] = ()) -> Future[Turn]:
        """Answers to what the policy said."""
        ...

    def finish(self) -> Future[Turn]:
        """Ends what a limit cut."""
        ...

    def close(self) -> None:
        """Frees the place."""


class EpisodeLimits(NamedTuple):
    """The limits of an episode: `max_turns` of the policy, `max_new_tokens` of each, `max_sequence_tokens` of
    all together, observations included.
    """

    max_turns: int
    max_new_tokens: int
    max_sequence_tokens: int


class PlayedEpisode(Episode):
    """An episode in a place of the environment called `name`, begun by its constructor."""

    def __init__(
        self,
        name: str,
        place: Played,
        speech: Speech,
        messages: Sequence[Mapping[str, Any]],
        limits: EpisodeLimits,
    ) -> None:
        super().__init__(())
        self.attributes = pictures.NOTHING  # Until it is over, should a limit cut it before.
        self._name, self._place, self._speech, self._limits = name, place, speech, limits
        self._messages = messages
        self._trajectory = Trajectory()
        self._transcript: list[tuple[str, str]] = []
        self._rewards: list[float] = []
        self._num_turns = self._num_asked = 0
        self._error: str | None = None
        self._waits_for: Literal["reset", "act", "finish"] = "reset"
        self._future: Future[Turn] | None = place.reset()
        self._since_s = time.monotonic()

    @property
    def futures(self) -> Sequence[Future[Turn]]:
        """Returns what is asked of the environment; empty while the engine is asked."""
        return () if self._future is None else (self._future,)

    @property
    def is_ready(self) -> bool:
        """Returns whether the environment has answered."""
        return self.is_over or (self._future is not None and self._future.done())

    @property
    def num_asked(self) -> int:
        """Returns how many questions for the engine it has had."""
        return self._num_asked

    def poll(self) -> Sequence[Ask]:
        """Takes what the environment answered; returns what the engine is to be asked then."""
        if self._future is None or not self._future.done():
            return ()
        future, self._future = self._future, None
        self.environment_s += time.monotonic() - self._since_s
        self.num_answers += 1
        try:
            turn = future.result()
            if turn.reward is not None and not math.isfinite(turn.reward):
                raise EnvironmentFailure("raised", f"its reward is {turn.reward}")
            return self._go_on(turn)
        except EnvironmentFailure as failure:
            self._fail(failure.kind, str(failure))
        except DataError as error:  # The chat template does not take what it shows.
            self._fail("raised", f"what it shows cannot be written: {error}")
        return ()

    def act(self, turn: int, generation: Generation) -> None:
        """Takes what the policy said, and lets the environment answer; a turn that was cut ends the
        episode.
        """
        del turn
        said = self._say(generation)
        if generation.finish_reason == "length":
            room = self._limits.max_sequence_tokens - self._trajectory.num_tokens
            self._cut(MAX_NEW_TOKENS if room > 0 else MAX_SEQUENCE_TOKENS)
        else:
            self._wait("act", self._place.act(said.text, said.calls))

    def end_late(self, said: Mapping[int, Generation]) -> None:
        """Cuts it at a deadline. The environment is asked what that is worth, unless it has yet to answer to
        something else: then it is over.
        """
        for generation in said.values():
            self._say(generation)
        if self._future is None and self._num_turns:
            self._cut(DEADLINE)
        else:
            if self._future is not None:
                self.note_silence(self._name)
            self.limit, self.is_over = self.limit or DEADLINE, True
            self._future = None  # What it answers now comes too late.

    def fail(self, text: str) -> None:
        """Ends it as an error, for what `text` says."""
        self._error, self.is_over, self._future = text, True, None

    def close(self) -> None:
        """Frees the place."""
        self._place.close()

    def sample(self) -> Sample | None:
        """Returns the conversation so far, with its error if it has one; None where the policy said nothing
        before a deadline.
        """
        if not self._trajectory.num_sampled and self._error is None:
            return None
        reward = total(self._rewards) if self._rewards and self._error is None else None
        return self._trajectory.sample(
            turns=self._num_turns,
            num_tool_calls=self.num_tool_calls,
            finish_reason="length" if self.limit else "stop",
            text=self._text,
            transcript=tuple(self._transcript),
            reward=reward,
            error=self._error,
        )

    def _say(self, generation: Generation) -> Answered:
        self._trajectory.say(generation)
        self._num_turns += 1
        self._text = generation.text
        self._transcript.append(("assistant", generation.text))
        said = self._speech.read(generation.text, generation.tokens.numpy().tolist())
        self.num_tool_calls += len(said.calls)
        return said

    def _go_on(self, turn: Turn) -> Sequence[Ask]:
        """Takes a turn of the environment: the policy speaks next, or the episode is over."""
        self.num_tool_errors += len(turn.tool_errors)
        if turn.reward is not None:
            self._add(turn.reward)
        if turn.attributes is not None:
            self.attributes = turn.attributes
        if self._waits_for == "finish" or (turn.done and self._num_turns):
            self.is_over = True
        elif self._num_turns == self._limits.max_turns:
            self._cut(MAX_TURNS)
        else:
            return self._observe(turn.observation)
        return ()

    def _add(self, reward: float) -> None:
        self._rewards.append(reward)
        if not math.isfinite(total(self._rewards)):
            told = ", ".join(f"{value:g}" for value in self._rewards[-4:])
            raise EnvironmentFailure("raised", f"its rewards add up to no finite number, the last: {told}")

    def _observe(self, observation: Observation) -> Sequence[Ask]:
        """Shows it to the policy, where that leaves room for an answer."""
        tokens = self._written(observation)
        room = self._limits.max_sequence_tokens - self._trajectory.num_tokens - len(tokens)
        if room < 1 and not self._num_turns:
            raise EnvironmentFailure(
                "raised",
                f"what it shows first is {len(tokens)} tokens long with its prompt, which leaves no room for an "
                f"answer: actors.max_sequence_tokens is {self._limits.max_sequence_tokens}",
            )
        if room < 1:
            self._cut(MAX_SEQUENCE_TOKENS)
            return ()
        self._trajectory.observe(tokens)
        self._transcript.extend(_shown(observation))
        self._num_asked += 1
        limit = min(self._limits.max_new_tokens, room)
        return (Ask(self._trajectory.tokens, self._num_asked - 1, limit),)

    def _written(self, observation: Observation) -> tuple[int, ...]:
        """Returns the tokens of what the environment shows."""
        begins = not self._num_turns
        if isinstance(observation, str):
            if begins:
                return self._speech.first(self._messages, observation)
            observation = ({"role": "user", "content": observation},)
        if begins:
            return self._speech.first((*self._messages, *observation))
        return self._speech.continuation(observation)

    def _wait(self, what: Literal["act", "finish"], future: Future[Turn]) -> None:
        self._waits_for, self._future, self._since_s = what, future, time.monotonic()

    def _cut(self, limit: str) -> None:
        """Ends it at a limit; the environment is asked what it is worth as it stands."""
        self.limit = limit
        self._wait("finish", self._place.finish())

    def _fail(self, kind: str, text: str) -> None:
        self.failure = kind
        self.fail(f"environment {self._name}: {text}")


def _shown(observation: Observation) -> Iterator[tuple[str, str]]:
    """Yields what a transcript has of an observation."""
    if isinstance(observation, str):
        if observation:
            yield "user", observation
        return
    for message in observation:
        yield str(message.get("role")), str(message.get("content"))
