"""A game over several turns: the policy guesses a number, and is told whether the one sought is higher or
lower.

`environments: environments.guessing:Guessing?max_guesses=5`, for rows with an `answer`, the number; a
`prompt` may tell the rules, and where there is none the game tells them. The reward is 1 for the number, less
the more guesses it took, and 0 without it.
"""

from __future__ import annotations

import re
from typing import Any

from environments import Turn

_NUMBER = re.compile(r"-?\d+")


class Guessing:
    """One game. The last number that the policy says is its guess; one without a number counts as a guess."""

    def __init__(self, max_guesses: int = 7, low: int = 1, high: int = 100) -> None:
        self._max_guesses, self._low, self._high = max_guesses, low, high
        self.guesses: list[int | None] = []
        self._answer = 0

    def reset(self, answer: int | str, prompt: Any = None, **row: Any) -> str | None:
        """Begins the game; returns its rules where the row has no prompt that tells them."""
        self._answer = int(answer)
        if prompt is not None:
            return None
        return (
            f"I think of a number from {self._low} to {self._high}. You have {self._max_guesses} guesses. "
            "Answer with a number."
        )

    def step(self, text: str) -> Turn:
        """Tells what a guess was worth."""
        found = _NUMBER.findall(text)
        guess = int(found[-1]) if found else None
        self.guesses.append(guess)
        if guess == self._answer:
            return Turn("Right.", done=True, reward=1 - (len(self.guesses) - 1) / self._max_guesses)
        if len(self.guesses) == self._max_guesses:
            return Turn(f"No. It was {self._answer}.", done=True, reward=0.0)
        if guess is None:
            return Turn("That is no number.", done=False)
        return Turn("Higher." if guess < self._answer else "Lower.", done=False)
