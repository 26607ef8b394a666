"""Environments after TRL's convention, as its documentation shows them."""

from __future__ import annotations

import random


class Counter:
    """A counter that its tools move; what it counts to is the reward."""

    def __init__(self) -> None:
        self.count = 0
        self.steps: list[int] = []

    def reset(self, **kwargs) -> str | None:
        self.count = 0
        self.goal = kwargs.get("goal", 3)
        return f"Count to {self.goal}."

    def increment(self, step: int) -> int:
        """
        Increments the counter.

        Args:
            step: How far.

        Returns:
            The count.
        """
        if step > 9:
            raise ValueError("too far")
        self.count += step
        self.steps.append(step)
        return self.count

    def roll(self, sides: int = 6) -> str:
        """
        Rolls a die.

        Args:
            sides: How many sides it has.
        """
        return str(random.randint(1, sides))

    def get_reward(self) -> float:
        return float(self.count == self.goal)


def made_counter():
    """Makes one, as TRL's factories do."""
    return Counter()
