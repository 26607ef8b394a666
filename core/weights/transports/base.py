"""What a transport is, and what it is given to work with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.calls import Calls
from core.config import Config
from learner.policy.source import ZeroSource


@dataclass(frozen=True)
class Sender:
    """One learner rank, as a transport sees it.

    source   the policy's weights; iterating is collective: all ranks, in one order, to the end
    board    its handle; only rank 0 talks to it, and to actors
    store    puts a bucket where actors can fetch it and returns a reference (`ray.put`)
    tell     notes an event; never waits
    """

    rank: int
    config: Config
    source: ZeroSource
    board: Any
    calls: Calls
    store: Callable[[Any], Any]
    tell: Callable[[str], Any]


class Transport(ABC):
    """The learner's end of a road. All methods are called on all ranks, by one thread."""

    @abstractmethod
    def publish(self, version: int, *, evaluate: bool) -> None:
        """Bring the weights of now on their way as `version`; with `evaluate` they can also be fetched, and
        their evaluation begins.

        Collective. What it does before it returns is the learner's stall; the parameters may change as soon
        as it has. Raises PeerTimeout that names who did not answer; never for an actor, which is left behind
        and told about instead.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until what was published can be had by the actors. Raises what went wrong with it."""

    @abstractmethod
    def republish(self) -> None:
        """The board was started again: publish what it held once more (rank 0). From any thread;
        returns at once.
        """

    def metrics(self) -> dict[str, float]:
        """For the rows of metrics.jsonl; empty on ranks other than 0."""
        return {}


class NoTransport(Transport):
    """Before there is one: nothing was published."""

    def publish(self, version: int, *, evaluate: bool) -> None:
        raise AssertionError("nothing is published before the learner trains")

    def flush(self) -> None:
        pass

    def republish(self) -> None:
        pass
