"""Arrays that are the bytes they are sent as: token ids, log-probs, bits of a mask.

A record holds them as raw bytes, in memory as on the wire; `numpy()` gives the values.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt


class ArrayBytes:
    """An immutable value that is the bytes it is sent as; two are equal when class and bytes are."""

    __slots__ = ("data",)
    data: bytes

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, ArrayBytes) and other.data == self.data

    def __hash__(self) -> int:
        return hash(self.data)


class _Numbers(ArrayBytes):
    """Holds numbers of one type, of four bytes each, little-endian whatever the machine."""

    __slots__ = ()
    dtype: ClassVar[np.dtype[Any]]
    size_bytes: ClassVar[int] = 4  # numpy takes longer to say it than a length takes to compute.

    def __init__(self, data: bytes = b"") -> None:
        """Makes an array over `data`. Raises ValueError for bytes that are no whole number of values."""
        if len(data) % self.size_bytes:
            raise ValueError(
                f"{len(data)} bytes are no whole number of {self.dtype.name} values: torn, or foreign"
            )
        self.data = data

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Returns the array of these values. Raises OverflowError for a whole number that the type does not
        hold.
        """
        if not isinstance(values, np.ndarray):
            found = array(cls.dtype.char, values)  # Several times as fast as numpy from a list.
            if sys.byteorder == "big":
                found.byteswap()
            return cls(found.tobytes())
        kept = values.astype(cls.dtype, copy=False)
        if kept.dtype != values.dtype and kept.dtype.kind == "i" and (kept != values).any():
            raise OverflowError(f"{values[kept != values][0]} is no {cls.dtype.name}")
        return cls(kept.tobytes())

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Returns the values of all `parts`, one after another."""
        return cls(b"".join(part.data for part in parts))

    def numpy(self) -> npt.NDArray[Any]:
        """Returns the values as a read-only array over the bytes: nothing is copied."""
        return np.frombuffer(self.data, self.dtype)

    def __len__(self) -> int:
        return len(self.data) // self.size_bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}.of({self.numpy().tolist()})"


class Int32s(_Numbers):
    """Token ids. Example: `Int32s.of([5, 6]).numpy()`."""

    __slots__ = ()
    dtype = np.dtype("<i4")


class Float32s(_Numbers):
    """Log-probs, nats: what vLLM has is float32 too, so that nothing is lost. Example:
    `Float32s.of([-0.5]).numpy()`.
    """

    __slots__ = ()
    dtype = np.dtype("<f4")


class Bits(ArrayBytes):
    """Truth values, eight in a byte, the first in the highest bit. Example: `Bits.runs(3, 2)` is 0 0 0 1 1.

    The bytes begin with one that counts the unused bits, all 0, at the end of the last.
    """

    __slots__ = ()

    def __init__(self, data: bytes = b"\0") -> None:
        """Takes the bits in `data`. Raises ValueError for bytes that are none."""
        num_unused = data[0] if data else -1
        is_whole = 0 <= num_unused <= (7 if len(data) > 1 else 0)
        if not is_whole or data[-1] & ((1 << num_unused) - 1) * (len(data) > 1):
            raise ValueError(
                f"{len(data)} bytes that begin with {data[:2].hex() or 'nothing'} are no bits: torn, "
                "or foreign"
            )
        self.data = data

    @classmethod
    def of(cls, values: Iterable[bool]) -> Self:
        """Returns these truth values as bits."""
        found = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.bool_)
        return cls(bytes([-len(found) % 8]) + np.packbits(found).tobytes())

    @classmethod
    def runs(cls, *lengths: int) -> Self:
        """Returns so many 0s, then so many 1s, then so many 0s again, and so on: the mask of observations and
        actions in turn.
        """
        value = 0  # All bits as one number: the fastest there is for few runs, as there are in a sample.
        for place, length in enumerate(lengths):
            value = (value << length) | ((1 << length) - 1 if place % 2 else 0)
        count = sum(lengths)
        num_unused = -count % 8
        return cls(bytes([num_unused]) + (value << num_unused).to_bytes((count + num_unused) // 8))

    def numpy(self) -> npt.NDArray[np.bool_]:
        """Returns the truth values as a new array, bool [len]."""
        return np.unpackbits(np.frombuffer(self.data, np.uint8, offset=1), count=len(self)).view(np.bool_)

    def count(self) -> int:
        """Returns how many of the bits are 1."""
        return int.from_bytes(self.data[1:]).bit_count()

    def __len__(self) -> int:
        return 8 * (len(self.data) - 1) - self.data[0]

    def __repr__(self) -> str:
        return f"Bits.of({self.numpy().astype(int).tolist()})"
