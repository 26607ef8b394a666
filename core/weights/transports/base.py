"""What a transport is, and what it is given to work with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from core.calls import Calls
from core.config import Config
from core.weights.board import BoardClient


class Parameter(NamedTuple):
    """Name as in the base's files, dtype on the wire and whole shape of one parameter, or of one buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the whole parameter in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ParameterSource(Protocol):
    """A policy's weights, as a transport takes them (`learner.policy.source.ZeroSource`).

    Iterating gives (name, whole tensor) of every parameter in the order of `metadata()`, a fresh pass each
    time. A pass is collective: all ranks make it, in one order, to the end. A tensor is valid only until the
    next is asked for.
    """

    @property
    def bucket_bytes(self) -> int:
        """The size of one bucket of gathered weights, in bytes; a larger parameter is one by itself."""
        ...

    def metadata(self) -> list[Parameter]:
        """What a pass yields. Nothing is gathered for it, and it is not collective."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    @property
    def largest_bytes(self) -> int:
        """What a buffer of one bucket must hold, in bytes."""
        ...


@dataclass(frozen=True)
class Sender:
    """One learner rank, as a transport sees it.

    source   gives the policy's weights; iterating is collective
    board    is asked by rank 0 alone, as actors are
    store    puts a bucket where actors can fetch it and returns a reference (`ray.put`)
    tell     notes an event, and never waits
    """

    rank: int
    config: Config
    source: ParameterSource
    board: BoardClient
    calls: Calls
    store: Callable[[Any], Any]
    tell: Callable[[str], Any]


class Transport(ABC):
    """The learner's end of a road. All methods are called on all ranks, by one thread."""

    @abstractmethod
    def publish(self, version: int, *, evaluate: Sequence[str]) -> None:
        """Brings the weights of now on their way as `version`. With suites to `evaluate` it on, they can also
        be fetched, and these evaluations begin.

        This is collective. What it does before it returns is the learner's stall; the parameters may change
        as soon as it has. Raises PeerTimeout that names who did not answer; never for an actor, which is left
        behind and told about.
        """

    @abstractmethod
    def flush(self) -> None:
        """Waits until what was published can be had by the actors. Raises what went wrong with it."""

    @abstractmethod
    def republish(self) -> None:
        """Publishes once more what the board held, which was started again (rank 0). Any thread may call it,
        and it returns at once.
        """

    def metrics(self) -> dict[str, float]:
        """Values for the rows of metrics.jsonl; none on ranks other than 0."""
        return {}


class NoTransport(Transport):
    """Stands where there is no transport yet: nothing was published."""

    def publish(self, version: int, *, evaluate: Sequence[str]) -> None:
        """Nobody calls it."""
        raise AssertionError("nothing is published before the learner trains")

    def flush(self) -> None:
        """Has nothing to wait for."""

    def republish(self) -> None:
        """Has nothing to publish again."""
