"""Follows the board: asks it what to do, and fetches the weights for that while generation goes on.

    board --poll--> Directive, snapshot --fetch, verify--> Update --> the actor applies it between two engine steps
                       `--> retire: '' | 'drain' | 'now'

A snapshot that is gone, torn or late changes nothing: the actor keeps its weights, its samples say so, and
the board is asked again a second later. Fetching and checksums run on the calls' thread and one beside it,
never on the engine's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from actors.exchange import RETRY_S
from core.calls import Calls, Pending
from core.config import Config
from core.errors import PeerTimeout, SnapshotError
from core.evaluation.records import EvalItem
from core.troubles import Troubles
from core.weights.board import BoardClient, Directive, Snapshot
from core.weights.fetching import Weights, shared_snapshot_of, snapshot_of
from core.weights.shared import SharedWeights

POLL_S = 5.0
"""The board holds a question for so long when it has nothing to say."""


@dataclass(frozen=True)
class Update:
    """Says what the actor does next: it loads `weights` (None: `version` is in place), then evaluates
    `eval_items` with them.
    """

    version: int
    weights: Weights | SharedWeights | None
    eval_items: tuple[EvalItem, ...]


class Follower:
    """The board's word, as far as it is known.

    retire     '' | 'drain' | 'now': see core/weights/board.py
    update     is ready to be carried out; whoever has done so sets it to None
    board      says which board was heard last: another one knows nobody
    fetch_s    is how long the newest snapshot took, from the board's word to the last checksum
    num_failed counts the snapshots that were gone, torn or late
    """

    def __init__(self, name: str, config: Config, board: BoardClient, calls: Calls) -> None:
        self._name, self._board, self._calls = name, board, calls
        self._troubles = Troubles(calls.tell)
        self._timeout_s = config.run.timeout_s
        # Adapters reach an engine's workers as files, which are small.
        self._is_shared = config.actors.tensor_parallel > 1 and config.weights.transport != "adapters"
        self._asking: Pending[tuple[bytes, Snapshot | None]] | None = None
        self._fetching: Pending[Weights] | Pending[SharedWeights] | None = None
        self._directive: Directive | None = None  # What is being fetched for.
        self._is_asking_for_work, self._asked_version = False, -1
        self._ask_at_s = self._work_at_s = self._fetched_from_s = 0.0
        self.retire = self.board = ""
        self.update: Update | None = None
        self.fetch_s = 0.0
        self.num_failed = 0

    @property
    def pendings(self) -> list[Pending[Any]]:
        """Returns the calls under way."""
        return [pending for pending in (self._asking, self._fetching) if pending is not None]

    def poll(self, version: int, *, is_evaluating: bool, room: int) -> None:
        """Takes what board and object store have answered, and asks the board again. The engine has `version`
        loaded, and room for so many samples of evaluations.

        Raises PeerTimeout when the board does not answer.
        """
        if self._fetching is not None and self._is_fetched(self._fetching):
            self._end_fetch(self._fetching)
        if self._asking is not None and self._asking.is_done():
            payload, snapshot = self._asking.result()
            self._asking = None
            directive = msgspec.msgpack.decode(payload, type=Directive)
            self.board = directive.board
            self._obey(directive, version, snapshot)
        # Who has something to do still has to hear that it is retired, but takes nothing else.
        has_work = self._directive is not None or self.update is not None or bool(self.retire)
        is_busy = has_work or is_evaluating
        if self._asking is None and time.monotonic() >= (self._ask_at_s if is_busy else self._work_at_s):
            self._ask(version, 0 if has_work else room, is_busy=is_busy)

    def give_way(self) -> bool:
        """Forgets a snapshot that is being fetched: newer weights are about to be pushed.

        Returns False, and forgets nothing, when it is for an evaluation.
        """
        due = self._directive or self.update
        if due is not None and due.eval_items:
            return False
        self._drop_work()
        return True

    def _ask(self, version: int, room: int, *, is_busy: bool) -> None:
        """Asks for work; of an actor that is busy, whether it is to retire, and for more to evaluate where it
        has room.
        """
        self._is_asking_for_work, self._asked_version = room > 0 or not is_busy, version
        wait_s = 0.0 if is_busy else POLL_S
        self._ask_at_s = time.monotonic() + RETRY_S
        call = self._board.poll(self._name, version, room, wait_s, is_busy)
        self._asking = self._calls.start(call, wait_s + self._timeout_s)

    def _obey(self, directive: Directive, version: int, snapshot: Snapshot | None) -> None:
        self.retire = directive.retire or self.retire
        if self.retire:
            self._drop_work()
        elif not self._is_asking_for_work or (not directive.eval_items and version != self._asked_version):
            return  # The latter: weights were pushed while the board was about to answer.
        elif directive.version != version:
            self._directive, self._fetched_from_s = directive, time.monotonic()
            self._fetching = self._fetch(directive.version, snapshot)
        elif directive.eval_items:
            self.update = Update(version, None, directive.eval_items)

    def _fetch(self, version: int, snapshot: Snapshot | None) -> Pending[Weights] | Pending[SharedWeights]:
        if self._is_shared:
            return self._calls.start(shared_snapshot_of(self._board, version, snapshot))
        return self._calls.start(snapshot_of(self._board, version, snapshot))

    def _drop_work(self) -> None:
        if self._fetching is not None:
            self._fetching.give_up()
        self.update = self._directive = self._fetching = None

    def _is_fetched(self, fetching: Pending[Weights] | Pending[SharedWeights]) -> bool:
        """Returns whether the fetch is over, in time or not."""
        try:
            return fetching.is_done()
        except PeerTimeout:
            return True

    def _end_fetch(self, fetching: Pending[Weights] | Pending[SharedWeights]) -> None:
        directive, self._directive, self._fetching = self._directive, None, None
        assert directive is not None
        try:
            if fetching.future.cancelled():
                late = f"did not arrive within {self._timeout_s:.0f} s (run.timeout_s)"
                raise SnapshotError(f"snapshot {directive.version} {late}")
            self.update = Update(directive.version, fetching.result(), directive.eval_items)
            self._troubles.well(f"{self._name} keeps its weights")
        except SnapshotError as error:
            self.num_failed += 1
            self._troubles.note(f"{self._name} keeps its weights", error)
            self._work_at_s = time.monotonic() + RETRY_S
            self._calls.post(self._board.give_back(self._name), "evaluation items handed back")
        self.fetch_s = time.monotonic() - self._fetched_from_s
