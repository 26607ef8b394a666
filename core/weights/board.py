"""The board: the one place rollout actors look at between engine steps. An asyncio class; a run wraps it as a
Ray actor.

    learner  --publish(version)-->  board  <--poll(actor, version)--  actors: newest snapshot, items, or retire
                                      |   <--finish(evaluated)------
                                      `--Evaluation--> monitor

Snapshots: references to immutable buckets. The newest `KEEP` are held, besides those an evaluation still
needs.

Evaluations: each is of one suite at one policy version. An actor handed its items loads exactly that version
and takes no update until they are done; training goes on meanwhile. While it evaluates it may take more items
of that version, of any suite. Items of an actor that dies are handed out again.

A board that dies is started again, empty: the driver tells it what is done and who ends (`restore`), the
learner publishes again what it held, with the evaluations that were open, and actors whose directives come
from another board than before join again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from core.calls import Client, asks
from core.config import RunConfig
from core.evaluation.open_evaluation import OpenEvaluation, SuiteSize
from core.evaluation.records import EvalItem, EvalSample, Evaluation
from core.newest import MAX_GONE, Newest

BOARD = "the board"
KEEP = 3

Snapshot: TypeAlias = tuple[bytes, list]
"""An encoded Manifest and, per bucket, a reference to it."""


Retirement: TypeAlias = Literal["", "drain", "now"]
"""Not at all; finish what is started, take no more, and return; or hand everything back and return at
once.
"""


class Directive(msgspec.Struct, frozen=True):
    """What an actor should do next: load `version` (when it has another), evaluate `eval_items`, or retire.

    `board`: another one than before is a board that was started again, and knows nobody.
    """

    version: int
    eval_items: tuple[EvalItem, ...] = ()
    retire: Retirement = ""
    board: str = ""


class Held(NamedTuple):
    """The versions whose snapshots a board holds; `board`: another one than before is a board that was
    started again, and speaks only of what it has been told.
    """

    board: str
    versions: Sequence[int]


class ReceivesWeights(Protocol):
    """An actor that takes weights which the learner pushes."""

    def receive(self, verb: str, number: int, *arguments: Any) -> str:
        """Carries out an order of transfer `number`; '' or why it was declined. See actors/receiver.py."""
        ...


class ReceiverClient(Client):
    """Such an actor, as the learner sees it."""

    receive = asks(ReceivesWeights.receive)


class Board:
    """Snapshots, evaluations and retirements; see the module's docstring."""

    def __init__(
        self,
        run: RunConfig,
        suites: Mapping[str, SuiteSize],
        on_evaluation: Callable[[Evaluation, list[dict[str, Any]]], Any],
        *,
        kept_suite: str = "",
    ) -> None:
        """`on_evaluation(result, samples)` is called when an evaluation is complete.

        Snapshots that `kept_suite` has been evaluated with are held until they are let go.
        """
        self._run, self._suites, self._on_evaluation = run, dict(suites), on_evaluation
        self._kept_suite = kept_suite
        self._held: set[int] = set()
        self._owed: set[str] = set()  # Suites that the next version is evaluated on, whatever it is.
        self._id = secrets.token_hex(4)
        self._snapshots: dict[int, Snapshot] = {}
        self._newest = self._pushed = -1
        self._members: dict[str, ReceiverClient] = {}
        self._evaluations: dict[tuple[str, int], OpenEvaluation] = {}  # The oldest first.
        self._results: list[Evaluation] = []
        self._retiring: Newest[Retirement] = Newest(MAX_GONE)
        self._told: Newest[Retirement] = Newest(MAX_GONE)
        self._changed = asyncio.Condition()

    # --- learner ---

    async def forget_snapshots(self) -> list[int]:
        """The learner died, and what it published with it: nothing is handed out before it publishes again.

        Returns the versions of the open evaluations, which are dropped: whoever publishes such a version
        again has it evaluated; see `owe` for others.
        """
        dropped = sorted({version for _, version in self._evaluations})
        self._snapshots.clear()
        self._evaluations.clear()
        self._held.clear()
        self._newest = self._pushed = -1
        await self._wake()
        return dropped

    async def publish(self, manifest: bytes, buckets: list, version: int, *, evaluate: Sequence[str]) -> Held:
        """Make a snapshot the newest one; its evaluation on the suites `evaluate` begins, but for those it
        has been evaluated on. Returns what is held now.

        A board that was started again is given them once more, the oldest first.
        """
        # What is newer is of a learner that has gone back to its checkpoint since.
        self._snapshots = {held: snapshot for held, snapshot in self._snapshots.items() if held < version}
        self._snapshots[version] = (manifest, buckets)
        self._newest = self._pushed = version
        known = {(entry.suite, entry.policy_version) for entry in self._results} | self._evaluations.keys()
        owed, self._owed = sorted(self._owed), set()
        for suite in dict.fromkeys([*evaluate, *owed]):
            size = self._suites.get(suite)
            if size is not None and size.num_prompts and (suite, version) not in known:
                self._evaluations[suite, version] = OpenEvaluation(suite, version, size, self._run.seed)
        self._drop_old_snapshots()
        await self._wake()
        return Held(self._id, sorted(self._snapshots))

    async def announce(self, version: int) -> None:
        """Actors get `version` by another road: who has it, or any since the newest snapshot, is not
        sent back to that.
        """
        self._pushed = version

    async def members(self) -> dict[str, ReceiverClient]:
        """The actors that can be pushed weights: those that have joined and do not retire."""
        return {name: member for name, member in self._members.items() if name not in self._retiring}

    # --- actors ---

    async def join(self, actor: str, member: ReceiverClient) -> None:
        """The actor takes weights that are pushed."""
        self._members[actor] = member

    async def poll(
        self, actor: str, version: int, room: int, timeout_s: float, is_evaluating: bool = False
    ) -> tuple[bytes, Snapshot | None]:
        """The actor's next Directive (msgpack), as soon as there is something new for it or after
        `timeout_s`, and the snapshot of the version that it is to load.

        `version`: what it has loaded. `room`: how many samples of evaluations it can take now. One that
        `is_evaluating` takes items of that version alone, no update, and is not kept waiting.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        async with self._changed:
            while (directive := self._directive(actor, version, room, is_evaluating)) is None:
                left_s = deadline_s - loop.time()
                if left_s <= 0 or is_evaluating:
                    directive = Directive(version, retire=self._retiring.get(actor, ""))
                    break
                try:
                    await asyncio.wait_for(self._changed.wait(), left_s)
                except TimeoutError:
                    continue
        snapshot = None if directive.version == version else self._snapshots.get(directive.version)
        return msgspec.msgpack.encode(msgspec.structs.replace(directive, board=self._id)), snapshot

    async def snapshot(self, version: int) -> Snapshot | None:
        """The snapshot of `version`, or None when it has been dropped since (poll again)."""
        return self._snapshots.get(version)

    async def finish(self, payload: bytes) -> None:
        """Results of evaluation items (msgpack list of EvalSample). Twice the same item counts once."""
        for sample in msgspec.msgpack.decode(payload, type=list[EvalSample]):
            evaluation = self._evaluations.get((sample.item.suite, sample.item.policy_version))
            if evaluation is None:
                continue  # Done, or dropped.
            evaluation.finish(sample)
            if evaluation.is_done:
                self._complete(evaluation)
        # What is done is news to nobody who polls; what has to be done again is.
        if any(evaluation.is_waiting for evaluation in self._evaluations.values()):
            await self._wake()

    async def release_actor(self, actor: str) -> None:
        """The actor is gone: its evaluation items are handed out again, and none to a call of it that
        still waits.
        """
        self._retiring[actor] = "now"
        self._members.pop(actor, None)
        await self.give_back(actor)

    async def give_back(self, actor: str) -> None:
        """The actor cannot evaluate what it took: these items are handed out again."""
        for evaluation in self._evaluations.values():
            evaluation.release(actor)
        await self._wake()

    # --- driver ---

    async def restore(
        self, results: list[Evaluation], retiring: dict[str, Retirement], held: Sequence[int] = ()
    ) -> None:
        """What a board knew that is gone: evaluations that are done, the actors that are to end, or have
        ended, and the snapshots that are to be held. What it was asked again meanwhile is not needed.
        """
        done = {(result.suite, result.policy_version) for result in results}
        new = [result for result in self._results if (result.suite, result.policy_version) not in done]
        self._results = [*results, *new]
        for key in done & self._evaluations.keys():
            del self._evaluations[key]
        self._held -= {version for suite, version in done if suite == self._kept_suite}
        self._held.update(held)
        self._drop_old_snapshots()
        for name, how in {**retiring, **self._retiring}.items():
            self._retiring[name] = how
        await self._wake()

    async def retire(self, actors: list[str], how: Retirement = "now") -> None:
        """These actors end: `drain` (a scale-down) or `now` (the run is over); `now` also hurries those
        that drain.
        """
        for actor in actors:
            if self._retiring.get(actor) != "now":
                self._retiring[actor] = how
        await self._wake()

    async def evaluations(self, num_known: int = 0) -> tuple[list[tuple[str, int]], list[Evaluation]]:
        """Returns suite and version of the evaluations that are open, and the results after the first
        `num_known`.
        """
        return list(self._evaluations), self._results[num_known:]

    async def owe(self, suites: Mapping[str, int]) -> None:
        """The learner goes on behind the versions that these suites were to evaluate: those that are not done
        are made up for with the version that it publishes next.
        """
        done = {(result.suite, result.policy_version) for result in self._results}
        self._owed |= {suite for suite, version in suites.items() if (suite, version) not in done}

    async def let_go(self, versions: Sequence[int]) -> None:
        """These snapshots are held no longer for having been evaluated."""
        self._held.difference_update(versions)
        self._drop_old_snapshots()

    # --- inside ---

    def _directive(self, actor: str, version: int, room: int, is_evaluating: bool) -> Directive | None:
        if how := self._retiring.get(actor):  # For good: a name is not used again (cluster/fleet.py).
            is_new = self._told.get(actor) != how
            self._told[actor] = how
            # Told once; after that at every timeout.
            return Directive(version, retire=how) if is_new else None
        if self._newest < 0:
            return None
        for evaluation in self._evaluations.values():
            if room > 0 and evaluation.is_waiting and not (is_evaluating and evaluation.version != version):
                return Directive(evaluation.version, evaluation.take(actor, room))
        if is_evaluating:
            return None
        return None if self._newest <= version <= self._pushed else Directive(self._newest)

    def _complete(self, evaluation: OpenEvaluation) -> None:
        del self._evaluations[evaluation.suite, evaluation.version]
        result = evaluation.result()
        self._results.append(result)
        if evaluation.suite == self._kept_suite:
            self._held.add(evaluation.version)
        self._drop_old_snapshots()
        self._on_evaluation(result, [_shown(sample) for sample in evaluation.samples()])

    def _drop_old_snapshots(self) -> None:
        needed = {version for _, version in self._evaluations} | self._held
        needed.update(sorted(self._snapshots)[-KEEP:])
        for version in [version for version in self._snapshots if version not in needed]:
            del self._snapshots[version]

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class BoardClient(Client):
    """The board, as learner, actors and driver see it."""

    # The learner.
    publish = asks(Board.publish)
    announce = asks(Board.announce)
    members = asks(Board.members)

    # Actors.
    join = asks(Board.join)
    poll = asks(Board.poll)
    snapshot = asks(Board.snapshot)
    finish = asks(Board.finish)
    give_back = asks(Board.give_back)

    # The driver.
    forget_snapshots = asks(Board.forget_snapshots)
    release_actor = asks(Board.release_actor)
    restore = asks(Board.restore)
    retire = asks(Board.retire)
    let_go = asks(Board.let_go)
    owe = asks(Board.owe)
    evaluations = asks(Board.evaluations)


def _shown(sample: EvalSample) -> dict[str, Any]:
    """The first completion of a problem, as the report's sample viewer wants it."""
    told: dict[str, Any] = {}
    if sample.shown:
        turns = sum(role == "assistant" for role, _ in sample.shown)
        conversation = [list(said) for said in sample.shown]
        told = {"turns": turns, "tool_calls": sample.tool_calls_shown, "transcript": conversation}
    return {
        "suite": sample.item.suite,
        "step": sample.item.policy_version,
        "version": sample.item.policy_version,
        "staleness": 0,
        "prompt": sample.prompt,
        "completion": sample.texts[0],
        "reward": sample.rewards[0],
        "error": sample.errors[0],
        "advantage": None,
        **told,
    }
