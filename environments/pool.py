"""Runs environments in processes that can be killed: whatever an episode does, its future gets an answer, and
nothing here waits.

    place = pool.open("game", row, seed)
    place.reset() --> Future[Turn]     place.act(text, calls) --> Future[Turn] ... until `done`     place.close()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from environments import ToolCall, Turn
from environments.spec import EnvironmentSpec


class Place:
    """The place where one episode lives, from `EnvironmentPool.open` to `close`. One question at a time: the
    next may be asked when the future of the last is done.

    The exception of a future is always an EnvironmentFailure, after which only `close` is of use. Futures are
    completed by the pool's own thread: whoever adds callbacks must not wait in them.
    """

    def reset(self) -> Future[Turn]:
        """Begins the episode. The turn's observation is the text to add to the row's last user message, or
        the first user message where the row has none; "" is nothing.
        """
        raise NotImplementedError

    def act(self, text: str, calls: tuple[ToolCall, ...] = ()) -> Future[Turn]:
        """Lets the environment answer to what the policy said. An environment with tools runs the calls in
        turn; without any the episode is over.
        """
        raise NotImplementedError

    def finish(self) -> Future[Turn]:
        """Ends an episode that a limit cut: a Turn that is done, with the reward that the environment gives
        it as it stands, and its attributes.
        """
        raise NotImplementedError

    def run(self, base_url: str, api_key: str, model: str = "policy") -> Future[Turn]:
        """Runs a harness to its end: a Turn that is done, with the reward that it returned. It is asked once,
        in place of `reset` and `act`.
        """
        raise NotImplementedError

    def pause(self) -> None:
        """Stops the clock of `turn_timeout_s` until as many calls of `resume`: a harness waits for the engine
        and is not to blame.
        """
        raise NotImplementedError

    def resume(self) -> None:
        """Starts the clock again, from 0."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the episode and frees its process; what is still asked fails as `closed`. A second call does
        nothing.
        """
        raise NotImplementedError


class EnvironmentPool:
    """The places of all open episodes of an actor.

        with EnvironmentPool(describe(paths).values(), turn_timeout_s=60, memory_bytes=2**32) as pool:
            place = pool.open("game", {"prompt": "..."}, seed=7)

    turn_timeout_s  the limit for one answer of an environment
    memory_bytes    what the process of a place and its children may use together
    """

    def __init__(self, specs: Iterable[EnvironmentSpec], turn_timeout_s: float, memory_bytes: int) -> None:
        raise NotImplementedError(f"{specs}, {turn_timeout_s}, {memory_bytes}")

    def open(self, name: str, row: Mapping[str, Any], seed: int) -> Place:
        """Returns a place for an episode of the environment `name`; `row` has the dataset's columns.

        An episode that is opened again with the same row and seed plays the same, where its environment draws
        from `random` or numpy.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Kills all processes within 2 s; open futures fail as `closed`."""
        raise NotImplementedError

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
