"""Environments in this process, which answer when and what a test wants: for the actor's loop and its
episodes without a user's process and without a tokenizer.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias

from actors.playing.player import Player
from environments import EnvironmentFailure, ToolCall, Turn

Outcome: TypeAlias = Turn | EnvironmentFailure
FIRST_DIGIT, OTHER = 3, 14
"""Of the simulated engine's tokens, which says digits, and of everything else."""


class Asked(NamedTuple):
    """A question to a place: `what` is reset, act or finish; `turn` counts what the policy has said, `place`
    the places that were opened before this one.
    """

    what: str
    turn: int
    text: str
    seed: int
    row: Mapping[str, Any]
    place: int = 0


Behaviour: TypeAlias = Callable[[Asked], tuple[float, Outcome]]
"""How long the answer takes, in seconds, and what it is."""


class ScriptedPlace:
    """A place that answers as `behave` says, from a thread of its own."""

    def __init__(self, behave: Behaviour, row: Mapping[str, Any], seed: int, number: int = 0) -> None:
        self._behave, self.row, self.seed, self.number = behave, row, seed, number
        self.asked: list[Asked] = []
        self.is_closed = False
        self._num_said = 0
        self._open: Future[Turn] | None = None

    def reset(self) -> Future[Turn]:
        return self._ask("reset")

    def act(self, text: str, calls: tuple[ToolCall, ...] = ()) -> Future[Turn]:
        self._num_said += 1
        return self._ask("act", text)

    def finish(self) -> Future[Turn]:
        return self._ask("finish")

    def close(self) -> None:
        self.is_closed = True
        if self._open is not None and not self._open.done():
            self._complete(self._open, EnvironmentFailure("closed", "its place was closed"))

    def _ask(self, what: str, text: str = "") -> Future[Turn]:
        assert not self.is_closed, "a closed place is asked"
        assert self._open is None or self._open.done(), "one question at a time"
        self.asked.append(Asked(what, self._num_said, text, self.seed, self.row, self.number))
        delay_s, outcome = self._behave(self.asked[-1])
        self._open = Future()
        if delay_s == 0:
            self._complete(self._open, outcome)
        else:
            timer = threading.Timer(delay_s, self._complete, (self._open, outcome))
            timer.daemon = True
            timer.start()
        return self._open

    @staticmethod
    def _complete(future: Future[Turn], outcome: Outcome) -> None:
        try:
            if isinstance(outcome, EnvironmentFailure):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        except concurrent.futures.InvalidStateError:
            pass  # Its place was closed meanwhile.


class ScriptedPlaces:
    """All places that were opened, in their order; `most_open` were open at once."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self.places: list[ScriptedPlace] = []
        self.most_open = 0

    def open(self, name: str, row: Mapping[str, Any], seed: int) -> ScriptedPlace:
        self.places.append(ScriptedPlace(self._behave, row, seed, len(self.places)))
        self.most_open = max(self.most_open, self.num_open)
        return self.places[-1]

    def turn(self) -> None:
        pass

    def wait(self, futures: Iterable[Future[Any]], timeout_s: float) -> None:
        Player().wait(futures, timeout_s)

    def close(self) -> None:
        for place in self.places:
            place.close()

    @property
    def num_open(self) -> int:
        return sum(not place.is_closed for place in self.places)


class Said(NamedTuple):
    """An answer as it is, without calls unless it begins with a 7: those have one for each 7."""

    text: str
    calls: tuple[ToolCall, ...] = ()


class DigitSpeech:
    """Writes every digit as the simulated engine does, and every other character as one token."""

    def first(self, messages: Sequence[Mapping[str, Any]], observation: str = "") -> tuple[int, ...]:
        return self.continuation([*messages, {"content": observation}])

    def continuation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        text = "".join(str(message["content"]) for message in messages)
        return tuple(FIRST_DIGIT + int(char) if char.isdigit() else OTHER for char in text)

    def read(self, text: str, tokens: Sequence[int] = ()) -> Said:
        return Said(text, tuple(ToolCall("seven", {}) for char in text if char == "7"))


def turns(
    number: int, reward: float | None = 1.0, delay_s: float = 0.0, shown: str = "4", first: str = "1"
) -> Behaviour:
    """A behaviour of so many turns, with a reward at the end."""

    def behave(asked: Asked) -> tuple[float, Turn]:
        if asked.what == "finish":
            return delay_s, Turn("", True, 0.0)
        done = asked.turn == number
        if asked.what == "reset":
            return delay_s, Turn(first, False)
        return delay_s, Turn("", True, reward) if done else Turn(shown, False)

    return behave
