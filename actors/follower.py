"""Follows the board: asks it what to do, and fetches the weights for that while generation goes on.

    board --poll--> Directive --fetch, verify--> Update --> the actor applies it between two engine steps
                       `--> retire: '' | 'drain' | 'now'

A snapshot that is gone, torn or late changes nothing: the actor keeps its weights, its samples say so, and
the board is asked again a second later. Fetching and checksums run on the calls' thread and one beside it,
never on the engine's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import torch

from actors.exchange import RETRY_S, Ask
from core.calls import Calls, answered
from core.config import Config
from core.errors import SnapshotError, TrainingError
from core.records import EvalItem
from core.troubles import Troubles
from core.weights.board import Directive
from core.weights.snapshots import Manifest, read_snapshot

POLL_S = 5.0

Weights: TypeAlias = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Update:
    """What the actor does next: load `weights` (None: `version` is in place), then evaluate
    `eval_items` with them.
    """

    version: int
    weights: Weights | None
    eval_items: tuple[EvalItem, ...]


class Follower:
    """The board's word, as far as it is known.

    retire     '' | 'drain' | 'now': see core/weights/board.py
    update     ready to be carried out; set it to None when that is done
    board      which board it heard last: another one knows nobody
    fetch_s    how long the newest snapshot took, from the board's word to the last checksum
    """

    def __init__(
        self, name: str, config: Config, board: Any, calls: Calls, tell: Callable[[str], None]
    ) -> None:
        self._name, self._board, self._calls, self._troubles = name, board, calls, Troubles(tell)
        self._limit_s = config.run.timeout_s
        self._max_items = max(1, config.actors.slots // config.eval.samples)
        self._poll: Ask[bytes] | None = None
        self._fetch: Ask[Weights] | None = None
        self._directive: Directive | None = None
        self._is_asking_for_work, self._asked_version = False, -1
        self._poll_at_s = self._work_at_s = self._fetched_from_s = 0.0
        self.retire = self.board = ""
        self.update: Update | None = None
        self.fetch_s = 0.0
        self.num_failed = 0

    @property
    def futures(self) -> list[Future[Any]]:
        """Of the calls under way."""
        return [ask.future for ask in (self._poll, self._fetch) if ask is not None]

    def look(self, version: int, *, is_evaluating: bool) -> None:
        """Takes note of what the board and the object store have answered; `version`: what the engine has
        loaded.

        Raises PeerTimeout when the board does not answer.
        """
        if self._fetch is not None and self._fetch.is_done():
            self._end_fetch(self._fetch)
        if self._poll is not None and self._poll.is_done():
            directive = msgspec.msgpack.decode(self._poll.result(), type=Directive)
            self._poll = None
            self.board = directive.board
            self._obey(directive, version)
        # Who has something to do still has to hear that it is retired, but takes nothing else.
        is_busy = is_evaluating or self._directive is not None or self.update is not None or bool(self.retire)
        if self._poll is None and time.monotonic() >= (self._poll_at_s if is_busy else self._work_at_s):
            self._is_asking_for_work, self._asked_version = not is_busy, version
            max_items, wait_s = (0, 0.0) if is_busy else (self._max_items, POLL_S)
            self._poll_at_s = time.monotonic() + RETRY_S
            self._poll = self._ask(
                self._board.poll.remote(self._name, version, max_items, wait_s), wait_s + self._limit_s
            )

    def give_way(self) -> bool:
        """Newer weights than any snapshot are about to be pushed: forget one that is being fetched.
        False when it is for an evaluation.
        """
        items = (
            self._directive.eval_items
            if self._directive is not None
            else self.update.eval_items
            if self.update is not None
            else ()
        )
        if not items:
            self._directive = self._fetch = self.update = None
        return not items

    def _obey(self, directive: Directive, version: int) -> None:
        self.retire = directive.retire or self.retire
        if self.retire:
            self.update = self._directive = self._fetch = None
        elif not self._is_asking_for_work or (not directive.eval_items and version != self._asked_version):
            return  # The latter: weights were pushed while the board was about to answer.
        elif directive.version != version:
            self._directive, self._fetched_from_s = directive, time.monotonic()
            # It keeps the limit itself; the rest is for its checksums.
            self._fetch = self._ask(
                _fetch_snapshot(self._board, directive.version, self._limit_s), 2 * self._limit_s
            )
        elif directive.eval_items:
            self.update = Update(version, None, directive.eval_items)

    def _end_fetch(self, fetch: Ask[Weights]) -> None:
        directive, self._directive, self._fetch = self._directive, None, None
        assert directive is not None
        try:
            self.update = Update(directive.version, fetch.result(), directive.eval_items)
            self._troubles.well(f"{self._name} keeps its weights")
        except SnapshotError as error:
            self.num_failed += 1
            self._troubles.note(f"{self._name} keeps its weights", error)
            self._work_at_s = time.monotonic() + RETRY_S
            self._calls.post(
                self._board.give_back.remote(self._name), "the board", "evaluation items handed back"
            )
        self.fetch_s = time.monotonic() - self._fetched_from_s

    def _ask(self, call: Any, limit_s: float) -> Ask[Any]:
        return Ask(self._calls, call, who="the board", name=self._name, limit_s=limit_s)


async def _fetch_snapshot(board: Any, version: int, limit_s: float) -> Weights:
    """The verified parameters of `version`. Raises SnapshotError when it is gone, torn or not here
    within `limit_s`.
    """
    try:
        async with asyncio.timeout(limit_s):
            snapshot = await answered(board.snapshot.remote(version), "the board")
            if snapshot is None:
                raise SnapshotError(f"snapshot {version} has been dropped for newer ones")
            manifest = msgspec.msgpack.decode(snapshot[0], type=Manifest)
            buckets = await asyncio.gather(*(answered(bucket, "its bucket") for bucket in snapshot[1]))
    except TimeoutError:
        raise SnapshotError(
            f"snapshot {version} did not arrive within {limit_s:.0f} s (run.timeout_s)"
        ) from None
    except TrainingError as error:  # The board, or whoever stored a bucket, is gone.
        raise SnapshotError(f"snapshot {version} is lost: {str(error).splitlines()[0]}") from None
    return await asyncio.to_thread(lambda: list(read_snapshot(manifest, buckets)))
