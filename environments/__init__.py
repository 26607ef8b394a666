"""An environment shows a policy something, takes what it says, and shows it more, until it is done.

    reset(row) --observation--> policy --action--> step(action) --Turn--> policy --action--> ...

One environment is one file of this folder. It speaks text: tokens are the concern of the actors
(actors/episode.py), which append an observation's tokens to the trajectory as tokens that were not sampled.
Neither Ray nor torch is imported here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Turn(NamedTuple):
    """An environment's answer to an action: `Turn("too high", done=False)`.

    observation  what the policy sees next; empty when nothing follows
    done         whether the episode is over
    reward       what the turn was worth; rewards of several turns add up. None: the reward functions score
                 the episode
    """

    observation: str
    done: bool
    reward: float | None = None


class Environment(Protocol):
    """One episode at a time. Runs act in `environments.one_turn.OneTurn`; docs/extending.md has an example of
    several turns, and says what is missing for one.
    """

    def reset(self, **row: Any) -> str:
        """Returns what the policy sees first; `row` has the columns of the dataset's row."""
        ...

    def step(self, action: str) -> Turn:
        """Returns what comes of it when the policy says `action`."""
        ...
