"""An environment shows a policy something, takes what it says, and shows it more, until it is done.

    reset(row) --observation--> policy --action--> step(action) --Turn--> policy --action--> ...

Environments speak text and messages: tokens are the concern of the actors (actors/episode.py), which append
an observation's tokens to the trajectory as tokens that were not sampled. A user's class or function never
runs in an actor: `EnvironmentPool` runs it in processes that can be killed. A prompt and its answer need no
environment. Neither Ray nor torch is imported here.

    spec          says what an environment is, by a process of its own (describing, loading)
    pool          holds the places of open episodes, and completes their futures
    nursery       keeps the processes of one environment, as the pool sees them (wire: what passes between)
    tool_errors   warns of tools that fail at most calls
    template      has loaded an environment, starts its places and ends what is left of them
    place         is the life of a process in which episodes are played (acting: of one episode)
    tool_calls    reads the calls in what a policy said
    calculator, guessing, python_tool    are environments like users' own
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from core.errors import AgroError

Observation: TypeAlias = str | tuple[Mapping[str, Any], ...]
"""What a policy sees: text is what the user says, messages are what the chat template renders."""
FailureKind: TypeAlias = Literal["raised", "timeout", "crash", "memory", "closed"]
ToolErrorKind: TypeAlias = Literal["unparsable", "unknown", "arguments", "raised"]


class Turn(NamedTuple):
    """An environment's answer to an action: `Turn("too high", done=False)`.

    observation  what the policy sees next; empty when nothing follows
    done         whether the episode is over
    reward       what the turn was worth; rewards of several turns add up. None: the reward functions score
                 the episode
    attributes   the environment's public attributes when the episode was over, as `core.users.pictures` packs them
                 for reward functions that read `environments`; None before
    tool_errors  why tool calls of this turn gave no result; the policy was told in the observation
    last_error   what the last of them said, in one line; "" without any
    """

    observation: Observation
    done: bool
    reward: float | None = None
    attributes: bytes | None = None
    tool_errors: tuple[ToolErrorKind, ...] = ()
    last_error: str = ""


class ToolCall(NamedTuple):
    """A tool call as an actor read it from what the policy said: `ToolCall("add", {"a": 1, "b": 2})`.

    arguments  the arguments by name; None where they could not be read
    problem    why the call could not be read, for the policy to see; "" where it could
    id         the call's own id, which its result carries; "" where the policy's form has none
    """

    name: str
    arguments: dict[str, Any] | None
    problem: str = ""
    id: str = ""


class EnvironmentFailure(AgroError, RuntimeError):
    """An episode cannot go on, which makes its sample an error:
    `EnvironmentFailure("timeout", "step did not end within 60 s")`.

    kind  raised: its code raised, or broke the contract; timeout: it gave no answer in time; crash: its
          process died; memory: its process used more than it may; closed: its place or pool was closed
    text  one line that says what happened
    """

    def __init__(self, kind: FailureKind, text: str) -> None:
        super().__init__(kind, text)
        self.kind: FailureKind = kind
        self.text = text

    def __str__(self) -> str:
        """Returns the line alone."""
        return self.text
