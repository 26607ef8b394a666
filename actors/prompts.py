"""Makes prompts of a dataset: every row is read, checked and tokenised before anything starts.

jsonl, parquet, hub id, reasoning-gym  --read-->  rows  --check-->  text  --tokenise-->  PromptSet
actors/sources.py, procedural.py                        actors/messages.py              core/tokenizer.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from actors.messages import clean_messages, message_problems, render, text_problems
from actors.sources import (
    EVAL_SPLIT,
    TRAIN_SPLIT,
    Bad,
    Rows,
    Source,
    kind_of,
    read_source,
    report_bad_rows,
    split_of,
)
from core.config import DataConfig
from core.errors import DataError
from core.records import Sample
from core.text import user_path
from core.tokenizer import has_chat_template, special_token_ids

PROMPT_COLUMNS = ("prompt", "question")
ANSWER_COLUMNS = ("answer", "solution", "label")
VERL_ANSWER = ("reward_model", "ground_truth")
RESERVED_COLUMNS = ("prompts", "completions")
_WRITTEN_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*["'](role|content)["']\s*:.*["'](role|content)["']\s*:.*\}\s*\]\s*\Z""", re.DOTALL
)
"""What a table makes of messages that were stored as a string, as JSON or as Python shows them."""


@dataclass(frozen=True)
class PromptRow:
    """One usable prompt.

    source_row  index in the source, from 0 (for jsonl: the line)
    text        what is tokenised: the rendered chat template, or the text as it is
    token_ids   the tokens of `text`, special tokens once; an end token that the tokenizer appends is left out
    columns     every column of the row, for the rewards; the answer is in `answer`, whatever its column was
    offline     what others generated for it (`data.offline`), no completion twice
    """

    source_row: int
    text: str
    token_ids: tuple[int, ...]
    columns: dict[str, Any]
    offline: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a dataset, in its order; `num_bad_rows` were left out
    (`data.on_bad_row=skip`); `notes` are to be told.
    """

    rows: list[PromptRow]
    num_bad_rows: int
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PromptRow:
        return self.rows[index]


def load_prompts(data: DataConfig, tokenizer: Any, *, evaluation: bool = False) -> PromptSet:
    """Returns the training prompts of `data`, or with `evaluation` the first `eval_rows` held-out ones.

    Raises DataError for nothing readable at the path (with what was tried and what is accepted), for bad rows
    (the first five with number and reason, unless they are skipped), for no usable row, and for a tokenizer
    without chat template when one is asked for.
    """
    if evaluation and data.eval_rows == 0:
        return PromptSet([], 0, "no evaluation (data.eval_rows = 0)")
    source = _read_evaluation(data) if evaluation else read_source("data.path", data.path, TRAIN_SPLIT)
    rows, bad = render_rows(source, data, tokenizer)
    report_bad_rows(source, bad, num_usable=len(rows), on_bad_row=data.on_bad_row)
    notes = () if evaluation else tuple(_notes(source, rows, tokenizer))
    return PromptSet(list(rows.values()), len(bad), source.name, notes)


def render_rows(
    source: Source, data: DataConfig, tokenizer: Any
) -> tuple[dict[int, PromptRow], dict[int, str]]:
    """Returns the usable prompts of `source` by row index, and why the other rows are bad.

    Raises DataError when there is no chat template.
    """
    if data.chat_template and not has_chat_template(tokenizer):
        raise DataError(
            "the tokenizer has no chat template. Set data.chat_template=false to use prompts as they are, "
            "or use an instruction-tuned model."
        )
    answer_column = _answer_column(source.rows)
    bad: dict[int, str] = {}
    texts: dict[int, str] = {}
    made: dict[int, tuple[int, ...]] = {}
    for index, row in source.rows.items():
        outcome = row if isinstance(row, Bad) else _render(row, answer_column, data, tokenizer)
        if isinstance(outcome, Bad):
            bad[index] = outcome.reason
            continue
        texts[index], token_ids = outcome
        if token_ids is not None:
            made[index] = token_ids
    found, failed = tokenise(tokenizer, {index: text for index, text in texts.items() if index not in made})
    bad |= failed
    prefix = () if data.chat_template else _prefix(tokenizer, texts, found)
    rows = {}
    for index, token_ids in sorted({**made, **found}.items()):
        row, token_ids = source.rows[index], _with_prefix(tokenizer, prefix, token_ids)
        if reason := _token_problem(_said(row), token_ids, len(prefix), data, tokenizer):
            bad[index] = reason
        else:
            rows[index] = PromptRow(index, texts[index], token_ids, _columns(row, answer_column))
    return rows, bad


def tokenise(tokenizer: Any, texts: dict[int, str]) -> tuple[dict[int, tuple[int, ...]], dict[int, str]]:
    """Returns token ids by row, no special token added, and the rows that the tokenizer does not take, with
    its reason.
    """
    if not texts:
        return {}, {}
    try:
        return dict(zip(texts, map(tuple, _encode(tokenizer, list(texts.values()))), strict=True)), {}
    except Exception:  # noqa: BLE001 -- tokenizers raises bare Exceptions
        found, failed = {}, {}
        for index, text in texts.items():
            try:
                found[index] = tuple(_encode(tokenizer, [text])[0])
            except Exception as error:  # noqa: BLE001 -- this one
                failed[index] = f"the tokenizer does not take {text[:40]!r}: {str(error).splitlines()[0]}"
        return found, failed


def is_unknown(tokenizer: Any, text: str, token_ids: tuple[int, ...]) -> bool:
    """Returns whether no token of `text` is one that the tokenizer knows."""
    unknown = tokenizer.unk_token_id
    return bool(token_ids) and set(token_ids) == {unknown} and str(tokenizer.unk_token) not in text


def _encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


# --- Special tokens ---


def _prefix(tokenizer: Any, texts: dict[int, str], found: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the tokens that the tokenizer puts before every text.

    What it puts after one (EOS, SEP) is not the beginning of an answer.
    """
    index = next((index for index, token_ids in found.items() if token_ids), None)
    if index is None:
        return ()
    bare, full = found[index], tuple(_encode(tokenizer, [texts[index]], add_special_tokens=True)[0])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    special = special_token_ids(tokenizer)  # The first word is another one behind a special token.
    return full[: next((place for place, token_id in enumerate(full) if token_id not in special), 0)]


def _with_prefix(tokenizer: Any, prefix: tuple[int, ...], token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the tokens with `prefix`, once, also where the text or the template brings it along."""
    shared = next(
        (length for length in range(len(prefix), 0, -1) if token_ids[:length] == prefix[-length:]), 0
    )
    token_ids = (*prefix, *token_ids[shared:])
    while tokenizer.bos_token_id is not None and token_ids[:2] == (tokenizer.bos_token_id,) * 2:
        token_ids = token_ids[1:]
    return token_ids


def _token_problem(
    said: str, token_ids: tuple[int, ...], num_added: int, data: DataConfig, tokenizer: Any
) -> str:
    """Returns what is wrong with a prompt as tokens; empty when nothing is. `said` is what its row says,
    without template.
    """
    if len(token_ids) <= num_added:
        return "the prompt has no tokens"
    if len(token_ids) > data.max_prompt_tokens:
        return (
            f"the prompt is {len(token_ids)} tokens long, data.max_prompt_tokens is {data.max_prompt_tokens}"
        )
    if tokenizer.unk_token_id in token_ids:
        spoken, _ = tokenise(tokenizer, {0: said})
        if is_unknown(tokenizer, said, spoken.get(0, ())):
            return f"the tokenizer knows no part of {said[:40]!r}: all of it is {tokenizer.unk_token}"
    return ""


def _notes(source: Source, rows: dict[int, PromptRow], tokenizer: Any) -> Iterator[str]:
    unknown = [
        index
        for index, row in rows.items()
        if tokenizer.unk_token_id in row.token_ids and tokenizer.unk_token not in row.text
    ]
    if unknown:
        yield (
            f"warning: {len(unknown)} of {len(rows)} prompts hold something that the tokenizer does not know "
            "and the policy sees as "
            f"{tokenizer.unk_token} (the first: {source.unit} {unknown[0] + 1})"
        )
    ended = sum(row.token_ids[-1] == tokenizer.eos_token_id for row in rows.values())
    if ended:
        yield (
            f"warning: {ended} of {len(rows)} prompts end in {tokenizer.eos_token}: the answer begins "
            "after what ends one"
        )
    if _answer_column(source.rows) == ".".join(VERL_ANSWER):
        yield f"{source.name}: the answers are those in {'.'.join(VERL_ANSWER)}"


# --- Checking ---


def _read_evaluation(data: DataConfig) -> Source:
    if data.eval_path is not None:
        return read_source("data.eval_path", data.eval_path, EVAL_SPLIT, limit=data.eval_rows)
    if data.path is None:
        raise DataError(
            "there are no held-out prompts: set data.eval_path, or data.eval_rows=0 to switch evaluation off."
        )
    path, _ = split_of(data.path, TRAIN_SPLIT)
    if user_path("data.path", path).is_file():
        raise DataError(
            f"data.path = {data.path} is one file: it has no split {EVAL_SPLIT!r} to evaluate on, and "
            "its rows are trained on. "
            "Set data.eval_path, or data.eval_rows=0 to switch evaluation off."
        )
    return read_source("data.path", path, EVAL_SPLIT, limit=data.eval_rows)


def _answer_column(rows: Rows) -> str | None:
    """Returns the first of ANSWER_COLUMNS that any row has, else verl's place for it.

    Returns None when no row has one: a reward may not need it.
    """
    present = {
        column for row in rows.values() if isinstance(row, dict) for column in ANSWER_COLUMNS if column in row
    }
    outer, inner = VERL_ANSWER
    if not present and any(
        isinstance(row, dict) and isinstance(row.get(outer), dict) and inner in row[outer]
        for row in rows.values()
    ):
        return f"{outer}.{inner}"
    return next((column for column in ANSWER_COLUMNS if column in present), None)


def _answer(row: dict[str, Any], column: str) -> Any:
    """Returns the row's answer. Raises KeyError when it has none."""
    outer, _, inner = column.partition(".")
    if not inner:
        return row[column]
    if not isinstance(row[outer], dict):
        raise KeyError(inner)
    return row[outer][inner]


def _columns(row: dict[str, Any] | Bad, answer_column: str | None) -> dict[str, Any]:
    assert isinstance(row, dict)
    return row if answer_column is None else {**row, "answer": _answer(row, answer_column)}


def _said(row: dict[str, Any] | Bad) -> str:
    """Returns what the row itself says, without system prompt and template."""
    assert isinstance(row, dict)
    prompt = _prompt(row)
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in clean_messages(prompt) if message["role"] != "system")


def _render(
    row: dict[str, Any], answer_column: str | None, data: DataConfig, tokenizer: Any
) -> tuple[str, tuple[int, ...] | None] | Bad:
    """Returns the text to tokenise, or the first thing that is wrong with the row.

    Tokens come along where the tokenizer made them from messages.
    """
    reason = next(_problems(row, answer_column, data), None)
    if reason is not None:
        return Bad(reason)
    prompt = _prompt(row)
    if not data.chat_template:
        return prompt, None
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else clean_messages(prompt)
    if data.system_prompt is not None:
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    rendered = render(tokenizer, messages)
    if not isinstance(rendered, Bad):
        reason = next(text_problems("what the chat template renders", rendered[0]), None)
    return rendered if reason is None else Bad(reason)


def _prompt_column(row: dict[str, Any]) -> str:
    return next((column for column in PROMPT_COLUMNS if column in row), "")


def _prompt(row: dict[str, Any]) -> Any:
    """Returns the value of the prompt's column; an array of messages (numpy) as a list."""
    prompt = row[_prompt_column(row)]
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _problems(row: dict[str, Any], answer_column: str | None, data: DataConfig) -> Iterator[str]:
    column = _prompt_column(row)
    if not column:
        yield f"no column 'prompt' or 'question'; it has {', '.join(map(repr, row)) or 'none'}"
        return
    prompt = _prompt(row)
    if isinstance(prompt, list):
        if not data.chat_template:
            yield f"{column!r} is a list of messages, which needs data.chat_template=true"
        yield from message_problems(column, prompt, data.system_prompt)
    elif isinstance(prompt, str):
        yield from text_problems(repr(column), prompt)
        if _WRITTEN_MESSAGES.match(prompt):
            yield f"{column!r} is messages written out as text: {prompt[:40]!r}. Store the list itself"
    else:
        yield f"{column!r} is {kind_of(prompt)}, expected text or a list of messages"
    if answer_column is not None:
        yield from _answer_problems(row, answer_column)
    for reserved in RESERVED_COLUMNS:
        if reserved in row:
            yield f"the column name {reserved!r} is taken by the reward protocol; rename it"


def _answer_problems(row: dict[str, Any], column: str) -> Iterator[str]:
    try:
        answer = _answer(row, column)
    except KeyError:
        yield f"no {column!r}, which other rows have"
        return
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        yield f"{column!r} is null"
    elif isinstance(answer, float) and math.isinf(answer):
        yield f"{column!r} is {answer}, which is beyond all numbers"
    elif (isinstance(answer, str) and not answer.strip()) or answer in ([], {}):
        yield f"{column!r} is empty"
