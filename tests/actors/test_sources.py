"""Files of rows: what can be read is, as it is; everything else is one error, or one bad row, that says
where and what.
"""

from __future__ import annotations

import gzip
import json
import os
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.sources import Bad, read_source
from cluster.preparation.prepare import check_named
from core.errors import ConfigError, DataError
from core.text import printable, user_path
from tests.support.configs import offline_config


def read(path: Path | str, split: str = "train") -> dict[int, Any]:
    return read_source("data.path", str(path), split).rows


def write_table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


NOT_UTF8 = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())


def test_a_cell_that_is_no_utf8_is_a_bad_row_and_the_others_are_read(tmp_path):
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2]), NOT_UTF8)
    for column in (NOT_UTF8, NOT_UTF8.dictionary_encode(), nested):
        rows = read(write_table(tmp_path / "train.parquet", prompt=["x", "y"], text=column))
        assert rows[0]["prompt"] == "x"
        assert rows[1] == Bad("column 'text' holds text that is not UTF-8 (byte 1)")


def test_a_moment_in_a_time_zone_that_nobody_knows_is_read_in_utc(tmp_path):
    mars, here = pa.timestamp("us", "Mars/Phobos"), pa.timestamp("us", "+05:30")
    path = write_table(
        tmp_path / "train.parquet",
        mars=pa.array([10**6], mars),
        here=pa.array([10**6], here),
        nested=pa.array([[{"at": 10**6}]], pa.list_(pa.struct([("at", mars)]))),
    )
    moment = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    (row,) = read(path).values()
    assert row == {"mars": moment, "here": moment, "nested": [{"at": moment}]}
    assert row["here"].tzinfo == timezone(timedelta(hours=5, minutes=30))


def test_other_types_are_read_and_a_date_beyond_all_calendars_is_a_bad_row(tmp_path):
    path = write_table(
        tmp_path / "train.parquet",
        price=[Decimal("1.50"), None],
        raw=[b"\xff", b""],
        pairs=pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32())),
        day=pa.array([0, 2**30], pa.date32()),
    )
    rows = read(path)
    assert (rows[0]["price"], rows[0]["raw"], rows[0]["pairs"]) == (Decimal("1.50"), b"\xff", [("k", 1)])
    assert rows[1].reason.startswith("column 'day' holds a date32[day] that cannot be read")


def torn(content: bytes) -> dict[str, bytes]:
    return {
        "cut": content[:-9],
        "head": content[:5],
        "empty": b"",
        "text": b"hello",
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
    }


@pytest.mark.parametrize("kind", torn(b""))
def test_a_torn_parquet_file_is_named(tmp_path, kind):
    path = write_table(tmp_path / "train.parquet", prompt=["a"])
    path.write_bytes(torn(path.read_bytes())[kind])
    with pytest.raises(
        DataError,
        match=rf"{path} is not a parquet file that can be read: "
        rf"{'.*git lfs pull' if kind == 'lfs' else '.'}",
    ):
        read(path)


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]),
        tmp_path / "train.parquet",
    )
    with pytest.raises(DataError, match=r"two columns called 'prompt'"):
        read(tmp_path)


LINES = [
    (b'{"prompt": "a", "prompt": "b"}', "not JSON: the key 'prompt' is there twice"),
    (b'{"prompt": "a", "meta": {"x": 1, "x": 1}}', "not JSON: the key 'x' is there twice"),
    (
        b'{"prompt": "a", "answer": "\\uDC00"}',
        "a text in it holds half a surrogate pair, which is no character",
    ),
    (b'{"prompt": "a", "answer": Infinity}', "not JSON: Infinity is not a JSON value"),
    (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    (
        b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}",
        "lists and objects lie within each other more than 100 deep",
    ),
    (b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data (column 17)"),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_a_line_that_is_no_row_says_why(tmp_path, line, reason):
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "a"}\r\n' + line + b"\r\n")
    first, second = read(tmp_path).values()
    assert first == {"prompt": "a"}
    assert second.reason.startswith(reason)


def test_whole_pairs_of_surrogates_and_byte_order_marks_are_read(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "\\ud83d\\ude42"}')
    assert read(tmp_path) == {0: {"prompt": "🙂"}}


ROW = json.dumps({"prompt": "a"}).encode()
DISGUISED = [
    (gzip.compress(ROW, mtime=0), r"is compressed \(gzip\): unpack it"),
    (ROW.decode().encode("utf-16"), r"is UTF-16: save it as UTF-8"),
    (b"PAR1....PAR1", r"is a parquet file: let its name end in \.parquet"),
    (b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of git-lfs.*git lfs pull"),
]


@pytest.mark.parametrize(("content", "message"), DISGUISED)
def test_a_file_that_is_no_lines_of_json_says_what_it_is(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("split", ["/etc/passwd", "../train", "~/train", "a/../../b", "", "nul\0"])
def test_a_split_is_a_name_and_no_path(tmp_path, split):
    (tmp_path / "train.jsonl").write_bytes(ROW)
    with pytest.raises(
        DataError,
        match=r"is no name of a split \(\?split=\.\.\.\) of "
        r"data\.path = .*To read one file",
    ):
        read(tmp_path, split)


def test_pipes_and_devices_are_refused_before_anything_waits_for_them(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", "/dev/zero", "/dev/stdin"):
        with pytest.raises(DataError, match="is a device, a pipe or a socket"):
            read(path)
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="has no split 'train'"):
        read(tmp_path)


def test_names_that_no_file_system_takes_are_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read(f"{tmp_path}/{'x' * 300}.jsonl")
    with pytest.raises(ConfigError, match="holds a NUL character"):
        read(f"{tmp_path}/a\0b.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match="there is no"):
        read(tmp_path / "loop.jsonl")


@pytest.mark.parametrize("field", ["data.path", "data.eval_path", "data.offline", "model.path", "run.dir"])
def test_a_home_of_nobody_is_named_with_its_field(field):
    with pytest.raises(
        ConfigError,
        match=rf"{field} = ~nobody-here/x: ~nobody-here has no meaning here: "
        r"there is no user 'nobody-here'",
    ):
        user_path(field, "~nobody-here/x")
    if field.startswith("data."):
        data = {
            "path": "none",
            "offline": "none?share=0.5",
            field.removeprefix("data."): "~nobody-here/x.jsonl?share=0.5",
        }
        config = offline_config("none", data=data, actors={"count": 1})
        with pytest.raises(ConfigError, match=f"{field} = ~nobody-here"):
            check_named(config)


def test_without_a_home_a_tilde_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("data.path", "~/x") == tmp_path / "x"
    monkeypatch.delenv("HOME")
    # As it answers where the user has no entry either.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(
        ConfigError,
        match=r"data\.path = ~/x: ~ has no meaning here: this user has no home "
        r"directory",
    ):
        user_path("data.path", "~/x")


def test_shown_text_moves_no_cursor():
    text = "\x1b[2J\x07a\r\n\tb\x00\u202e\ud800é🙂"
    assert printable(text) == "\\x1b[2J\\x07a\\r\n\tb\\x00\\u202e\\ud800é🙂"


@pytest.mark.parametrize(
    "kind",
    [
        pa.map_(pa.string(), pa.timestamp("us", "Mars/X")),
        pa.large_list(pa.timestamp("us", "Mars/X")),
        pa.list_(pa.timestamp("us", "Mars/X"), 1),
    ],
    ids=str,
)
def test_an_unknown_time_zone_is_read_as_utc_however_deep_it_lies(kind, tmp_path):
    value = [("k", 1)] if pa.types.is_map(kind) else [1]
    pq.write_table(pa.table({"prompt": ["a"], "t": pa.array([value], kind)}), tmp_path / "train.parquet")
    row = read_source("data.path", str(tmp_path), "train").rows[0]
    assert isinstance(row, dict)
    found = row["t"][0][1] if pa.types.is_map(kind) else row["t"][0]
    assert found.utcoffset() == timedelta(0)
