"""The learner's ranks as one gang: one placement group, started together, and over when one of them is.

    waiting for placement --> loading (ranks meet, build the policy) --> training --> done: totals
                                  |                                        |
                                  '---- a call fails: who still answers? --'--> RankDied, or what a rank raised

As in the fleet nothing here waits: `poll` takes the answers that came, `tick` does what is due by the clock.
A gang that failed is not started again; learner.py makes another one, in the same place: Ray itself looks for
what a lost node had of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from core.calls import Calls, Client, Pending, asks
from core.causes import Cause, hung
from core.config import Config
from core.errors import PeerTimeout, PlacementError, TrainingError
from core.process_log import ProcessLog
from core.processes import (
    Whereabouts,
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


class RankClient(Client):
    """A rank's process, as the driver sees it."""

    address = asks(LearnerRank.address)
    start = asks(LearnerRank.start)
    train = asks(LearnerRank.train)
    ping = asks(LearnerRank.ping)
    request_stop = asks(LearnerRank.request_stop)
    republish = asks(LearnerRank.republish)


class LearnerGang:
    """One start of all ranks.

    state    how far it is; it keeps its state while a failure is looked into
    totals   what each rank's `train` returned, once it is done
    dead     the ranks that are gone, once RankDied was raised
    place    its placement group
    """

    def __init__(
        self,
        config: Config,
        pad_id: int,
        train_arguments: Sequence[Any],
        log_of: Callable[[str], ProcessLog],
        calls: Calls,
        place: PlacementGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`train_arguments` are those of `LearnerRank.train`; `log_of("learner-rank-0")` is where that rank
        writes; `place` is what the gang before has kept.
        """
        learner = config.learner
        self._config, self._pad_id, self._train_arguments = config, pad_id, tuple(train_arguments)
        self._log_of, self._calls, self._clock = log_of, calls, clock
        self._timeout_s = config.run.timeout_s
        self._place_timeout_s = config.run.placement_timeout_s or PLACE_TIMEOUT_S
        bundles = [bundle_of(learner.reserved_cpus, learner.num_gpus)] * learner.ranks
        self.place = make_group(bundles) if place is None else place
        self._ranks: list[RankClient] = []
        self._where: list[Pending[Whereabouts]] = []
        self._address: Pending[tuple[str, int]] | None = None
        self._starting: list[Pending[None]] = []
        self._training: list[Pending[dict[str, float]]] = []
        self._failure: TrainingError | None = None
        self._pings: list[Pending[int]] = []
        self._asked_s = 0.0
        self._enter("waiting for placement")
        self.totals: list[dict[str, float]] = []
        self.dead: list[DeadRank] = []

    @property
    def wants_place(self) -> bool:
        """Says whether it waits for its place, or looks into a failure, which may be a lost node's."""
        return self.state == "waiting for placement" or bool(self._pings)

    def clients(self) -> dict[str, Client]:
        """Returns the ranks that exist as processes, by name."""
        return {rank_name(number): rank for number, rank in enumerate(self._ranks)}

    def poll(self) -> None:
        """Takes the answers that have come. Raises RankDied, or what a rank raised."""
        if self._pings:
            if all(ping.is_done() for ping in self._pings):
                self._conclude()
        elif self._ranks and self.state != "done":
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

    def request_stop(self, *, is_target_reached: bool = False) -> None:
        """Ends training in order after the step in progress; see `LearnerRank.request_stop`."""
        for rank in self._ranks:
            call = rank.request_stop(is_target_reached=is_target_reached)
            self._calls.post(call, "the order to stop")

    def republish(self) -> None:
        """Tells a board that was started again of the weights once more. Ranks that have not begun to train
        will publish anyway.
        """
        if self._ranks:
            self._calls.post(self._ranks[0].republish(), "the board's restart")

    def kill(self, *, keeps_place: bool = False) -> None:
        """Ends the ranks at once, and frees their place."""
        under_way: list[Pending[Any]] = [*self._starting, *self._training, *self._pings, *self._where]
        for pending in [*under_way, *([] if self._address is None else [self._address])]:
            pending.give_up()
        for rank in self._ranks:
            ray.kill(rank.handle)
        if not keeps_place:
            remove_placement_group(self.place)

    # --- a start ---

    def _enter(self, state: State) -> None:
        self.state, self._since_s = state, self._clock()

    def _place(self, now_s: float) -> None:
        if is_placed(self.place):
            self._create_ranks()
        elif now_s - self._since_s > self._place_timeout_s:
            raise PlacementError(
                f"learner could not be placed in {self._place_timeout_s:.0f} s: {shortage(self.place)}. Where the cluster "
                "adds nodes on demand, raise run.placement_timeout_s."
            )

    def _create_ranks(self) -> None:
        learner = self._config.learner
        for number in range(learner.ranks):
            placed = on_bundle(self.place, number, learner.reserved_cpus, learner.num_gpus)
            rank_class = remote(LearnerRank, self._log_of(rank_name(number)))
            # Two threads: one trains, the other is told to stop, or asked what the first is doing.
            options = rank_class.options(
                max_concurrency=2, runtime_env=threads(learner.reserved_cpus), **placed
            )
            rank = RankClient(options.remote(number, self._config, self._pad_id), f"learner rank {number}")
            self._ranks.append(rank)
            self._where.append(self._calls.start(rank.inside(whereabouts), math.inf))
        self._address = self._calls.start(self._ranks[0].address(), math.inf)  # `tick` limits loading.
        self._enter("loading")

    def _take_answers(self) -> None:
        """Begins what comes next once all calls are answered; looks into a failure at once."""
        assert self._address is not None
        under_way: list[Pending[Any]] = [self._address, *self._starting, *self._training]
        done = [call for call in under_way if call.is_done()]
        for error in [error for call in done if (error := call.error()) is not None]:
            if not isinstance(error, TrainingError):
                raise error
            self._failure, self._asked_s = error, self._clock()
            self._pings = [self._calls.start(rank.ping(), math.inf) for rank in self._ranks]
            return
        if len(done) < len(under_way):
            return
        if not self._starting:
            address = self._address.result()
            self._starting = [self._calls.start(rank.start(address), math.inf) for rank in self._ranks]
        elif not self._training:
            trained = [rank.train(*self._train_arguments) for rank in self._ranks]
            self._training = [self._calls.start(call, math.inf) for call in trained]
            self._enter("training")
        else:
            self.totals = [call.result() for call in self._training]  # By rank.
            self._enter("done")

    # --- an end ---

    def _conclude(self) -> None:
        """Raises RankDied with every rank that is gone, or with one that hangs; the failure when all answer.

        The others only lost their connection to it.
        """
        assert self._failure is not None
        self.dead = [
            DeadRank(number, cause, self._whereabouts_of(number))
            for number, ping in enumerate(self._pings)
            if ping.future.done() and (cause := _cause_of_death(ping, self._whereabouts_of(number)))
        ]
        silent = [number for number, ping in enumerate(self._pings) if not ping.future.done()]
        if silent and not self.dead:
            cause = hung(f"it did not answer for {DEATH_LOOK_S:.0f} s")
            self.dead = [DeadRank(silent[0], cause, self._whereabouts_of(silent[0]))]
        for ping in self._pings:
            ping.give_up()
        self._pings = []
        if self.dead:
            raise RankDied("\n".join(map(str, self.dead)))
        raise self._failure

    def _whereabouts_of(self, number: int) -> Whereabouts | None:
        """Where the rank runs; None where it died, or hung, before it had said so."""
        where = self._where[number]
        return where.result() if where.future.done() and where.error() is None else None


def _cause_of_death(ping: Pending[int], where: Whereabouts | None) -> Cause | None:
    """Why the process behind an answered ping, which was there, is gone; None for one that lives, or could
    not start.
    """
    error = ping.error()
    died = None if error is None else error.__cause__  # What Ray said.
    return cause_of(died, where) if isinstance(died, RayActorError) and not could_not_start(died) else None
