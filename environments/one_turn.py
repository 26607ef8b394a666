"""The environment of a prompt and its answer, which is what a dataset of questions is."""

from __future__ import annotations

from typing import Any

from environments import Turn


class OneTurn:
    """Shows the prompt, and is over with the first answer, which the reward functions score.

    Example: `OneTurn().reset(prompt="1+1=")` is "1+1=", and `step("2")` is done.
    """

    def reset(self, **row: Any) -> str:
        """Returns the prompt of the row."""
        return str(row["prompt"])

    def step(self, action: str) -> Turn:
        """Ends the episode, whatever the answer is."""
        del action
        return Turn(observation="", done=True)
