"""From a dataset to prompts: every row read, checked and tokenised before anything starts.

    jsonl, parquet, hub id  --read-->  rows  --check-->  text  --tokenise-->  PromptSet

Local jsonl is parsed here and parquet by pyarrow, both in memory: that keeps line numbers and nested values as they are,
and no cache can be stale. Hub ids go through `datasets`.
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cluster.config import DataConfig
from cluster.errors import DataError

PROMPT_COLUMNS = ("prompt", "question")
ANSWER_COLUMNS = ("answer", "solution", "label")
RESERVED_COLUMNS = ("prompts", "completions")
ROLES = ("system", "user", "assistant", "tool")
ACCEPTED = "a .jsonl or .parquet file, a directory with <split>.jsonl, <split>.parquet or <split>-*.parquet, or a hub id (id or id:subset)"
SHOWN_BAD_ROWS = 5
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class OfflineSample:
    """A logged completion. `token_ids` end in EOS unless `finish_reason` is "length"; `reward` None: not scored yet."""

    token_ids: tuple[int, ...]
    text: str
    reward: float | None
    finish_reason: str


@dataclass(frozen=True)
class PromptRow:
    """One usable prompt.

    row        index in the source, from 0 (for jsonl: the line)
    text       what is tokenised: the rendered chat template, or the text as it is
    token_ids  the tokens of `text`, special tokens once
    columns    every column of the row, for the rewards; the answer is in `answer`, whatever its column is called
    offline    what others generated for it (`data.offline`), no completion twice
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    offline: tuple[OfflineSample, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a dataset, in its order; `num_bad_rows` were left out (`data.on_bad_row=skip`)."""

    rows: list[PromptRow]
    num_bad_rows: int
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PromptRow:
        return self.rows[index]


@dataclass(frozen=True)
class Bad:
    """Why a row cannot be used."""

    reason: str


Rows: TypeAlias = dict[int, "dict[str, Any] | Bad"]


@dataclass(frozen=True)
class Source:
    """What was read: `rows` by index, and `unit`, the word for a row in messages ("line" or "row")."""

    name: str
    unit: str
    rows: Rows


def load_prompts(data: DataConfig, tokenizer: Any, *, evaluation: bool = False) -> PromptSet:
    """The training prompts of `data`, or with `evaluation` the first `eval_rows` held-out ones.

    Raises DataError: nothing readable at the path (with what was tried and what is accepted); bad rows (the first five with
    number and reason, unless they are skipped); no usable row; a tokenizer without chat template when one is asked for.
    """
    if evaluation and data.eval_rows == 0:
        return PromptSet([], 0, "no evaluation (data.eval_rows = 0)")
    source = _read_evaluation(data) if evaluation else read_source("data.path", data.path, data.split)
    rows, bad = render_rows(source, data, tokenizer)
    report_bad_rows(source, bad, num_usable=len(rows), on_bad_row=data.on_bad_row)
    return PromptSet(list(rows.values()), len(bad), source.name)


def render_rows(source: Source, data: DataConfig, tokenizer: Any) -> tuple[dict[int, PromptRow], dict[int, str]]:
    """The usable prompts of `source` by row index, and why the other rows are bad. Raises DataError without a chat template."""
    if data.chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "the tokenizer has no chat template. Set data.chat_template=false to use prompts as they are, "
            "or use an instruction-tuned model."
        )
    answer_column = _answer_column(source.rows)
    bad: dict[int, str] = {}
    texts: dict[int, str] = {}
    for index, row in source.rows.items():
        outcome = row if isinstance(row, Bad) else _render(row, answer_column, data, tokenizer)
        if isinstance(outcome, Bad):
            bad[index] = outcome.reason
        else:
            texts[index] = outcome
    rows = {}
    # A rendered chat template holds its special tokens already: they are not added a second time.
    for index, token_ids in tokenise(tokenizer, texts, add_special_tokens=not data.chat_template).items():
        if 1 <= len(token_ids) <= data.max_prompt_tokens:
            rows[index] = PromptRow(index, texts[index], token_ids, _columns(source.rows[index], answer_column))
        elif not token_ids:
            bad[index] = "the prompt has no tokens"
        else:
            bad[index] = f"the prompt is {len(token_ids)} tokens long, data.max_prompt_tokens is {data.max_prompt_tokens}"
    return rows, bad


def report_bad_rows(source: Source, bad: dict[int, str], num_usable: int, on_bad_row: str) -> None:
    """Raises DataError when there are bad rows that may not be skipped (the first five with number and reason), or no usable ones."""
    if not source.rows:
        raise DataError(f"{source.name} has no rows.")
    if num_usable and (not bad or on_bad_row == "skip"):
        return
    shown = [f"  - {source.unit} {index + 1}: {bad[index]}" for index in sorted(bad)[:SHOWN_BAD_ROWS]]
    if len(bad) > SHOWN_BAD_ROWS:
        shown.append(f"  ... and {len(bad) - SHOWN_BAD_ROWS} more")
    remedy = "Fix them, or leave them out with data.on_bad_row=skip." if num_usable else "No usable row is left."
    raise DataError("\n".join([f"{source.name}: {len(bad)} of {len(source.rows)} rows are bad", *shown, remedy]))


# Reading -------------------------------------------------------------------------------------------------------------


def _read_evaluation(data: DataConfig) -> Source:
    if data.eval_path is not None:
        return read_source("data.eval_path", data.eval_path, data.eval_split, limit=data.eval_rows)
    if data.path is None:
        raise DataError("there are no held-out prompts: set data.eval_path, or data.eval_rows=0 to switch evaluation off.")
    if Path(data.path).expanduser().is_file():
        raise DataError(
            f"data.path = {data.path} is one file: it has no split {data.eval_split!r} to evaluate on, and its rows are trained on. "
            "Set data.eval_path, or data.eval_rows=0 to switch evaluation off."
        )
    return read_source("data.path", data.path, data.eval_split, limit=data.eval_rows)


def read_source(key: str, name: str | None, split: str, limit: int | None = None) -> Source:
    """The first `limit` rows (None: all) of what `name` means; `key` is the config key it came from.

    Raises DataError when there is nothing readable, with what was tried and what is accepted.
    """
    if name is None:
        raise DataError(f"{key} is not set. Accepted: {ACCEPTED}.")
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_files(key, _split_files(key, path, split), limit)
    if path.exists():
        return _read_files(key, [path], limit)
    if not _HUB_ID.fullmatch(name) or path.suffix in (".jsonl", ".json", ".parquet") or name.startswith("."):
        raise DataError(f"{key} = {name}: there is no {path.absolute()}. Accepted: {ACCEPTED}.")
    return _read_hub(key, name, split, limit)


def _split_files(key: str, folder: Path, split: str) -> list[Path]:
    found = [[path] for path in (folder / f"{split}.jsonl", folder / f"{split}.parquet") if path.is_file()]
    shards = sorted(folder.glob(f"{glob.escape(split)}-*.parquet"))
    found += [shards] if shards else []
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(files[0].name for files in found)
        raise DataError(f"{key} = {folder} holds split {split!r} more than once ({names}). Give the file itself in {key}.")
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise DataError(
        f"{key} = {folder} has no split {split!r}: neither {split}.jsonl nor {split}.parquet nor {split}-*.parquet, but {present}."
    )


def _read_files(key: str, files: list[Path], limit: int | None) -> Source:
    path = files[0]
    name = str(path) if len(files) == 1 else f"{path.parent}/{path.name} and {len(files) - 1} more"
    try:
        if path.suffix == ".jsonl":
            return Source(name, "line", _read_jsonl(path, limit))
        if path.suffix == ".parquet":
            return Source(name, "row", _read_parquet(files, limit))
    except OSError as error:
        raise DataError(f"{key} = {path} cannot be read: {error}") from error
    raise DataError(f"{key} = {path} is neither .jsonl nor .parquet. Accepted: {ACCEPTED}.")


def _read_jsonl(path: Path, limit: int | None) -> Rows:
    """Rows by line index; blank lines are no rows."""
    with path.open("rb") as file:
        filled = ((index, line) for index, line in enumerate(file) if line.strip())
        return {index: _parse_line(line) for index, line in itertools.islice(filled, limit)}


def _parse_line(line: bytes) -> dict[str, Any] | Bad:
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return Bad(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON: {error}")
    return row if isinstance(row, dict) else Bad(f"holds {kind_of(row)}, expected an object such as {{'prompt': ..., 'answer': ...}}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _read_parquet(files: list[Path], limit: int | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            table = pq.ParquetFile(path).read()
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not a parquet file: {error}") from error
        rows += table.slice(0, None if limit is None else limit - len(rows)).to_pylist()
        if len(rows) == limit:
            break
    return dict(enumerate(rows))


def _read_hub(key: str, name: str, split: str, limit: int | None) -> Source:
    import datasets

    hub_id, _, subset = name.partition(":")
    try:
        dataset = datasets.load_dataset(hub_id, subset or None, split=split)
    except Exception as error:  # the network: datasets, the hub's client and its http library raise what they like
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{key} = {name}: there is no {Path(name).absolute()}, and as a hub dataset split {split!r} of it could not be loaded: "
            f"{type(error).__name__}: {reason}\nAccepted: {ACCEPTED}."
        ) from error
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return Source(f"{name} ({split})", "row", dict(enumerate(dataset.to_list())))


# Checking ------------------------------------------------------------------------------------------------------------


def _answer_column(rows: Rows) -> str | None:
    """The first of ANSWER_COLUMNS that any row has; None when none has one (a reward may not need it)."""
    present = {column for row in rows.values() if isinstance(row, dict) for column in ANSWER_COLUMNS if column in row}
    return next((column for column in ANSWER_COLUMNS if column in present), None)


def _columns(row: dict[str, Any] | Bad, answer_column: str | None) -> dict[str, Any]:
    assert isinstance(row, dict)
    return row if answer_column is None else {**row, "answer": row[answer_column]}


def _render(row: dict[str, Any], answer_column: str | None, data: DataConfig, tokenizer: Any) -> str | Bad:
    """The text to tokenise, or the first thing that is wrong with the row."""
    reason = next(_problems(row, answer_column, data), None)
    if reason is not None:
        return Bad(reason)
    prompt = row[_prompt_column(row)]
    if not data.chat_template:
        return prompt
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if data.system_prompt is not None:
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        return Bad(f"the chat template refuses the messages: {error}")


def _prompt_column(row: dict[str, Any]) -> str:
    return next((column for column in PROMPT_COLUMNS if column in row), "")


def _problems(row: dict[str, Any], answer_column: str | None, data: DataConfig) -> Iterator[str]:
    column = _prompt_column(row)
    if not column:
        yield f"no column 'prompt' or 'question'; it has {', '.join(map(repr, row)) or 'none'}"
        return
    prompt = row[column]
    if isinstance(prompt, list):
        if not data.chat_template:
            yield f"{column!r} is a list of messages, which needs data.chat_template=true"
        yield from _message_problems(column, prompt, data.system_prompt)
    elif isinstance(prompt, str):
        yield from text_problems(repr(column), prompt)
    else:
        yield f"{column!r} is {kind_of(prompt)}, expected text or a list of messages"
    if answer_column is not None:
        yield from _answer_problems(row, answer_column)
    for reserved in RESERVED_COLUMNS:
        if reserved in row:
            yield f"the column name {reserved!r} is taken by the reward protocol; rename it"


def text_problems(what: str, text: str) -> Iterator[str]:
    """What is wrong with a text called `what`."""
    if not text.strip():
        yield f"{what} is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        yield f"{what} holds half a surrogate pair, which is no character"


def _message_problems(column: str, messages: list[Any], system_prompt: str | None) -> Iterator[str]:
    if not messages:
        yield f"{column!r} is an empty list of messages"
        return
    for number, message in enumerate(messages, start=1):
        what = f"message {number} of {column!r}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            yield f"{what} is not {{'role': ..., 'content': ...}}"
            return
        if message["role"] not in ROLES:
            yield f"{what} has the role {message['role']!r}, expected one of {', '.join(ROLES)}"
        if isinstance(message["content"], str):
            yield from text_problems(f"the content of {what}", message["content"])
        else:
            yield f"the content of {what} is {kind_of(message['content'])}, expected text"
    if messages[-1]["role"] == "assistant":
        yield f"the last message of {column!r} is the assistant's: nothing is left to answer"
    if system_prompt is not None and any(message["role"] == "system" for message in messages):
        yield f"{column!r} has a system message of its own, but data.system_prompt is set"


def _answer_problems(row: dict[str, Any], column: str) -> Iterator[str]:
    if column not in row:
        yield f"no {column!r}, which other rows have"
        return
    answer = row[column]
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        yield f"{column!r} is null"
    elif (isinstance(answer, str) and not answer.strip()) or answer in ([], {}):
        yield f"{column!r} is empty"


def kind_of(value: Any) -> str:
    """What a JSON value is, as its author would say."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def tokenise(tokenizer: Any, texts: dict[int, str], *, add_special_tokens: bool) -> dict[int, tuple[int, ...]]:
    """Token ids by row."""
    if not texts:
        return {}
    encoded = tokenizer(list(texts.values()), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return {index: tuple(token_ids) for index, token_ids in zip(texts, encoded["input_ids"], strict=True)}
