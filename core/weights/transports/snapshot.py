"""Snapshots: buckets in Ray's object store that actors pull at their own pace. The default; works everywhere.

    the step's thread   gather bucket by bucket, copy to host memory | next step ...
    rank 0's writer                                                  | checksum and store each bucket, tell
    the board

The copy is made before the learner goes on, because with one rank a gathered tensor is the parameter itself.
Rank 0 keeps host memory for one copy of the model and uses it again; a new publication waits for the one
before. With `weights.full_every` above 1 it keeps a second copy, the last that was stored whole: what has
changed since is all that is stored of the versions that follow. Whoever missed some needs that whole one and
the newest changes, and no others. The object store brings a bucket to a node once, for all actors there.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from core.calls import Pending
from core.errors import AgroError
from core.weights.snapshots import Base, Buffers, SnapshotWriter
from core.weights.transports.base import Sender, Transport


def build(sender: Sender) -> Transport:
    """Snapshots through `sender.store`."""
    return SnapshotTransport(sender)


class SnapshotTransport(Transport):
    """See the module's docstring. `begin` and `store` are the two halves of a publication, for
    transports that do more in between.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._buffers, self._base_buffers = Buffers(), Buffers()
        self._base: Base | None = None  # The last snapshot that was stored whole, where deltas are wanted.
        self._num_deltas = 0  # Since then.
        self._storing: tuple[int, Future[None]] | None = None
        self._store_s: float | None = None
        # What the board holds, to be published again should it die.
        self._held: dict[int, tuple[bytes, list[Any], Sequence[str]]] = {}
        self._board, self._told = "", set[int]()  # The board that answered last, and what it was told of.

    def publish(self, version: int, *, evaluate: Sequence[str]) -> None:
        """Copies the weights into a snapshot; storing it goes on in the background."""
        if self._sender.rank != 0:
            collections.deque(self._sender.source, maxlen=0)
            return
        writer = self.begin()
        for name, tensor in self._sender.source:
            writer.add(name, tensor)
        self.store(writer, version, evaluate=evaluate)

    def begin(self) -> SnapshotWriter:
        """Gives an empty snapshot, once the one before is stored (rank 0)."""
        self.flush()
        self._buffers.give_back()
        # Checksums and copies take cores and memory bandwidth, which the gather, for which everybody waits,
        # has use for.
        self._is_gathered = threading.Event()
        self._thread.submit(self._is_gathered.wait, self._sender.config.run.timeout_s)
        self._num_deltas += 1
        is_whole = self._base is None or self._num_deltas >= self._sender.config.weights.full_every
        return SnapshotWriter(
            self._sender.source.bucket_bytes,
            self._sender.store,
            executor=self._thread,
            take=self._buffers.take,
            base=None if is_whole else self._base,
        )

    def store(self, writer: SnapshotWriter, version: int, *, evaluate: Sequence[str]) -> None:
        """Ends a snapshot to which everything has been added: the rest happens in the background (rank 0)."""
        writer.end()
        self._is_gathered.set()
        self._storing = (
            version,
            self._thread.submit(self._finish, writer, version, evaluate, time.perf_counter()),
        )

    def flush(self) -> None:
        """Waits until the newest snapshot is stored and the board knows of it."""
        if self._storing is None:
            return
        version, future = self._storing
        who = f"object store or board, for the snapshot of version {version},"
        Pending(future, who, self._sender.config.run.timeout_s).wait()
        self._storing = None

    def republish(self, newest_announced: Callable[[], int | None] = lambda: None) -> None:
        """Publishes what the board held once more. `newest_announced()` gives the version that the actors got
        by another road since; it is asked for when the board has the snapshots.
        """
        told = self._thread.submit(self._tell_board_again, newest_announced)
        self._sender.calls.watch(told, self._sender.board.who, "the newest snapshots again")

    def _tell_board_again(self, newest_announced: Callable[[], int | None]) -> None:
        try:
            for version in sorted(self._held):
                self._tell_board(version)
            # Else the snapshot would take back those who have newer weights.
            if (announced := newest_announced()) is not None:
                self._sender.calls.ask(self._sender.board.announce(announced))
        except AgroError as error:
            self._sender.tell(
                f"the board was not told of version {max(self._held, default=-1)} again: "
                f"{str(error).splitlines()[0]}"
            )

    def _tell_board(self, version: int) -> None:
        manifest, references, evaluate = self._held[version]
        published = self._sender.board.publish(manifest, references, version, evaluate=evaluate)
        board, kept = self._sender.calls.ask(published)
        if board != self._board:  # It knows nothing yet of what the one before held: `republish` tells it.
            self._board, self._told = board, set()
        self._told.add(version)
        gone = {told for told in self._told if told < version and told not in kept}
        self._held = {held: entry for held, entry in self._held.items() if held not in gone}
        self._told -= gone

    def metrics(self) -> dict[str, float]:
        """How long the newest snapshot took to be stored, in seconds."""
        return {} if self._store_s is None else {"weights/store_s": self._store_s}

    def _finish(self, writer: SnapshotWriter, version: int, evaluate: Sequence[str], start_s: float) -> None:
        manifest, references = writer.finish(version)
        if self._sender.config.weights.full_every > 1 and writer.is_whole:
            self._base, self._num_deltas = Base(writer.buckets, references), 0
            self._buffers, self._base_buffers = self._base_buffers, self._buffers
        self._held[version] = (msgspec.msgpack.encode(manifest), references, evaluate)
        self._tell_board(version)
        self._store_s = time.perf_counter() - start_s
