"""Weight snapshots are what the learner publishes and the actors pull: versioned, bucketed, checksummed,
immutable.

    (name, tensor)* --SnapshotWriter--> Manifest + buckets --read_snapshot--> (name, tensor)*

A bucket is a flat uint8 array, in host memory or in Ray's object store, of at most `bucket_bytes`, or of one
parameter larger than that. The manifest says where each parameter lies and what each bucket's xxh3 checksum
is. A snapshot is applied whole or not at all: every bucket is verified before the first tensor is handed out.

A bucket may come as what has changed of it since an earlier snapshot, beside that snapshot's own bucket
(core/weights/deltas.py). The checksum is that of the whole all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import xxhash

from core.errors import SnapshotError
from core.weights.deltas import changed, difference

ALIGNMENT_BYTES = 16  # Enough for a view of any dtype.


class ParamEntry(msgspec.Struct, frozen=True):
    """Says where one parameter lies: bytes [offset, offset + its size) of bucket number `bucket`. A Manifest
    lists them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int


class Manifest(msgspec.Struct, frozen=True):
    """Lists the contents of the snapshot of one policy version; `SnapshotWriter.finish` makes it,
    `read_snapshot` follows it.

    `deltas` are the numbers of the buckets of which only changes come; what they are changes of comes behind
    all buckets, in this order.
    """

    version: int
    params: tuple[ParamEntry, ...]
    checksums: tuple[str, ...]
    sizes: tuple[int, ...]
    deltas: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Returns the size of all buckets."""
        return sum(self.sizes)


class Buffers:
    """Host memory for buckets that the next snapshot uses again; page-locked where there is a GPU to copy
    from.

        writer = SnapshotWriter(bucket_bytes, store, take=buffers.take)
        ...                                     # and when all that was taken is stored:
        buffers.give_back()

    It holds at most one snapshot's worth.
    """

    def __init__(self) -> None:
        self._all: list[np.ndarray] = []
        self._num_taken = 0

    def take(self, num_bytes: int) -> np.ndarray:
        """Returns at least `num_bytes` bytes of any content."""
        if self._num_taken == len(self._all):
            self._all.append(np.empty(0, np.uint8))
        if self._all[self._num_taken].nbytes < num_bytes:
            self._all[self._num_taken] = torch.empty(
                num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
            ).numpy()
        self._num_taken += 1
        return self._all[self._num_taken - 1]

    def give_back(self) -> None:
        """Takes back all memory: nobody reads any of it any longer."""
        self._num_taken = 0


class Base(NamedTuple):
    """A whole snapshot that others tell their changes of: its buckets as they are here, and what `store`
    returned for each.
    """

    buckets: Sequence[np.ndarray]
    references: Sequence[Any]


class Sealed(NamedTuple):
    """A bucket that is stored, whole or as a delta."""

    checksum: str
    reference: Any
    is_delta: bool


class _AtOnce(Executor):
    """Runs what is submitted in the caller's thread, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class SnapshotWriter:
    """Copies parameters into buckets and hands each full one to `store`, whose results `finish` returns in
    order.

        writer = SnapshotWriter(64 * 2**20, store)
        for name, tensor in weights:
            writer.add(name, tensor)
        manifest, references = writer.finish(version)

    Checksums and `store` run in `executor`, by default in the thread that calls `add`; the copies are always
    made there. `take` gives a bucket's memory (`Buffers.take`), which `store` must not keep if it is used
    again. With a `base`, buckets of which little has changed since are stored as deltas.
    """

    def __init__(
        self,
        bucket_bytes: int,
        store: Callable[[np.ndarray], Any] = lambda bucket: bucket,
        *,
        executor: Executor | None = None,
        take: Callable[[int], np.ndarray] = lambda num_bytes: np.empty(num_bytes, np.uint8),
        base: Base | None = None,
    ) -> None:
        self._bucket_bytes, self._store, self._take = bucket_bytes, store, take
        self._executor = _AtOnce() if executor is None else executor
        self._base = base
        self.buckets: list[np.ndarray] = []
        self._stored: list[Future[Sealed]] = []
        self._params: list[ParamEntry] = []
        self._sizes: list[int] = []
        self._bucket: np.ndarray | None = None
        self._used = 0

    @property
    def is_whole(self) -> bool:
        """Returns whether no bucket is, or will be, a delta."""
        return self._base is None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends one whole parameter, from any device; it is copied before this returns."""
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        padding = -self._used % ALIGNMENT_BYTES
        if self._bucket is not None and self._used + padding + data.nbytes > self._bucket_bytes:
            self._flush(self._bucket)
            self._bucket = None
        if self._bucket is None:
            self._bucket, self._used, padding = self._take(max(self._bucket_bytes, data.nbytes)), 0, 0
        offset = self._used + padding
        self._params.append(
            ParamEntry(
                name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), len(self._stored), offset
            )
        )
        self._bucket[self._used : offset] = 0
        torch.from_numpy(self._bucket[offset : offset + data.nbytes]).copy_(data)
        self._used = offset + data.nbytes

    def end(self) -> None:
        """Closes the last bucket after the last parameter, so that it is on its way too."""
        if self._bucket is not None:
            self._flush(self._bucket)
            self._bucket = None

    def finish(self, version: int) -> tuple[Manifest, list[Any]]:
        """Returns the manifest of `version` and what `store` returned for each bucket.

        It waits for `executor` (its one thread: call `end` before).
        """
        self.end()
        sealed = [future.result() for future in self._stored]
        deltas = tuple(number for number, bucket in enumerate(sealed) if bucket.is_delta)
        bases = [] if self._base is None else [self._base.references[number] for number in deltas]
        checksums, sizes = tuple(bucket.checksum for bucket in sealed), tuple(self._sizes)
        manifest = Manifest(version, tuple(self._params), checksums, sizes, deltas)
        return manifest, [*(bucket.reference for bucket in sealed), *bases]

    def _flush(self, memory: np.ndarray) -> None:
        bucket = memory[: self._used]
        self._sizes.append(bucket.nbytes)
        self.buckets.append(bucket)
        self._stored.append(self._executor.submit(self._seal, len(self._stored), bucket))

    def _seal(self, number: int, bucket: np.ndarray) -> Sealed:
        """Stores the bucket, or its delta to that of the base."""
        checksum, delta = xxhash.xxh3_128_hexdigest(bucket.data), None
        if self._base is not None and number < len(self._base.buckets):
            delta = difference(self._base.buckets[number], bucket)
        return Sealed(checksum, self._store(bucket if delta is None else delta), delta is not None)


def checksum(tensor: torch.Tensor) -> str:
    """Returns the checksum of a tensor's elements, wherever it lies."""
    return xxhash.xxh3_128_hexdigest(
        tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data
    )


def read_snapshot(manifest: Manifest, buckets: Sequence[np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of every parameter, as views on `buckets`, or on the copies that deltas are put
    into: do not write to them.

    Raises SnapshotError before the first tensor when a bucket is missing, short, or fails its checksum.
    """
    num_buckets = len(manifest.checksums)
    if len(buckets) != num_buckets + len(manifest.deltas):
        raise SnapshotError(f"snapshot {manifest.version} has {num_buckets} buckets, {len(buckets)} arrived")
    buckets, bases = list(buckets[:num_buckets]), buckets[num_buckets:]
    for number, base in zip(manifest.deltas, bases, strict=True):
        try:
            buckets[number] = changed(base, buckets[number])
        except SnapshotError as error:
            raise SnapshotError(f"snapshot {manifest.version}, bucket {number}: {error}") from None
    for number, (bucket, size, checksum) in enumerate(
        zip(buckets, manifest.sizes, manifest.checksums, strict=True)
    ):
        if bucket.nbytes != size:
            raise SnapshotError(
                f"snapshot {manifest.version}, bucket {number}: {bucket.nbytes} bytes "
                f"arrived of {size}; it is torn"
            )
        if (found := xxhash.xxh3_128_hexdigest(bucket.data)) != checksum:
            raise SnapshotError(
                f"snapshot {manifest.version}, bucket {number}: checksum {found}, expected "
                f"{checksum}; it is torn"
            )
    return ((entry.name, tensor_of(entry, buckets[entry.bucket])) for entry in manifest.params)


def tensor_of(entry: ParamEntry, bucket: np.ndarray) -> torch.Tensor:
    """Returns the parameter as a view on the bucket that it lies in."""
    dtype = getattr(torch, entry.dtype)
    num_bytes = math.prod(entry.shape) * dtype.itemsize
    # By DLPack, because `from_numpy` warns of read-only arrays, which is what the object store hands out.
    return torch.from_dlpack(bucket[entry.offset : entry.offset + num_bytes]).view(dtype).view(entry.shape)
