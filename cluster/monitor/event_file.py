"""TensorBoard's event files, written without TensorBoard: a few fields of a few messages.

    EventFile(RUN_DIR/tensorboard) --log(row)--> events.out.tfevents.<seconds>.<start>

A record is its length, the length's masked CRC-32C, the message, the message's (TensorFlow's tfrecords).
The message is an `Event`: wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7; a value of
a summary: tag = 1, simple_value = 2. Where a run goes on, a file begins with a session's START at its first
step: TensorBoard then forgets what earlier files have from that step on, and shows one curve.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""
_POLYNOMIAL = 0x82F63B78
"""Of CRC-32C, its bits reversed."""


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """Returns the CRC-32C of the bytes, rotated and shifted as records have it."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(message: bytes) -> bytes:
    """Returns a message as a file holds it."""
    length = struct.pack("<Q", len(message))
    return length + struct.pack("<I", masked_crc(length)) + message + struct.pack("<I", masked_crc(message))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, wire_type: int, value: bytes) -> bytes:
    size = _varint(len(value)) if wire_type == _BYTES else b""
    return _varint(number << 3 | wire_type) + size + value


def event(wall_s: float, step: int, number: int, content: bytes) -> bytes:
    """Returns an `Event` at `step` with one more field, of bytes: its version, summary or session."""
    head = _field(1, _FIXED64, struct.pack("<d", wall_s)) + _field(2, _VARINT, _varint(step))
    return head + _field(number, _BYTES, content)


def summary(values: Mapping[str, float]) -> bytes:
    """Returns a `Summary` of scalars by their tags."""
    return b"".join(
        _field(
            1,
            _BYTES,
            _field(1, _BYTES, tag.encode()) + _field(2, _FIXED32, struct.pack("<f", _single(value))),
        )
        for tag, value in values.items()
    )


def _single(value: float) -> float:
    """Returns the value as a float of 32 bits can have it: what is larger is infinite there."""
    return math.copysign(math.inf, value) if abs(value) > 3.4e38 else value


class EventFile:
    """The event file of one start of a run; `log` appends a row and hands it to the system."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError where the file cannot be made."""
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._file: BinaryIO = (directory / f"events.out.tfevents.{time.time_ns() // 1000:017}.agro").open(
            "xb"
        )
        self._newest_step = -1

    def log(self, row: Mapping[str, float | None]) -> None:
        """Writes the known values of a row at its `progress/step`. A step that is not after the one before
        takes back what was written from it on.
        """
        step, wall_s = int(row.get("progress/step") or 0), time.time()
        if self._newest_step < 0:
            self._file.write(record(event(wall_s, step, 3, b"brain.Event:2")))
        if step <= self._newest_step or self._newest_step < 0:
            start = _field(1, _VARINT, _varint(1))
            self._file.write(record(event(wall_s, step, 7, start)))
        self._newest_step = step
        known = {name: float(value) for name, value in row.items() if value is not None}
        self._file.write(record(event(wall_s, step, 5, summary(known))))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
