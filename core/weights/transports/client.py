"""Rollout actors as the other end of vLLM's trainer engines: `VLLMWeightSyncClient`, which is structural,
over Ray.

    vLLM's trainer engine --init, start, update, finish--> ActorsClient --receive(verb)--> actors/receiver.py

Each call goes to all members at once and is waited for; whoever fails or does not answer is named, taken out
and told to give up. What becomes of the others depends on the road: with NCCL (`coupled`) a transfer is
everybody's or nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from core.calls import Calls, settle
from core.errors import AgroError, TrainingError
from core.weights.board import ReceiverClient

ANSWER_S = 20.0
"""An actor answers between two engine steps: the learner does not wait longer for one that has nothing
to do but that.
"""


class GroupBroken(AgroError, RuntimeError):
    """The transfer cannot go on with the members it began with; `ActorsClient.members` are those left."""


class ActorsClient:
    """See the module's docstring. Its four methods with vLLM's names are called by vLLM, not all from one
    thread.

    members    are those that take part, by name
    failed     says why, of those that did not answer or failed since `begin`; `declined` of those that said
               no
    failure    is set when the transfer was broken off
    """

    def __init__(self, calls: Calls, timeout_s: float, *, ranks_each: int, coupled: bool) -> None:
        """`timeout_s` ends every wait, `ranks_each` is how many workers an actor has, and `coupled` is told
        of above.
        """
        self._calls, self._timeout_s, self._ranks_each, self._coupled = calls, timeout_s, ranks_each, coupled
        self._asked: dict[str, ReceiverClient] = {}
        self.number = time.time_ns()  # Above those of a learner that died: actors refuse what was broken off.
        self.members: dict[str, ReceiverClient] = {}
        self.failed: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self.failure: Future[None] = Future()
        self.on_broken: Callable[[], None] = lambda: None
        self._version, self._probes = -1, dict[str, str]()

    def begin(self, members: Mapping[str, ReceiverClient], version: int, probes: dict[str, str]) -> None:
        """Begins a new transfer. `probes` are checksums of some parameters as sent, complete by the time of
        finish.
        """
        self.number += 1
        self.members, self._asked = dict(members), dict(members)
        self.declined, self.failure = {}, Future()
        self._version, self._probes = version, probes

    def greet(self) -> None:
        """Asks whether every loop answers. Raises GroupBroken."""
        self._ask("hello", min(ANSWER_S, self._timeout_s))
        self._go_on_with_the_rest()

    # --- what vLLM calls ---

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Has all connect; each actor's workers come after those of the actors before it, and the learner is
        rank 0.
        """
        offsets = {name: 1 + index * self._ranks_each for index, name in enumerate(self.members)}
        known = "rank_offset" in init_info
        # Only a group has to meet.
        timeout_s = self._timeout_s if self._coupled else min(ANSWER_S, self._timeout_s)
        self._ask(
            "init",
            timeout_s,
            lambda name: ({**init_info, "rank_offset": offsets[name]} if known else init_info,),
        )
        self._go_on_with_the_rest()

    def start_weight_update(self) -> None:
        """Has the actors stand still from here on, between two engine steps. Raises GroupBroken before
        anything is sent.
        """
        self._ask("start", min(ANSWER_S, self._timeout_s))
        self._go_on_with_the_rest()

    def update_weights(self, update_info: Any) -> None:
        """Has the actors receive; with NCCL in step with the broadcast."""
        self._ask("update", self._timeout_s, lambda name: (update_info,))
        self._go_on_with_the_rest()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Has the new weights put in place, once their probes are confirmed; who cannot is alone in that."""
        self._ask("finish", self._timeout_s, lambda name: (self._version, self._probes))

    def break_off(self, reason: str) -> None:
        """Has everybody that was asked give up: with its old weights, or none where new ones have begun to
        arrive.
        """
        self._tell_to_abort(self._asked, reason)
        if not self.failure.done():
            self.failure.set_exception(GroupBroken(reason))
        self.on_broken()

    def _ask(
        self, verb: str, timeout_s: float, arguments: Callable[[str], tuple[Any, ...]] = lambda name: ()
    ) -> None:
        """Gives one order to all members; those that fail, decline or are late are no longer members."""
        asked = dict(self.members)
        answers = {
            name: self._calls.start(actor.receive(verb, self.number, *arguments(name)), timeout_s)
            for name, actor in asked.items()
        }
        # With NCCL the others would wait without end for what the one that failed does no longer send or
        # take; until all has arrived.
        is_collective = self._coupled and verb != "finish"
        settle(answers.values(), timeout_s, until="first failure" if is_collective else "all")
        done = {name for name, answer in answers.items() if answer.future.done()}
        errors = {name: error for name in done if (error := answers[name].error()) is not None}
        is_cut_short = is_collective and bool(errors)
        for name, answer in answers.items():
            if name in errors:
                self.failed[name] = f"`{verb}` failed: {_in_words(errors[name])}"
            elif name in done and (reason := answer.result()):
                self.declined[name] = reason
            elif name not in done:
                answer.give_up()
                if not is_cut_short:
                    self.failed[name] = f"it did not answer `{verb}` within {timeout_s:.0f} s"
        lost = {name: actor for name, actor in asked.items() if name in self.failed or name in self.declined}
        self._tell_to_abort(lost, "left out of this transfer")
        self.members = {name: actor for name, actor in asked.items() if name not in lost}

    def _go_on_with_the_rest(self) -> None:
        """Raises GroupBroken where there is none, or where the others cannot do without those that were
        lost.
        """
        if not self.members or (self._coupled and len(self.members) < len(self._asked)):
            lost = {**self.failed, **self.declined}
            reason = "; ".join(f"{name}: {lost[name]}" for name in self._asked if name in lost)
            self.break_off(reason)
            raise GroupBroken(reason)

    def _tell_to_abort(self, actors: Mapping[str, ReceiverClient], reason: str) -> None:
        for actor in actors.values():
            self._calls.post(actor.receive("abort", self.number, reason), "the end of a transfer of weights")


def _in_words(error: BaseException) -> str:
    if isinstance(error, TrainingError):
        return str(error).splitlines()[0]
    return f"{type(error).__name__}: {error}"
