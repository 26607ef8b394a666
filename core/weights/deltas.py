"""What has changed of a bucket since another snapshot: few elements, where a step is small and weights are of
16 bits.

    difference(base, bucket) --> delta | None, when it would not be much smaller
    changed(base, delta)     --> the bucket

A delta is the number of places as 8 bytes, then for each place how many 16-bit words are left out before it,
a byte, then the words there, as they are now. Where more than 255 words are left out, places between are
listed too, with the words they have. So a changed element of 16 bits costs 3 bytes, and which dtypes lie in a
bucket does not matter. Nothing here says whether the outcome is right: the bucket's checksum does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from core.errors import SnapshotError

MOST = 0.5
"""A delta above this share of its bucket is not worth its work."""
_HEAD_BYTES = 8
_LONGEST = 256  # From one place to the next, in words.


def difference(base: npt.NDArray[np.uint8], bucket: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
    """Returns what makes `bucket` of `base`, both uint8 [bytes]; None where the whole is sent instead."""
    if base.nbytes != bucket.nbytes or bucket.nbytes % 2:
        return None
    words = bucket.view("<u2")
    places = _near(np.flatnonzero(base.view("<u2") != words))
    size_bytes = _size_bytes(len(places))
    if size_bytes > MOST * bucket.nbytes:
        return None
    delta = np.zeros(size_bytes, np.uint8)
    delta[:_HEAD_BYTES] = np.frombuffer(len(places).to_bytes(_HEAD_BYTES, "little"), np.uint8)
    delta[_HEAD_BYTES : _HEAD_BYTES + len(places)] = np.diff(places, prepend=-1) - 1
    delta[size_bytes - 2 * len(places) :].view("<u2")[:] = words[places]
    return delta


def changed(base: npt.NDArray[np.uint8], delta: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns a copy of `base` with the changes of `delta`. Raises SnapshotError for what is none of it."""
    count = int.from_bytes(delta[:_HEAD_BYTES].tobytes(), "little")
    if delta.nbytes != _size_bytes(count) or base.nbytes % 2:
        raise SnapshotError(f"a delta of {count} places in {delta.nbytes} bytes: it is torn")
    gaps = delta[_HEAD_BYTES : _HEAD_BYTES + count]
    places = np.cumsum(gaps, dtype=np.int64) + np.arange(count)
    bucket = base.copy()
    words = bucket.view("<u2")
    if count and places[-1] >= len(words):
        raise SnapshotError(f"a delta changes word {places[-1]} of {len(words)}: it is torn")
    words[places] = delta[delta.nbytes - 2 * count :].view("<u2")
    return bucket


def _near(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the places with others between them, none further than `_LONGEST` from the one before."""
    before = np.concatenate(([-1], places[:-1])) if len(places) else places
    steps = (places - before - 1) // _LONGEST + 1
    if not (steps > 1).any():
        return places
    step = np.arange(steps.sum()) - np.repeat(np.cumsum(steps) - steps, steps) + 1
    return np.where(
        step == np.repeat(steps, steps),
        np.repeat(places, steps),
        np.repeat(before, steps) + _LONGEST * step,
    )


def _size_bytes(count: int) -> int:
    """Returns the size of a delta of so many places; the words begin at an even byte."""
    return _HEAD_BYTES + count + count % 2 + 2 * count
