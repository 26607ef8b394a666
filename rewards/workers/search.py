"""How the completions of a group get their values from one function when a call of it fails: pure, as a
generator that is told what became of its calls.

    all of them together -> answered: that is it
      fails              -> each alone: what fails costs itself
                            -> the others together, since a function may compare them: these values count

A call that lost its worker (it hung, crashed, took too much memory) may lose the next one too. So they are
alone one after the other, and after MAX_LOST workers, or SEARCH_LIMITS times the limit of a call, the search
is given up: what was not asked alone is an error by the first call's reason. Where a call shared its worker
with others, any of them may be the cause: it is made once more without company.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from rewards.scoring import Value

MAX_LOST = 3
SEARCH_LIMITS = 4.0
FailureKind: TypeAlias = Literal["raised", "timeout", "crash"]


class Attempt(NamedTuple):
    """A call to be made, for the completions at these places; `alone` keeps others out of its worker."""

    places: tuple[int, ...]
    alone: bool = False


class Verdict(NamedTuple):
    """A function's value of one completion, and what the completion votes for where the function can tell."""

    value: Value
    vote: str | None = None


class Failed(NamedTuple):
    """A call without an answer.

    lost      whether its worker had to be killed, or died
    shared    whether that worker held other calls
    hopeless  whether another call would fail in the same way, whatever it is about
    """

    kind: FailureKind
    reason: str
    lost: bool = False
    shared: bool = False
    hopeless: bool = False


Outcome: TypeAlias = list[Verdict] | Failed
Search: TypeAlias = Generator[list[Attempt], Sequence[Outcome], list[Verdict | Failed]]


def search(num: int, limit_s: float, clock: Callable[[], float] = time.monotonic) -> Search:
    """Yields the calls to make next, is sent their outcomes in this order, and returns one result per
    completion. `limit_s` is the limit of one call.
    """
    everyone = tuple(range(num))
    first = yield from _ask(everyone)
    if isinstance(first, list):
        return [*first]
    if num == 1 or first.hopeless:
        return [first] * num
    give_up_s = clock() + SEARCH_LIMITS * limit_s
    found = yield from (_one_by_one(everyone, give_up_s, clock) if first.lost else _at_once(everyone))
    rest = tuple(place for place in everyone if isinstance(found.get(place), Verdict))
    if len(rest) > 1:
        again = yield from _ask(rest, alone=first.lost)
        if isinstance(again, Failed) and rest == everyone:
            remedy = (
                ""
                if again.kind == "raised"
                else f"; where {num} completions need longer, raise rewards.timeout_s"
            )
            again = again._replace(reason=f"{again.reason}, though not for any of them alone{remedy}")
        results = again if isinstance(again, list) else [again] * len(rest)
        found |= dict(zip(rest, results, strict=True))
    given_up = first._replace(
        reason=f"{first.reason}; given up after {MAX_LOST} of its group were lost, or as many limits"
    )
    return [found.get(place, given_up) for place in everyone]


def _ask(
    places: tuple[int, ...], alone: bool = False
) -> Generator[list[Attempt], Sequence[Outcome], Outcome]:
    (outcome,) = yield [Attempt(places, alone)]
    if isinstance(outcome, Failed) and outcome.shared:
        (outcome,) = yield [Attempt(places, alone=True)]
    return outcome


def _at_once(
    places: tuple[int, ...],
) -> Generator[list[Attempt], Sequence[Outcome], dict[int, Verdict | Failed]]:
    outcomes = yield [Attempt((place,)) for place in places]
    found = {}
    for place, outcome in zip(places, outcomes, strict=True):
        if isinstance(outcome, Failed) and outcome.shared:
            (outcome,) = yield [Attempt((place,), alone=True)]
        found[place] = _only(outcome)
    return found


def _one_by_one(
    places: tuple[int, ...], give_up_s: float, clock: Callable[[], float]
) -> Generator[list[Attempt], Sequence[Outcome], dict[int, Verdict | Failed]]:
    found: dict[int, Verdict | Failed] = {}
    num_lost = 0
    for place in places:
        if num_lost == MAX_LOST or clock() >= give_up_s:
            break
        (outcome,) = yield [Attempt((place,), alone=True)]
        found[place] = _only(outcome)
        num_lost += isinstance(outcome, Failed) and outcome.lost
    return found


def _only(outcome: Outcome) -> Verdict | Failed:
    return outcome if isinstance(outcome, Failed) else outcome[0]
