"""Fetches a snapshot: every bucket from the object store, verified."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import msgspec
import torch

from core.calls import Call
from core.errors import SnapshotError, TrainingError
from core.weights.board import BoardClient, Snapshot
from core.weights.shared import SharedWeights, share
from core.weights.snapshots import Manifest, read_snapshot

T = TypeVar("T")
Named: TypeAlias = tuple[str, torch.Tensor]
Weights: TypeAlias = list[Named]


def snapshot_of(board: BoardClient, version: int, known: Snapshot | None = None) -> Call[Weights]:
    """Returns the call that fetches the verified parameters of `version`, views on the object store's memory.

    The board is not asked for a snapshot that is `known`, which has come with its word. It raises
    SnapshotError when the snapshot is gone or torn.
    """
    return Call(board.who, "snapshot", lambda: _fetch(board, version, known, list))


def shared_snapshot_of(
    board: BoardClient, version: int, known: Snapshot | None = None
) -> Call[SharedWeights]:
    """Returns the call that fetches the same as a copy that other processes of this node can map.

    It raises SnapshotError also when there is no memory for it.
    """
    return Call(board.who, "snapshot", lambda: _fetch(board, version, known, share))


async def _fetch(
    board: BoardClient, version: int, known: Snapshot | None, kept: Callable[[Iterator[Named]], T]
) -> T:
    try:
        snapshot = known or await board.snapshot(version)
        if snapshot is None:
            raise SnapshotError(f"snapshot {version} has been dropped for newer ones")
        manifest = msgspec.msgpack.decode(snapshot[0], type=Manifest)
        buckets = await asyncio.gather(*map(_bucket, snapshot[1]))
    except TrainingError as error:  # The board, or whoever stored a bucket, is gone.
        raise SnapshotError(f"snapshot {version} is lost: {str(error).splitlines()[0]}") from None
    return await asyncio.to_thread(lambda: kept(read_snapshot(manifest, buckets)))


def _bucket(reference: Any) -> Call[Any]:
    """Returns the bucket that a reference into the object store stands for."""
    return Call("its bucket", "get", lambda: reference)
