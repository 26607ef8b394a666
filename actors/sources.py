"""Reads a dataset (jsonl, parquet or a hub id) into rows as they are, with the reason for each that cannot be
read.

Local jsonl is parsed here and parquet by pyarrow, both in memory: that keeps line numbers and nested values
as they are, and no cache can be stale. Hub ids go through `datasets`.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from actors.dataset import procedural
from core.errors import DataError
from core.text import option_of, user_path

if TYPE_CHECKING:
    import pyarrow as pa

ACCEPTED = (
    "a .jsonl or .parquet file, a directory with <split>.jsonl, <split>.parquet or <split>-*.parquet, a hub "
    "id (id or id:subset), "
    "reasoning_gym:FAMILY"
)
SHOWN_BAD_ROWS = 5
MAX_DEPTH = 100
TRAIN_SPLIT, EVAL_SPLIT = procedural.TRAIN_SPLIT, "test"
_OF_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".xz", ".zip")
"""Endings of files: the hub is not asked for such, which takes long without a network."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_DISGUISES = {
    b"version https://git-lfs": "a pointer of git-lfs, not the data: fetch the file with `git lfs pull`",
    b"\x1f\x8b": "compressed (gzip): unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it",
    b"\xfd7zXZ": "compressed (xz): unpack it",
    b"BZh": "compressed (bzip2): unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a parquet file: let its name end in .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
"""First bytes of files that are not lines of JSON, whatever their name says, and what they are."""


@dataclass(frozen=True)
class Bad:
    """Stands in place of a row that cannot be used, and says why: `Bad("not JSON: ... (column 3)")`."""

    reason: str


Rows: TypeAlias = dict[int, "dict[str, Any] | Bad"]


@dataclass(frozen=True)
class Source:
    """A dataset that was read: `rows` by index, and `unit`, the word for a row in messages ("line" or "row").

    source = read_source("data.path", "configs/arithmetic", "train")
    source.rows[0]                          # {"prompt": "12+7=", "answer": "19"}, or a Bad
    """

    name: str
    unit: str
    rows: Rows


def split_of(name: str, otherwise: str) -> tuple[str, str]:
    """Returns the name of a dataset without `?split=...`, and that split; `otherwise` where it says none."""
    place, split = option_of(name, "split")
    return place, otherwise if split is None else split


def read_source(
    key: str, name: str | None, split: str, limit: int | None = None, trained: Sequence[str] = ()
) -> Source:
    """Returns the first `limit` rows (None: all) of what `name` means; `key` is the config key it came from.

    `split` is read of a directory or a hub id, unless the name ends in `?split=...`. What is generated on the
    spot has no prompt of the sources `trained` (those of `data.path`); files are told apart by their user.

    Raises DataError when there is nothing readable, with what was tried and what is accepted; ConfigError for
    a `~name` that is nobody.
    """
    if name is None:
        raise DataError(f"{key} is not set. Accepted: {ACCEPTED}.")
    name, split = split_of(name, split)
    if name.startswith(procedural.PREFIX):
        known = [split_of(other, TRAIN_SPLIT) for other in trained]
        return Source(f"{name} ({split})", "row", dict(procedural.read_rows(key, name, split, limit, known)))
    path = user_path(key, name)
    try:
        if path.is_dir():
            return _read_files(key, _split_files(key, path, split), limit)
        if path.is_file():
            return _read_files(key, [path], limit)
        is_there = path.exists()
    except OSError as error:  # No permission, a name too long, a disk that fails.
        raise DataError(f"{key} = {path} cannot be read: {error.strerror or error}.") from None
    if is_there:
        raise DataError(
            f"{key} = {path} is a device, a pipe or a socket, which cannot be read twice. "
            f"Accepted: {ACCEPTED}."
        )
    if not _HUB_ID.fullmatch(name) or path.suffix in _OF_FILES or name.startswith("."):
        raise DataError(f"{key} = {name}: there is no {path.absolute()}. Accepted: {ACCEPTED}.")
    return _read_hub(key, name, split, limit)


def report_bad_rows(source: Source, bad: dict[int, str], num_usable: int, on_bad_row: str) -> None:
    """Raises DataError when there are bad rows that may not be skipped (the first with number and
    reason), or no usable ones.
    """
    if not source.rows:
        raise DataError(f"{source.name} has no rows.")
    if num_usable and (not bad or on_bad_row == "skip"):
        return
    num_shown = 1 if len(set(bad.values())) == 1 else SHOWN_BAD_ROWS
    shown = [f"  - {source.unit} {index + 1}: {bad[index]}" for index in sorted(bad)[:num_shown]]
    if len(bad) > num_shown:
        shown.append(
            f"  ... and {len(bad) - num_shown} more{', for the same reason' if num_shown == 1 else ''}"
        )
    remedy = (
        "Fix them, or leave them out with data.on_bad_row=skip." if num_usable else "No usable row is left."
    )
    raise DataError(
        "\n".join([f"{source.name}: {len(bad)} of {len(source.rows)} rows are bad", *shown, remedy])
    )


def kind_of(value: Any) -> str:
    """Says what a value of a row is, as its author would."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _split_files(key: str, folder: Path, split: str) -> list[Path]:
    if not split or split.startswith(("/", "~")) or ".." in PurePath(split).parts or "\0" in split:
        raise DataError(
            f"{split!r} is no name of a split (?split=...) of {key} = {folder}: it stands "
            f"for {folder}/<split>.jsonl "
            f"or .parquet. To read one file, give its path in {key}."
        )
    found = [[path] for path in (folder / f"{split}.jsonl", folder / f"{split}.parquet") if path.is_file()]
    shards = sorted(path for path in folder.glob(f"{glob.escape(split)}-*.parquet") if path.is_file())
    found += [shards] if shards else []
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(files[0].name for files in found)
        raise DataError(
            f"{key} = {folder} holds split {split!r} more than once ({names}). Give the file itself in {key}."
        )
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise DataError(
        f"{key} = {folder} has no split {split!r}: neither {split}.jsonl nor {split}.parquet nor "
        f"{split}-*.parquet, but {present}."
    )


def _read_files(key: str, files: list[Path], limit: int | None) -> Source:
    path = files[0]
    name = str(path) if len(files) == 1 else f"{path.parent}/{path.name} and {len(files) - 1} more"
    if path.suffix == ".jsonl":
        return Source(name, "line", _read_jsonl(path, limit))
    if path.suffix == ".parquet":
        return Source(name, "row", _read_parquet(files, limit))
    raise DataError(f"{key} = {path} is neither .jsonl nor .parquet. Accepted: {ACCEPTED}.")


# --- jsonl ---


def _read_jsonl(path: Path, limit: int | None) -> Rows:
    """Returns rows by line index; blank lines are no rows."""
    with path.open("rb") as file:
        head = file.peek(32)
        for start, what in _DISGUISES.items():
            if head.startswith(start):
                raise DataError(f"{path} is {what}. Accepted: {ACCEPTED}.")
        filled = ((index, line) for index, line in enumerate(file) if line.strip())
        return {index: _parse_line(line) for index, line in itertools.islice(filled, limit)}


def _parse_line(line: bytes) -> dict[str, Any] | Bad:
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if b"\\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
            return Bad(f"lists and objects lie within each other more than {MAX_DEPTH} deep")
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 (byte {error.start + 1})")
    except UnicodeEncodeError:
        return Bad("a text in it holds half a surrogate pair, which is no character")
    except json.JSONDecodeError as error:
        return Bad(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON: {error}")
    return (
        row
        if isinstance(row, dict)
        else Bad(f"holds {kind_of(row)}, expected an object such as {{'prompt': ..., 'answer': ...}}")
    )


def _depth(value: Any) -> int:
    """Returns how many lists and objects lie within each other."""
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inner(outer)]:
        depth += 1
    return depth


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of `pairs`. Raises ValueError for a key that is there twice: json would keep the
    last one in silence.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name[:40]!r} is there twice")
    return found


# --- parquet ---


def _read_parquet(files: list[Path], limit: int | None) -> Rows:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any] | Bad] = []
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
        except Exception as error:  # noqa: BLE001 -- of a torn file pyarrow raises what it comes upon
            with path.open("rb") as opened:
                is_pointer = opened.read(16).startswith(b"version https://")
            why = (
                "it is a pointer of git-lfs: `git lfs pull`"
                if is_pointer
                else str(error).strip().split("\n")[0]
            )
            raise DataError(f"{path} is not a parquet file that can be read: {why}") from None
        if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
            raise DataError(
                f"{path} has two columns called {twice[0]!r}. Write it again with a name for each."
            )
        rows += _table_rows(table.slice(0, None if limit is None else limit - len(rows)))
        if len(rows) == limit:
            break
    return dict(enumerate(rows))


def _table_rows(table: pa.Table) -> list[dict[str, Any] | Bad]:
    """Returns the table's rows as Python values.

    A row is Bad where a cell has no such value: text that is no UTF-8, a date beyond all calendars.
    """
    columns = {name: _cells(name, table.column(name)) for name in table.column_names}
    rows: list[dict[str, Any] | Bad] = []
    for cells in zip(*columns.values(), strict=True):
        bad = next((cell for cell in cells if isinstance(cell, Bad)), None)
        rows.append(bad or dict(zip(columns, cells, strict=True)))
    return rows


def _cells(name: str, column: pa.ChunkedArray) -> list[Any]:
    try:
        wanted = _in_known_zones(column.type)
        column = column if wanted == column.type else column.cast(wanted)
        return list(column.to_pylist())
    except Exception:  # noqa: BLE001 -- one cell of it; found, and told, below
        return [_cell(name, cell) for cell in column]


def _cell(name: str, cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Bad(f"column {name!r} holds text that is not UTF-8 (byte {error.start + 1})")
    except Exception as error:  # noqa: BLE001 -- whatever Python has no value for
        return Bad(f"column {name!r} holds a {cell.type} that cannot be read: {error}")


def _in_known_zones(kind: pa.DataType) -> pa.DataType:
    """Returns the type with UTC for every time zone that this machine does not know.

    The moments stay the same, since parquet keeps them in UTC anyway.
    """
    import pyarrow as pa

    if pa.types.is_timestamp(kind) and kind.tz is not None:
        try:
            pa.scalar(0, kind).as_py()
        except Exception:  # noqa: BLE001 -- pyarrow asks zoneinfo, then pytz: what the last of them raised
            return pa.timestamp(kind.unit, "UTC")
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_in_known_zones(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_in_known_zones(kind.key_type), _in_known_zones(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_in_known_zones(kind.value_type)), kind.list_size)
    for is_kind, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(kind):
            return make(kind.value_field.with_type(_in_known_zones(kind.value_type)))
    return kind


# --- the hub ---


def _read_hub(key: str, name: str, split: str, limit: int | None) -> Source:
    import datasets

    hub_id, _, subset = name.partition(":")
    try:
        dataset = datasets.load_dataset(hub_id, subset or None, split=split)
        if limit is not None:
            dataset = dataset.select(range(min(limit, len(dataset))))
        rows = dataset.to_list()
    # the network: datasets, the hub's client and its http library raise what they like
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{key} = {name}: there is no {Path(name).absolute()}, and as a hub dataset split {split!r} of "
            "it could not be loaded: "
            f"{type(error).__name__}: {reason}\nAccepted: {ACCEPTED}."
        ) from error
    return Source(f"{name} ({split})", "row", dict(enumerate(rows)))
