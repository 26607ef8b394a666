"""Event files: bytes that TensorBoard wrote itself, and what is read back of ours."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.monitor import event_file
from cluster.monitor.event_file import EventFile, event, masked_crc, record, summary


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer by number: numbers as they are, bytes as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[at : at + size]
        at += size


def events(path: Path) -> list[dict[int, Any]]:
    """The events of a file by field number, their checksums checked."""
    data, found, at = path.read_bytes(), [], 0
    while at < len(data):
        length = data[at : at + 8]
        (size,) = struct.unpack("<Q", length)
        message = data[at + 12 : at + 12 + size]
        assert struct.unpack("<I", data[at + 8 : at + 12]) == (masked_crc(length),)
        assert struct.unpack("<I", data[at + 12 + size : at + 16 + size]) == (masked_crc(message),)
        found.append(dict(fields(message)))
        at += 16 + size
    return found


def scalars(content: bytes) -> dict[str, float]:
    values = [dict(fields(value)) for number, value in fields(content) if number == 1]
    return {value[1].decode(): struct.unpack("<f", value[2])[0] for value in values}


def test_a_record_is_what_tensorboard_writes() -> None:
    # By its RecordWriter: Event(wall_time=1.5, step=300), a summary of reward/mean = 0.25.
    by_tensorboard = bytes.fromhex(BY_TENSORBOARD)
    assert record(event(1.5, 300, 5, summary({"reward/mean": 0.25}))) == by_tensorboard


BY_TENSORBOARD = (
    "220000000000000078113dfd09000000000000f83f10ac022a140a120a0b7265776172642f6d65616e150000803e6ef92fd8"
)


def test_rows_are_read_back_at_their_steps_without_what_is_unknown(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "tensorboard")
    file.log({"progress/step": 1, "reward/mean": 0.5, "eval/solve_rate": None})
    file.log({"progress/step": 300, "reward/mean": 1e39})
    file.close()
    (path,) = (tmp_path / "tensorboard").glob("*tfevents*")
    version, start, first, second = events(path)
    assert version[3] == b"brain.Event:2"
    assert start[2] == 1
    assert dict(fields(start[7])) == {1: 1}
    assert (first[2], scalars(first[5])) == (1, {"progress/step": 1.0, "reward/mean": 0.5})
    assert second[2] == 300
    assert scalars(second[5])["reward/mean"] == float("inf")


def test_a_run_that_goes_on_takes_back_the_steps_that_it_does_again(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (3, 4)):
        file = EventFile(tmp_path)
        for step in steps:
            file.log({"progress/step": step})
        file.close()
    earlier, later = sorted(tmp_path.iterdir())
    starts = [[found[2] for found in events(path) if 7 in found] for path in (earlier, later)]
    assert starts == [[1], [3]]
    file = EventFile(tmp_path)
    for step in (5, 6, 5):  # A learner that went back to its checkpoint.
        file.log({"progress/step": step})
    file.close()
    assert [found[2] for found in events(sorted(tmp_path.iterdir())[-1]) if 7 in found] == [5, 5]


def test_checksums_are_those_of_crc_32c() -> None:
    # RFC 3720, B.4: 32 bytes of zeroes.
    unmasked = (masked_crc(bytes(32)) - 0xA282EAD8) & 0xFFFFFFFF
    assert (unmasked << 15 | unmasked >> 17) & 0xFFFFFFFF == 0x8A9136AA
    assert len(set(event_file._TABLE)) == 256
