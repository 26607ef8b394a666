"""Rollout actors as the other end of vLLM's trainer engines: `VLLMWeightSyncClient`, which is structural,
over Ray.

    vLLM's trainer engine --init, start, update, finish--> ActorsClient --receive(verb, number, ...)--> actors/receiver.py

Each call goes to all members at once and is waited for; whoever fails or does not answer is named, taken out
and told to give up. What becomes of the others depends on the road: with NCCL (`coupled`) a transfer is
everybody's or nobody's.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from core.calls import Calls
from core.errors import AgroError, TrainingError

ANSWER_S = 20.0
"""An actor answers between two engine steps: the learner does not wait longer for one that has nothing
to do but that.
"""


class GroupBroken(AgroError, RuntimeError):
    """The transfer cannot go on with the members it began with; `ActorsClient.members` are those left."""


class ActorsClient:
    """See the module's docstring. Its four methods with vLLM's names are called by vLLM, not all from one
    thread.

    members    by name, the handles of those that take part
    failed     why, of those that did not answer or failed since `begin`; `declined` of those that said no
    failure    set when the transfer was broken off
    """

    def __init__(self, calls: Calls, limit_s: float, *, ranks_each: int, coupled: bool) -> None:
        """`limit_s`: of every wait; `ranks_each`: workers of one actor; `coupled`: see the module's
        docstring.
        """
        self._calls, self._limit_s, self._ranks_each, self._coupled = calls, limit_s, ranks_each, coupled
        self._asked: dict[str, Any] = {}
        self.number = time.time_ns()  # Above those of a learner that died: actors refuse what was broken off.
        self.members: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self.failure: Future[None] = Future()
        self.on_broken: Callable[[], None] = lambda: None
        self._version, self._probes = -1, dict[str, str]()

    def begin(self, members: Mapping[str, Any], version: int, probes: dict[str, str]) -> None:
        """A new transfer. `probes`: checksums of some parameters as sent, complete by the time of finish."""
        self.number += 1
        self.members, self._asked = dict(members), dict(members)
        self.declined, self.failure = {}, Future()
        self._version, self._probes = version, probes

    def greet(self) -> None:
        """Whether every loop answers. Raises GroupBroken."""
        self._ask("hello", min(ANSWER_S, self._limit_s))
        self._go_on_with_the_rest()

    # --- what vLLM calls ---

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect; each actor's workers come after those of the actors before it, and the learner is
        rank 0.
        """
        offsets = {name: 1 + index * self._ranks_each for index, name in enumerate(self.members)}
        known = "rank_offset" in init_info
        # Only a group has to meet.
        limit_s = self._limit_s if self._coupled else min(ANSWER_S, self._limit_s)
        self._ask(
            "init",
            limit_s,
            lambda name: ({**init_info, "rank_offset": offsets[name]} if known else init_info,),
        )
        self._go_on_with_the_rest()

    def start_weight_update(self) -> None:
        """The actors stand still from here on, between two engine steps. Raises GroupBroken before
        anything is sent.
        """
        self._ask("start", min(ANSWER_S, self._limit_s))
        self._go_on_with_the_rest()

    def update_weights(self, update_info: Any) -> None:
        """Receive; with NCCL in step with the broadcast."""
        self._ask("update", self._limit_s, lambda name: (update_info,))
        self._go_on_with_the_rest()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The new weights are in place once their probes are confirmed; who cannot is alone in that."""
        self._ask("finish", self._limit_s, lambda name: (self._version, self._probes))

    # --------------------------------------------------------------------------------------------------------------

    def break_off(self, reason: str) -> None:
        """Everybody that was asked gives up: with its old weights, or none where new ones have begun to
        arrive.
        """
        self._tell_to_abort(self._asked, reason)
        if not self.failure.done():
            self.failure.set_exception(GroupBroken(reason))
        self.on_broken()

    def _ask(
        self, verb: str, limit_s: float, arguments: Callable[[str], tuple[Any, ...]] = lambda name: ()
    ) -> None:
        """One order to all members; those that fail, decline or are late are no longer members."""
        asked = dict(self.members)
        calls = {
            name: self._calls.start(handle.receive.remote(verb, self.number, *arguments(name)), name)
            for name, handle in asked.items()
        }
        # With NCCL the others would wait without end for what the one that failed does no longer send or
        # take; until all has arrived.
        is_collective = self._coupled and verb != "finish"
        until = concurrent.futures.FIRST_EXCEPTION if is_collective else concurrent.futures.ALL_COMPLETED
        done, late = concurrent.futures.wait(calls.values(), limit_s, return_when=until)
        is_cut_short = is_collective and any(call.exception() is not None for call in done)
        for name, call in calls.items():
            if call in late and not is_cut_short:
                self.failed[name] = f"it did not answer `{verb}` within {limit_s:.0f} s"
            elif call in done and (error := call.exception()) is not None:
                self.failed[name] = f"`{verb}` failed: {_in_words(error)}"
            elif call in done and call.result():
                self.declined[name] = call.result()
        lost = {
            name: handle for name, handle in asked.items() if name in self.failed or name in self.declined
        }
        self._tell_to_abort(lost, "left out of this transfer")
        self.members = {name: handle for name, handle in asked.items() if name not in lost}

    def _go_on_with_the_rest(self) -> None:
        """Raises GroupBroken where there is none, or where the others cannot do without those that were
        lost.
        """
        if not self.members or (self._coupled and len(self.members) < len(self._asked)):
            lost = {**self.failed, **self.declined}
            reason = "; ".join(f"{name}: {lost[name]}" for name in self._asked if name in lost)
            self.break_off(reason)
            raise GroupBroken(reason)

    def _tell_to_abort(self, actors: Mapping[str, Any], reason: str) -> None:
        for name, handle in actors.items():
            self._calls.post(
                handle.receive.remote("abort", self.number, reason), name, "the end of a transfer of weights"
            )


def _in_words(error: BaseException) -> str:
    return (
        str(error).splitlines()[0] if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
    )
