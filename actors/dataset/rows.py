"""What a row of a dataset asks: its prompt, its answer, and the environment that it is played in.

    row --RowReader.read--> Asked(prompt, columns, environment), or a Bad that says why not

`data.columns` first gives columns their names; then the prompt is the first of PROMPT_COLUMNS that the row
has, in any form (actors/dataset/forms.py), and the answer the first of ANSWER_COLUMNS that the dataset has,
verl's `reward_model.ground_truth`, or the answer that ends a conversation. What is not plain is told at the
start.

Nothing is rendered or tokenised here (actors/prompts.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from actors.dataset.forms import CONVERSATIONS, Conversation, conversation_of
from actors.messages import clean_messages, message_problems, text_problems
from actors.sources import Bad, Rows, kind_of
from core.config import DataConfig
from core.text import ONLY

PROMPT_COLUMNS = ("prompt", "question", "problem", *CONVERSATIONS)
ANSWER_COLUMNS = ("answer", "solution", "label")
VERL_ANSWER = ("reward_model", "ground_truth")
ENVIRONMENT_COLUMN = "environment"
RESERVED_COLUMNS = ("prompts", "completions")
_WRITTEN_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:.*["'](role|content|from|value)["']\s*:.*\}\s*\]\s*\Z""",
    re.DOTALL,
)
"""What a table makes of messages that were stored as a string, as JSON or as Python shows them."""


@dataclass(frozen=True)
class Asked:
    """What one row asks.

    prompt       text, or clean messages; None where an environment's `reset` shows the first thing
    columns      every column of the row; the answer is in `answer`, whatever its column was
    environment  the name of the environment that it is played in; None where none is configured
    """

    prompt: str | list[dict[str, Any]] | None
    columns: dict[str, Any]
    environment: str | None = None

    @property
    def said(self) -> str:
        """Returns what the row itself says, without system prompt and template; empty without a prompt."""
        if isinstance(self.prompt, list):
            return "\n".join(m["content"] for m in self.prompt if m["role"] != "system")
        return self.prompt or ""


class RowReader:
    """Reads the rows of one dataset.

    `environments` are the names of those configured: none, and every row needs a prompt; one, and all rows
    are played in it; several, and the column `environment` of each row chooses. Where the one has no name,
    the column is the user's own.

        reader = RowReader(source.rows, data, ())
        reader.read({"prompt": "1+1=", "answer": "2"})       # Asked("1+1=", {"prompt": "1+1=", "answer": "2"})
    """

    def __init__(self, rows: Rows, data: DataConfig, environments: Iterable[str]) -> None:
        self._data, self._environments = data, tuple(environments)
        self._answer_column = "answer" if "answer" in data.columns else _answer_column(rows)
        self._forms: Counter[str] = Counter()

    def notes(self, name: str) -> Iterator[str]:
        """Yields what to tell of how the rows of the dataset called `name` were read."""
        if self._answer_column == ".".join(VERL_ANSWER):
            yield f"{name}: the answers are those in {self._answer_column}"
        for form, count in self._forms.items():
            yield f"{name}: {form} ({count} rows)"

    def read(self, row: dict[str, Any]) -> Asked | Bad:
        """Returns what the row asks, or the first thing that is wrong with it."""
        for name, path in self._data.columns.items():
            found = value_at(row, path)
            if isinstance(found, Bad):
                return Bad(f"data.columns: {name} = {path}: {found.reason}")
            row = {**row, name: found}
        column = next((column for column in PROMPT_COLUMNS if column in row), "")
        prompt: Any = row[column] if column else None
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # An array of messages (numpy).
        talk = conversation_of(column, prompt) if isinstance(prompt, list) else Conversation([])
        if isinstance(talk, Bad):
            return talk
        prompt = talk.messages if isinstance(prompt, list) else prompt
        reason = next(self._problems(row, column, prompt), None)
        if reason is not None:
            return Bad(reason)
        for form in self._told(column, talk):
            self._forms[form] += 1
        clean = clean_messages(prompt) if isinstance(prompt, list) else prompt
        return Asked(clean, self._columns(row, talk.answer), self._environment(row))

    def _told(self, column: str, talk: Conversation) -> Iterator[str]:
        """Yields how the row was read, where that is not plain."""
        if column not in ("", "prompt", "question"):
            yield f"the prompts are in {column!r}"
        yield from talk.forms
        if talk.answer is not None:
            becomes = (
                "it is the answer"
                if self._answer_column is None
                else "the answer is in " + repr(self._answer_column)
            )
            yield f"the last message of {column!r}, the assistant's, is no part of the prompt: {becomes}"

    def _columns(self, row: dict[str, Any], answer: str | None) -> dict[str, Any]:
        if self._answer_column is not None:
            return {**row, "answer": _answer(row, self._answer_column)}
        return row if answer is None else {**row, "answer": answer}

    def _problems(self, row: dict[str, Any], column: str, prompt: Any) -> Iterator[str]:
        if column or not self._environments:
            yield from _prompt_problems(row, column, prompt, self._data)
        if self._answer_column is not None:
            yield from _answer_problems(row, self._answer_column)
        yield from self._environment_problems(row)
        for reserved in RESERVED_COLUMNS:
            if reserved in row:
                yield f"the column name {reserved!r} is taken by the reward protocol; rename it"

    def _environment(self, row: dict[str, Any]) -> str | None:
        if not self._environments:
            return None
        if len(self._environments) == 1:
            return self._environments[0]
        return str(row[ENVIRONMENT_COLUMN])

    def _environment_problems(self, row: dict[str, Any]) -> Iterator[str]:
        """Yields what is wrong with the column that chooses one of the environments."""
        known = ", ".join(map(repr, self._environments))
        if self._environments in ((), (ONLY,)):
            return
        if len(self._environments) == 1 and ENVIRONMENT_COLUMN not in row:
            return
        if ENVIRONMENT_COLUMN not in row:
            yield f"no column {ENVIRONMENT_COLUMN!r}, which says which of the environments it is for: {known}"
        elif (name := row[ENVIRONMENT_COLUMN]) not in self._environments:
            found = repr(name) if isinstance(name, str) else kind_of(name)
            yield f"{ENVIRONMENT_COLUMN!r} is {found}, which is none of the environments: {known}"


def value_at(row: dict[str, Any], path: str) -> Any:
    """Returns the value of a row at a path such as `extra.questions.0`, or Bad with what is there instead.

    A key with dots in it is found too.
    """
    value: Any = row
    parts = path.split(".")
    walked: list[str] = []
    while parts:
        here = repr(".".join(walked)) if walked else "the row"
        key = parts[0]
        if isinstance(value, dict):
            lengths = range(len(parts), 0, -1)
            taken = next((length for length in lengths if ".".join(parts[:length]) in value), 0)
            if not taken:
                return Bad(f"{here} has no {key!r}, but {', '.join(map(repr, [*value][:10])) or 'nothing'}")
            value = value[".".join(parts[:taken])]
        elif isinstance(value, list) or hasattr(value, "tolist"):
            value, taken = list(value), 1
            if not re.fullmatch(r"-?\d{1,9}", key) or not -len(value) <= int(key) < len(value):
                return Bad(
                    f"{here} is a list of {len(value)}, which has no {key!r}; expected a number, from 0"
                )
            value = value[int(key)]
        else:
            shown = "" if value is None else f" ({str(value)[:40]!r})"
            return Bad(f"{here} is {kind_of(value)}{shown}, which has no {key!r}")
        walked += parts[:taken]
        parts = parts[taken:]
    return value


def _prompt_problems(row: dict[str, Any], column: str, prompt: Any, data: DataConfig) -> Iterator[str]:
    if not column:
        others = ", ".join(map(repr, PROMPT_COLUMNS[2:]))
        yield (
            f"no column 'prompt' or 'question'; it has {', '.join(map(repr, row)) or 'none'}. {others} are read "
            "too; name another one with data.columns={prompt: NAME}"
        )
        return
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


# --- Answers ---


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
