"""What a W&B run file holds, also that of a process that was killed: its history, row by row.

A `.wandb` file is a header and blocks of 32 KiB, each of fragments (checksum, length, kind, bytes) that make
up records: LevelDB's log format with protobuf messages in it. W&B has no public reader.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES = 7
BLOCK_BYTES = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `run.log` was given, as far as they are whole. Raises OSError."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(data)
        except DecodeError:
            return
        if record.WhichOneof("record_type") == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


def _records(content: bytes) -> Iterator[bytes]:
    position, record = HEADER_BYTES, b""
    while position + _FRAGMENT.size <= len(content):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < _FRAGMENT.size:  # No fragment starts there: zeros up to the next block.
            position += room
            continue
        _, length, kind = _FRAGMENT.unpack_from(content, position)
        fragment = content[position + _FRAGMENT.size : position + _FRAGMENT.size + length]
        if not kind or len(fragment) < length:  # What was never written.
            return
        record = fragment if kind in (_WHOLE, _FIRST) else record + fragment
        position += _FRAGMENT.size + length
        if kind in (_WHOLE, _LAST):
            yield record
