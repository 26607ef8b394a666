"""The learner's ranks as one gang: one placement group, started together, and over when one of them is.

    waiting for placement --> loading (ranks meet, build the policy) --> training --> done: totals
                                  |                                        |
                                  '---- a call fails: who still answers? --'--> RankDied, or what a rank raised

As in the fleet nothing here waits: `poll` takes the answers that came, `tick` does what is due by the clock.
A gang that failed is not started again; learner.py makes another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import remove_placement_group

from core.causes import Cause, hung
from core.config import Config
from core.errors import PeerTimeout, PlacementError, TrainingError
from core.process_log import ProcessLog
from core.processes import (
    Whereabouts,
    answer,
    bundle_of,
    cause_of,
    could_not_start,
    is_placed,
    make_group,
    on_bundle,
    remote,
    shortage,
    threads,
    whereabouts,
)
from learner.worker import LearnerRank

State: TypeAlias = Literal["waiting for placement", "loading", "training", "done"]

PLACE_TIMEOUT_S = 180.0
DEATH_LOOK_S = 10.0
"""A rank whose process is gone is known at once; one that does not answer for so long, from a thread of its
own, hangs.
"""
WHO = "learner ranks"


class RankDied(TrainingError):
    """The process of a learner rank is gone or hangs, whatever the others then raised."""


@dataclass(frozen=True)
class DeadRank:
    """A rank that is gone, or hangs."""

    number: int
    cause: Cause
    where: Whereabouts | None

    @property
    def name(self) -> str:
        """The name of its log: `learner-rank-0`."""
        return rank_name(self.number)

    def __str__(self) -> str:
        """Says it in a sentence, with the last words."""
        verb = "does not answer" if self.cause.what == "hang" else f"died: {self.cause}"
        return f"learner rank {self.number} {verb}"


def rank_name(number: int) -> str:
    """The name of a rank's process, and of its log."""
    return f"learner-rank-{number}"


class LearnerGang:
    """One start of all ranks.

    state    how far it is; it keeps its state while a failure is looked into
    totals   what each rank's `train` returned, once it is done
    dead     the ranks that are gone, once RankDied was raised
    """

    def __init__(
        self,
        config: Config,
        pad_id: int,
        train_arguments: Sequence[Any],
        log_of: Callable[[str], ProcessLog],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`train_arguments` are those of `LearnerRank.train`; `log_of("learner-rank-0")` is where that rank
        writes.
        """
        learner = config.learner
        self._config, self._pad_id, self._train_arguments = config, pad_id, tuple(train_arguments)
        self._log_of, self._clock = log_of, clock
        self._timeout_s = config.run.timeout_s
        self._group = make_group([bundle_of(learner.num_cpus, learner.num_gpus)] * learner.ranks)
        self._ranks: list[Any] = []
        self._where: dict[int, Any] = {}  # By rank: a call, and then its answer.
        self._address: Any = None
        self._failure: TrainingError | None = None
        self._pings: list[Any] = []
        self._asked_s = 0.0
        self._enter("waiting for placement", [])
        self.totals: list[dict[str, float]] = []
        self.dead: list[DeadRank] = []

    def handles(self) -> dict[str, Any]:
        """Returns the ranks that exist as processes, by name."""
        return {rank_name(number): rank for number, rank in enumerate(self._ranks)}

    def poll(self) -> None:
        """Takes the answers that have come. Raises RankDied, or what a rank raised."""
        if self._pings:
            if not ray.wait(self._pings, num_returns=len(self._pings), timeout=0)[1]:
                self._conclude()
        elif self._calls:
            self._take_answers()

    def tick(self, now_s: float) -> None:
        """Does what is due at `now_s` of the clock. Raises PlacementError, PeerTimeout, RankDied, or what a
        rank raised.
        """
        if self._pings:
            if now_s - self._asked_s > DEATH_LOOK_S:
                self._conclude()
        elif self.state == "waiting for placement":
            self._place(now_s)
        elif self.state == "loading" and now_s - self._since_s > self._timeout_s:
            raise PeerTimeout(f"{WHO} did not answer within {self._timeout_s:.0f} s (run.timeout_s)")

    def request_stop(self) -> None:
        """Ends training in order after the step in progress."""
        for rank in self._ranks:
            rank.request_stop.remote()

    def republish(self) -> None:
        """Tells a board that was started again of the weights once more. Ranks that have not begun to train
        will publish anyway.
        """
        if self._ranks:
            self._ranks[0].republish.remote()

    def kill(self) -> None:
        """Ends the ranks at once and frees their place."""
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._group)

    # --- a start ---

    def _enter(self, state: State, calls: list[Any]) -> None:
        self.state, self._calls, self._since_s = state, calls, self._clock()

    def _place(self, now_s: float) -> None:
        if is_placed(self._group):
            self._create_ranks()
        elif now_s - self._since_s > PLACE_TIMEOUT_S:
            raise PlacementError(
                f"learner could not be placed in {PLACE_TIMEOUT_S:.0f} s: {shortage(self._group)}"
            )

    def _create_ranks(self) -> None:
        learner = self._config.learner
        for number in range(learner.ranks):
            placed = on_bundle(self._group, number, learner.num_cpus, learner.num_gpus)
            rank_class = remote(LearnerRank, self._log_of(rank_name(number)))
            # Two threads: one trains, the other is told to stop, or asked what the first is doing.
            options = rank_class.options(max_concurrency=2, runtime_env=threads(learner.num_cpus), **placed)
            rank = options.remote(number, self._config, self._pad_id)
            self._ranks.append(rank)
            self._where[number] = rank.__ray_call__.remote(whereabouts)
        self._address = self._ranks[0].address.remote()
        self._enter("loading", [self._address])

    def _take_answers(self) -> None:
        """Begins what comes next once all calls are answered; looks into a failure at once."""
        done, running = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
        try:
            answers = answer(list(done), WHO, self._timeout_s)
        except TrainingError as error:
            self._failure, self._asked_s = error, self._clock()
            self._pings = [rank.ping.remote() for rank in self._ranks]
            return
        if running:
            return
        if self._calls == [self._address]:
            self._calls = [rank.start.remote(answers[0]) for rank in self._ranks]
        elif self.state == "loading":
            self._enter("training", [rank.train.remote(*self._train_arguments) for rank in self._ranks])
        else:
            self.totals = [answer(call, WHO, self._timeout_s) for call in self._calls]  # By rank.
            self._enter("done", [])

    # --- an end ---

    def _conclude(self) -> None:
        """Raises RankDied with every rank that is gone, or with one that hangs; the failure when all answer.

        The others only lost their connection to it.
        """
        assert self._failure is not None
        answered, silent = ray.wait(self._pings, num_returns=len(self._pings), timeout=0)
        self.dead = [
            DeadRank(number, cause, self._whereabouts_of(number))
            for number, ping in enumerate(self._pings)
            if ping in answered and (cause := _cause_of_death(ping))
        ]
        if silent and not self.dead:
            number = self._pings.index(silent[0])
            cause = hung(f"it did not answer for {DEATH_LOOK_S:.0f} s")
            self.dead = [DeadRank(number, cause, self._whereabouts_of(number))]
        self._pings = []
        if self.dead:
            raise RankDied("\n".join(map(str, self.dead)))
        raise self._failure

    def _whereabouts_of(self, number: int) -> Whereabouts | None:
        try:
            return ray.get(self._where[number], timeout=0)
        except RayError:  # It died, or hung, before it had said so.
            return None


def _cause_of_death(ping: Any) -> Cause | None:
    """Why the process behind an answered ping is gone; None for one that lives, or could not start."""
    try:
        ray.get(ping)
    except RayActorError as error:
        return None if could_not_start(error) else cause_of(error)
    return None
