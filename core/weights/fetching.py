"""Fetches a snapshot: every bucket from the object store, verified."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import msgspec
import torch

from core.calls import Call
from core.errors import SnapshotError, TrainingError
from core.weights.board import BoardClient
from core.weights.snapshots import Manifest, read_snapshot

Weights: TypeAlias = list[tuple[str, torch.Tensor]]


def snapshot_of(board: BoardClient, version: int) -> Call[Weights]:
    """Returns the call that fetches the verified parameters of `version`, views on the object store's memory.

    It raises SnapshotError when the snapshot is gone or torn.
    """
    return Call(board.who, "snapshot", lambda: _fetch(board, version))


async def _fetch(board: BoardClient, version: int) -> Weights:
    try:
        snapshot = await board.snapshot(version)
        if snapshot is None:
            raise SnapshotError(f"snapshot {version} has been dropped for newer ones")
        manifest = msgspec.msgpack.decode(snapshot[0], type=Manifest)
        buckets = await asyncio.gather(*map(_bucket, snapshot[1]))
    except TrainingError as error:  # The board, or whoever stored a bucket, is gone.
        raise SnapshotError(f"snapshot {version} is lost: {str(error).splitlines()[0]}") from None
    return await asyncio.to_thread(lambda: list(read_snapshot(manifest, buckets)))


def _bucket(reference: Any) -> Call[Any]:
    """Returns the bucket that a reference into the object store stands for."""
    return Call("its bucket", "get", lambda: reference)
