"""The learner's ranks as one gang: one placement group, started together, and over when one of them is.

    waiting for placement --> loading (ranks meet, build the policy) --> training --> done: totals

As in the fleet nothing here waits: `look` takes the gang as far as it can go. A gang that failed is not
started again; learner.py makes another one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import remove_placement_group

from core.config import Config
from core.errors import PeerTimeout, PlacementError, TrainingError
from core.processes import (
    answer,
    bundle_of,
    could_not_start,
    death_cause,
    is_placed,
    make_group,
    on_bundle,
    remote,
    shortage,
    threads,
)
from learner.worker import LearnerRank

State: TypeAlias = Literal["waiting for placement", "loading", "training", "done"]

PLACE_TIMEOUT_S = 180.0
DEATH_LOOK_S = 10.0
"""A rank whose process is gone is known at once; one that does not answer for so long, from a thread of
its own, hangs.
"""
WHO = "learner ranks"


class RankDied(TrainingError):
    """The process of a learner rank is gone or hangs, whatever the others then raised."""


class LearnerGang:
    """`state`; `totals` once it is done: what each rank's `train` returned."""

    def __init__(self, config: Config, pad_id: int, train_arguments: Sequence[Any]) -> None:
        """`train_arguments`: of `LearnerRank.train`."""
        learner = config.learner
        self._config, self._pad_id, self._train_arguments = config, pad_id, tuple(train_arguments)
        self._timeout_s = config.run.timeout_s
        self._group = make_group([bundle_of(learner.num_cpus, learner.num_gpus)] * learner.ranks)
        self._ranks: list[Any] = []
        self._address: Any = None
        self._enter("waiting for placement", [])
        self.totals: list[dict[str, float]] = []

    def handles(self) -> dict[str, Any]:
        """The ranks that exist as processes, by name."""
        return {f"learner rank {number}": rank for number, rank in enumerate(self._ranks)}

    def look(self) -> None:
        """One step further, where one can be taken. Raises PlacementError, PeerTimeout, or what a rank
        raised.
        """
        if self.state == "waiting for placement":
            self._place()
        elif self.state == "loading":
            self._load()
        elif self.state == "training":
            self._watch()

    def request_stop(self) -> None:
        """End training in order after the step in progress."""
        for rank in self._ranks:
            rank.request_stop.remote()

    def republish(self) -> None:
        """The board was started again: it is told of the weights once more. Ranks that have not begun
        to train will publish anyway.
        """
        if self._ranks:
            self._ranks[0].republish.remote()

    def kill(self) -> None:
        """End the ranks at once and free their place."""
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._group)

    def _enter(self, state: State, calls: list[Any]) -> None:
        self.state, self._calls, self._since_s = state, calls, time.monotonic()

    def _place(self) -> None:
        if is_placed(self._group):
            self._create_ranks()
        elif time.monotonic() - self._since_s > PLACE_TIMEOUT_S:
            raise PlacementError(
                f"learner could not be placed in {PLACE_TIMEOUT_S:.0f} s: {shortage(self._group)}"
            )

    def _create_ranks(self) -> None:
        learner = self._config.learner
        rank_class = remote(LearnerRank)
        for number in range(learner.ranks):
            placed = on_bundle(self._group, number, learner.num_cpus, learner.num_gpus)
            # Two threads: one trains, the other is told to stop, or asked what the first is doing.
            options = rank_class.options(max_concurrency=2, runtime_env=threads(learner.num_cpus), **placed)
            self._ranks.append(options.remote(number, self._config, self._pad_id))
        self._address = self._ranks[0].address.remote()
        self._enter("loading", [self._address])

    def _load(self) -> None:
        if not self._raise_failures():
            if time.monotonic() - self._since_s > self._timeout_s:
                raise PeerTimeout(f"{WHO} did not answer within {self._timeout_s:.0f} s (run.timeout_s)")
        elif self._calls == [self._address]:
            address = answer(self._address, "learner rank 0", self._timeout_s)
            self._calls = [rank.start.remote(address) for rank in self._ranks]
        else:
            answer(self._calls, WHO, self._timeout_s)
            self._enter("training", [rank.train.remote(*self._train_arguments) for rank in self._ranks])

    def _watch(self) -> None:
        if self._raise_failures():
            self.totals = answer(self._calls, WHO, self._timeout_s)
            self._enter("done", [])

    def _raise_failures(self) -> bool:
        """Raises what any rank raised, RankDied where that was a death; whether all calls are done."""
        done, running = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
        try:
            answer(list(done), WHO, self._timeout_s)
        except TrainingError as error:
            if dead := self._dead_ranks():
                raise RankDied(dead) from None
            raise error from None
        return not running

    def _dead_ranks(self) -> str | None:
        """Which ranks' processes are gone, and why, or one that hangs; None when all answer. The others
        only lost their connection.
        """
        pings = [rank.ping.remote() for rank in self._ranks]
        silent = ray.wait(pings, num_returns=len(pings), timeout=DEATH_LOOK_S)[1]
        deaths = []
        for number, ping in enumerate(pings):
            try:
                ray.get(ping, timeout=0)
            except RayActorError as error:
                if not could_not_start(error):
                    deaths.append(f"learner rank {number} died: {death_cause(error)}")
            except GetTimeoutError:
                continue
        if silent and not deaths:
            return f"learner rank {pings.index(silent[0])} does not answer"
        return "\n".join(deaths) or None
