"""Weight snapshots: what the learner publishes and the actors pull. Versioned, bucketed, checksummed, immutable.

    (name, tensor)* --SnapshotWriter--> Manifest + buckets (bytes in host memory or Ray's object store) --read_snapshot--> (name, tensor)*

A bucket is a flat uint8 array of at most `bucket_bytes`, or of one parameter larger than that; the manifest says where
each parameter lies and each bucket's xxh3 checksum. A snapshot is applied whole or not at all: every bucket is verified
before the first tensor is handed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from cluster.errors import SnapshotError

ALIGNMENT_BYTES = 16  # Enough for a view of any dtype.


class ParamEntry(msgspec.Struct, frozen=True):
    """Where one parameter lies: bytes [offset, offset + its size) of bucket number `bucket`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int


class Manifest(msgspec.Struct, frozen=True):
    """Contents of the snapshot of one policy version."""

    version: int
    params: tuple[ParamEntry, ...]
    checksums: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all buckets."""
        return sum(self.sizes)


class SnapshotWriter:
    """Collects parameters into buckets; each full bucket is handed to `store`, whose results `finish` returns in order."""

    def __init__(self, bucket_bytes: int, store: Callable[[np.ndarray], Any] = lambda bucket: bucket) -> None:
        self._bucket_bytes = bucket_bytes
        self._store = store
        self._stored: list = []
        self._params: list[ParamEntry] = []
        self._checksums: list[str] = []
        self._sizes: list[int] = []
        self._pending: list[np.ndarray] = []
        self._pending_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one parameter (any device, whole); copied before this returns."""
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().copy()
        padding = -self._pending_bytes % ALIGNMENT_BYTES
        if self._pending and self._pending_bytes + padding + data.nbytes > self._bucket_bytes:
            self._flush()
            padding = 0
        offset = self._pending_bytes + padding
        self._params.append(ParamEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), len(self._stored), offset))
        self._pending += [np.zeros(padding, np.uint8), data]
        self._pending_bytes = offset + data.nbytes

    def finish(self, version: int) -> tuple[Manifest, list]:
        """The manifest of `version` and what `store` returned for each bucket."""
        if self._pending:
            self._flush()
        return Manifest(version, tuple(self._params), tuple(self._checksums), tuple(self._sizes)), self._stored

    def _flush(self) -> None:
        bucket = np.concatenate(self._pending)
        self._checksums.append(xxhash.xxh3_128_hexdigest(bucket.data))
        self._sizes.append(bucket.nbytes)
        self._stored.append(self._store(bucket))
        self._pending, self._pending_bytes = [], 0


def read_snapshot(manifest: Manifest, buckets: Sequence[np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter, views on `buckets`: do not write to them.

    Raises SnapshotError before the first tensor when a bucket is missing, short, or fails its checksum.
    """
    if len(buckets) != len(manifest.checksums):
        raise SnapshotError(f"snapshot {manifest.version} has {len(manifest.checksums)} buckets, {len(buckets)} arrived")
    for number, (bucket, size, checksum) in enumerate(zip(buckets, manifest.sizes, manifest.checksums, strict=True)):
        if bucket.nbytes != size:
            raise SnapshotError(f"snapshot {manifest.version}, bucket {number}: {bucket.nbytes} bytes arrived of {size}; it is torn")
        if (found := xxhash.xxh3_128_hexdigest(bucket.data)) != checksum:
            raise SnapshotError(f"snapshot {manifest.version}, bucket {number}: checksum {found}, expected {checksum}; it is torn")
    return ((entry.name, _tensor(entry, buckets[entry.bucket])) for entry in manifest.params)


def _tensor(entry: ParamEntry, bucket: np.ndarray) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype)
    num_bytes = math.prod(entry.shape) * dtype.itemsize
    # By DLPack, because `from_numpy` warns of read-only arrays, which is what the object store hands out.
    return torch.from_dlpack(bucket[entry.offset : entry.offset + num_bytes]).view(dtype).view(entry.shape)
