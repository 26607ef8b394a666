"""What a policy acts in: an environment shows it something, takes what it says, and shows it more, until it is done.

    reset(row) --observation--> policy --action--> step(action) --Turn(observation, done, reward)--> policy ...

One environment is one file of this folder. It speaks text: tokens are the actors' concern (actors/episode.py), which append an
observation's tokens to the trajectory as tokens that were not sampled. Neither Ray nor torch is imported here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Turn(NamedTuple):
    """What an environment answers to an action.

    observation  what the policy sees next; empty when nothing follows
    done         whether the episode is over
    reward       what the turn was worth; None: the reward functions score the whole episode. Rewards of several turns add up
    """

    observation: str
    done: bool
    reward: float | None = None


class Environment(Protocol):
    """One episode at a time. What it raises makes the sample an error: a failure is never reward 0."""

    def reset(self, **row: Any) -> str:
        """What the policy sees first; `row` has the columns of the dataset's row."""
        ...

    def step(self, action: str) -> Turn:
        """What comes of it when the policy says `action`."""
        ...
