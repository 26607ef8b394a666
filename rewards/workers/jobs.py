"""What a pool has in hand: groups that await their values, each with a job per function, and the calls that
come of it.

    AskedGroup --one per function--> FunctionJob --rewards/workers/search.py says which--> FunctionCall --> Queue of its kind
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from rewards.registry import WeightedReward
from rewards.scoring import CallFailed, Completions, Summand, call, read_answers, shorten
from rewards.workers.search import Attempt, Failed, Outcome, Verdict, search
from rewards.workers.worker import Request


class Values(NamedTuple):
    """What the functions of a pool say of a group: a Summand each, and what the completions vote for."""

    parts: list[Summand]
    votes: list[str | None] | None = None


class Function(NamedTuple):
    """A function of a pool: its place among those of a worker, its name in the config, its weight, whether it
    is `async def`, the limit of a call, and whether it is the one that is asked for votes. `here` is the
    function itself where it needs no worker.
    """

    place: int
    name: str
    weight: float
    is_async: bool
    limit_s: float
    votes: bool
    here: WeightedReward | None = None


class FunctionCall(NamedTuple):
    """One call to make: `position` is its place among those that its job waits for."""

    job: FunctionJob
    position: int
    ask: Attempt
    queued_s: float

    def request(self, number: int) -> Request:
        """Returns what a worker is sent."""
        function = self.job.function
        return Request(
            number, function.place, self.ask.places, function.limit_s, function.votes, self.job.group.payload
        )


class FunctionJob:
    """One function's values of one group."""

    def __init__(self, group: AskedGroup, function: Function) -> None:
        self.group, self.function = group, function
        self.results: list[Verdict | Failed] | None = None
        self._search = search(group.num_completions, function.limit_s)
        self._outcomes: list[Outcome | None] = []

    def begin(self) -> list[FunctionCall]:
        """Returns the first calls to make."""
        return self._calls(next(self._search))

    def settle(self, call: FunctionCall, outcome: Outcome) -> list[FunctionCall]:
        """Takes what became of a call, and returns the calls to make next; none while others are awaited, or
        when `results` are there.
        """
        self._outcomes[call.position] = outcome
        outcomes = [known for known in self._outcomes if known is not None]
        if len(outcomes) < len(self._outcomes):
            return []
        try:
            return self._calls(self._search.send(outcomes))
        except StopIteration as stopped:
            self.results = stopped.value
            return []

    def _calls(self, asks: Sequence[Attempt]) -> list[FunctionCall]:
        self._outcomes = [None] * len(asks)
        now_s = time.monotonic()
        return [FunctionCall(self, position, ask, now_s) for position, ask in enumerate(asks)]

    def answer_here(self, reward: WeightedReward, completions: Completions) -> None:
        """Makes all calls at once, in this process: they can fail, but neither hang nor crash."""
        calls = deque(self.begin())
        while calls:
            call = calls.popleft()
            asked = completions.chosen(call.ask.places)
            calls += self.settle(call, _outcome_of(reward, asked, self.function.votes))

    def part(self) -> Summand:
        """Returns the results as values; a failure is its reason."""
        assert self.results is not None
        values = [
            result.value if isinstance(result, Verdict) else shorten(result.reason) for result in self.results
        ]
        return Summand(self.function.name, self.function.weight, values)


def _outcome_of(reward: WeightedReward, completions: Completions, wants_votes: bool) -> Outcome:
    try:
        values = call(reward, completions)
    except CallFailed as error:
        return Failed("raised", str(error))
    votes = read_answers(reward, completions) if wants_votes else [None] * len(values)
    return [Verdict(*found) for found in zip(values, votes, strict=True)]


class AskedGroup:
    """A group that awaits its values; `future` gets them."""

    def __init__(self, num_completions: int, payload: bytes, future: Future[Values]) -> None:
        self.num_completions, self.payload, self.future = num_completions, payload, future
        self.submitted_s = time.monotonic()
        self.is_begun = False
        self.jobs: list[FunctionJob] = []

    @property
    def is_done(self) -> bool:
        """Returns whether every function has answered."""
        return all(job.results is not None for job in self.jobs)

    def values(self) -> Values:
        """Returns what the functions said."""
        votes = None
        for job in self.jobs:
            if job.function.votes:
                votes = [result.vote if isinstance(result, Verdict) else None for result in job.results or ()]
        return Values([job.part() for job in self.jobs], votes)

    def failures(self, kind: str) -> int:
        """Returns how many completions have no value because a call failed in this way."""
        failed = (result for job in self.jobs for result in job.results or () if isinstance(result, Failed))
        return sum(failure.kind == kind for failure in failed)


@dataclass
class Queue:
    """Calls of plain or of asynchronous functions, in the order in which they are to be made.

    room  completions that one worker may be asked about at once; 0: one call, whatever it is about
    """

    room: int
    calls: deque[FunctionCall] = field(default_factory=deque)

    def waited_s(self) -> float:
        """Returns for how long the next call has waited; 0 when there is none."""
        return time.monotonic() - self.calls[0].queued_s if self.calls else 0.0

    def take(self, held: Sequence[Attempt]) -> list[FunctionCall]:
        """Takes the calls that go to a worker which holds `held`."""
        asks, taken = list(held), []
        while self.calls and self._fits(self.calls[0].ask, asks):
            taken.append(self.calls.popleft())
            asks.append(taken[-1].ask)
        return taken

    def _fits(self, ask: Attempt, held: Sequence[Attempt]) -> bool:
        if not held:
            return True
        if ask.alone or any(other.alone for other in held):
            return False
        return len(ask.places) + sum(len(other.places) for other in held) <= self.room
