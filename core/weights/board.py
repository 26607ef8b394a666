"""The board: the one place rollout actors look at between engine steps. An asyncio class; a run wraps it as a
Ray actor.

    learner  --publish(version)-->  board  <--poll(actor, version)--  actors: newest snapshot, items, or retire
                                      |   <--finish(evaluated)------
                                      `--Evaluation--> monitor

Snapshots: references to immutable buckets. The newest `KEEP` are held, besides those an evaluation still
needs.

Evaluations: each belongs to one policy version. An actor handed its items loads exactly that version and
takes no update until they are done; training goes on meanwhile. Items of an actor that dies are handed out
again.

A board that dies is started again, empty: the driver tells it what is done and who ends (`restore`), the
learner publishes again what it held, with the evaluations that were open, and actors whose directives come
from another board than before join again.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from core.calls import Client, asks
from core.config import RunConfig
from core.newest import MAX_GONE, Newest
from core.records import EvalItem, EvalSample, Evaluation

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


class ReceivesWeights(Protocol):
    """An actor that takes weights which the learner pushes."""

    def receive(self, verb: str, number: int, *arguments: Any) -> str:
        """Carries out an order of transfer `number`; '' or why it was declined. See actors/receiver.py."""
        ...


class ReceiverClient(Client):
    """Such an actor, as the learner sees it."""

    receive = asks(ReceivesWeights.receive)


class _OpenEvaluation:
    def __init__(self, evaluation_id: int, version: int, num_prompts: int, seed: int) -> None:
        self.version, self.num_prompts = version, num_prompts
        self.pending = deque(
            EvalItem(evaluation_id, version, index, (seed + index) % 2**31) for index in range(num_prompts)
        )
        self.taken: dict[EvalItem, str] = {}
        self.done: dict[int, EvalSample] = {}

    def take(self, actor: str, count: int) -> tuple[EvalItem, ...]:
        items = tuple(self.pending.popleft() for _ in range(min(count, len(self.pending))))
        self.taken.update(dict.fromkeys(items, actor))
        return items

    def release(self, actor: str) -> None:
        lost = [
            item
            for item, holder in self.taken.items()
            if holder == actor and item.prompt_index not in self.done
        ]
        for item in lost:
            del self.taken[item]
        self.pending.extend(lost)


class Board:
    """Snapshots, evaluations and retirements; see the module's docstring."""

    def __init__(
        self,
        run: RunConfig,
        num_eval_rows: int,
        on_evaluation: Callable[[Evaluation, list[dict[str, Any]]], Any],
    ) -> None:
        """`on_evaluation(result, samples)` is called when an evaluation is complete."""
        self._run, self._num_eval_rows, self._on_evaluation = run, num_eval_rows, on_evaluation
        self._id = secrets.token_hex(4)
        self._snapshots: dict[int, Snapshot] = {}
        self._newest = self._pushed = -1
        self._members: dict[str, ReceiverClient] = {}
        self._evaluations: dict[int, _OpenEvaluation] = {}
        self._evaluation_ids = itertools.count()
        self._results: list[Evaluation] = []
        self._retiring: Newest[Retirement] = Newest(MAX_GONE)
        self._told: Newest[Retirement] = Newest(MAX_GONE)
        self._changed = asyncio.Condition()

    # --- learner ---

    async def forget_snapshots(self) -> list[int]:
        """The learner died, and what it published with it: nothing is handed out before it publishes again.

        Returns the versions of the open evaluations, which are dropped: whoever publishes such a version
        again has it evaluated.
        """
        dropped = [evaluation.version for evaluation in self._evaluations.values()]
        self._snapshots.clear()
        self._evaluations.clear()
        self._newest = self._pushed = -1
        await self._wake()
        return dropped

    async def publish(self, manifest: bytes, buckets: list, version: int, *, evaluate: bool) -> list[int]:
        """Make a snapshot the newest one; with `evaluate`, its evaluation begins. Returns the versions that
        are held now.

        A board that was started again is given them once more, the oldest first.
        """
        # What is newer is of a learner that has gone back to its checkpoint since.
        self._snapshots = {held: snapshot for held, snapshot in self._snapshots.items() if held < version}
        self._snapshots[version] = (manifest, buckets)
        self._newest = self._pushed = version
        known = {entry.policy_version for entry in self._results} | {
            entry.version for entry in self._evaluations.values()
        }
        if evaluate and self._num_eval_rows and version not in known:
            number = next(self._evaluation_ids)
            self._evaluations[number] = _OpenEvaluation(number, version, self._num_eval_rows, self._run.seed)
        self._drop_old_snapshots()
        await self._wake()
        return sorted(self._snapshots)

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

    async def poll(self, actor: str, version: int, max_items: int, timeout_s: float) -> bytes:
        """The actor's next Directive (msgpack), as soon as there is something new for it or after
        `timeout_s`.

        `version`: what it has loaded. `max_items`: how many evaluation prompts it can take now.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        async with self._changed:
            while (directive := self._directive(actor, version, max_items)) is None:
                left_s = deadline_s - loop.time()
                if left_s <= 0:
                    directive = Directive(version, retire=self._retiring.get(actor, ""))
                    break
                try:
                    await asyncio.wait_for(self._changed.wait(), left_s)
                except TimeoutError:
                    continue
        return msgspec.msgpack.encode(msgspec.structs.replace(directive, board=self._id))

    async def snapshot(self, version: int) -> Snapshot | None:
        """The snapshot of `version`, or None when it has been dropped since (poll again)."""
        return self._snapshots.get(version)

    async def finish(self, payload: bytes) -> None:
        """Results of evaluation items (msgpack list of EvalSample). Twice the same item counts once."""
        for sample in msgspec.msgpack.decode(payload, type=list[EvalSample]):
            evaluation = self._evaluations.get(sample.item.evaluation_id)
            if evaluation is None or sample.item.policy_version != evaluation.version:
                continue  # The latter is of a board before this one.
            if any(span.version != evaluation.version for spans in sample.version_spans for span in spans):
                evaluation.pending.append(sample.item)  # Not the policy it claims to measure: again.
                continue
            evaluation.done[sample.item.prompt_index] = sample
            if len(evaluation.done) == evaluation.num_prompts:
                self._complete(sample.item.evaluation_id, evaluation)
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

    async def restore(self, results: list[Evaluation], retiring: dict[str, Retirement]) -> None:
        """What a board knew that is gone: evaluations that are done, and the actors that are to end, or
        have ended.
        """
        self._results = [*results, *self._results]
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

    async def evaluations(self, num_known: int = 0) -> tuple[list[int], list[Evaluation]]:
        """Returns the versions whose evaluation is open, and the results after the first `num_known`."""
        open_versions = [evaluation.version for evaluation in self._evaluations.values()]
        return open_versions, self._results[num_known:]

    # --- inside ---

    def _directive(self, actor: str, version: int, max_items: int) -> Directive | None:
        if how := self._retiring.get(actor):  # For good: a name is not used again (cluster/fleet.py).
            is_new = self._told.get(actor) != how
            self._told[actor] = how
            # Told once; after that at every timeout.
            return Directive(version, retire=how) if is_new else None
        if self._newest < 0:
            return None
        for evaluation in self._evaluations.values():
            if evaluation.pending and max_items > 0:
                return Directive(evaluation.version, evaluation.take(actor, max_items))
        return None if self._newest <= version <= self._pushed else Directive(self._newest)

    def _complete(self, evaluation_id: int, evaluation: _OpenEvaluation) -> None:
        del self._evaluations[evaluation_id]
        samples = [evaluation.done[index] for index in sorted(evaluation.done)]
        rewards = [reward for sample in samples for reward in sample.rewards if reward is not None]
        num_samples = sum(len(sample.rewards) for sample in samples)
        result = Evaluation(
            evaluation_id=evaluation_id,
            policy_version=evaluation.version,
            solve_rate=sum(rewards) / len(rewards) if rewards else float("nan"),
            num_problems=len(samples),
            num_samples=num_samples,
            num_errors=num_samples - len(rewards),
        )
        self._results.append(result)
        self._drop_old_snapshots()
        self._on_evaluation(result, [_shown(sample) for sample in samples])

    def _drop_old_snapshots(self) -> None:
        needed = {evaluation.version for evaluation in self._evaluations.values()} | set(
            sorted(self._snapshots)[-KEEP:]
        )
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
    evaluations = asks(Board.evaluations)


def _shown(sample: EvalSample) -> dict[str, Any]:
    """The first completion of a problem, as the report's sample viewer wants it."""
    return {
        "step": sample.item.policy_version,
        "version": sample.item.policy_version,
        "staleness": 0,
        "prompt": sample.prompt,
        "completion": sample.texts[0],
        "reward": sample.rewards[0],
        "error": sample.errors[0],
        "advantage": None,
    }
