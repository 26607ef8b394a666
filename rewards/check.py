"""Asks, before anything starts, whether the configured reward functions can score the data.

config --check_functions--> the functions are loaded in a worker, as in a run, or RewardError says why not
       --bad_rows---------> each row has the columns that are needed, and a gold answer that can be read
       --start_notes, length_notes--> what is to be told of the functions at the start
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from core.config import RewardsConfig
from core.errors import RewardError
from rewards.overlong import Overlong
from rewards.pool import RewardPool
from rewards.registry import RewardCallable, load_reward, read_name

# Reading an answer as mathematics takes hundredths of a second. Of later rows only its kind is checked.
READ_GOLDS = 50


def check_functions(config: RewardsConfig) -> Mapping[str, tuple[str, ...]]:
    """Returns, by name of the function, the columns of the dataset without which it cannot be called.

    Raises RewardError, in one line, when a function cannot be loaded or called.
    """
    return _needed(config.model_dump_json())[0]


def check_environments_read(
    config: RewardsConfig, why: str = "this run has none: set environments", key: str = ""
) -> None:
    """Raises RewardError where a function reads `environments`, for a run that has none to show, or for
    another reason `why`; `key` is the config's key of the functions, where that is to be named.
    """
    for name, own in _needed(config.model_dump_json())[1].items():
        if "environments" in own:
            raise RewardError(
                f"{key and f'{key}: '}reward function {name!r} reads `environments`, and {why}, or give the parameter a "
                "default."
            )


@functools.lru_cache(maxsize=8)  # Importing a user's module may take long.
def _needed(config: str) -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, tuple[str, ...]]]:
    """Returns, by function, the columns and what of the completions it cannot be called without."""
    with RewardPool(RewardsConfig.model_validate_json(config)) as pool:
        return pool.columns, pool.own


def bad_rows(config: RewardsConfig, source: str, rows: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Returns, by number of the row, why a row of `source` cannot be scored: a column is missing, or its gold
    answer is none.

    Raises RewardError when a needed column is missing from all rows, and for what `check_functions` raises.
    """
    needed = check_functions(config)
    present = {column for row in rows.values() for column in row}
    for name, columns in needed.items():
        if rows and (missing := [column for column in columns if column not in present]):
            raise RewardError(_missing(name, missing, source, present))
    builtin = [load_reward(name) for name in needed if read_name(name).is_builtin]
    found = {number: _problem(needed, builtin, row) for number, row in rows.items()}
    bad = {number: reason for number, reason in found.items() if reason is not None}
    return bad | _unreadable(config, {number: row for number, row in rows.items() if number not in bad})


def start_notes(config: RewardsConfig) -> tuple[str, ...]:
    """Returns what the built-in functions want to be told at the start."""
    builtin = [load_reward(name) for name in config.functions if read_name(name).is_builtin]
    notes = (getattr(function, "start_note", None) for function in builtin)
    return tuple(note() for note in notes if note is not None)


def length_notes(config: RewardsConfig, most_tokens: int, limit: str) -> Iterator[str]:
    """Yields what to tell of `overlong` where no answer is long enough for it: `most_tokens` are sampled at
    most, because of `limit`, in words.
    """
    for name in config.functions:
        function = load_reward(name) if read_name(name).is_builtin else None
        if isinstance(function, Overlong) and function.start >= most_tokens:
            yield (
                f"warning: reward function {name!r} never acts: an answer has at most {most_tokens} sampled tokens "
                f"({limit}). Lower from={function.start} to below that"
            )


def _missing(name: str, missing: list[str], source: str, present: set[str]) -> str:
    near = difflib.get_close_matches(missing[0], [*present, "prompts", "completions"], n=1, cutoff=0.75)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"reward function {name!r} needs {', '.join(map(repr, missing))}{hint}, which {source} does not "
        "have; "
        f"its columns are {', '.join(map(repr, sorted(present)))}. Add the column, or give the parameter a "
        "default."
    )


def _problem(
    needed: Mapping[str, tuple[str, ...]], functions: Sequence[RewardCallable], row: Mapping[str, Any]
) -> str | None:
    for name, columns in needed.items():
        for column in columns:
            if column not in row:
                return f"no {column!r}, which reward function {name!r} needs"
    checks = (getattr(function, "gold_problem", None) for function in functions)
    problems = (check(row["answer"]) for check in checks if check is not None)
    if reason := next((f"its answer {reason}" for reason in problems if reason is not None), None):
        return reason
    row_checks = (getattr(function, "row_problem", None) for function in functions)
    found = (check(row) for check in row_checks if check is not None)
    return next((str(reason) for reason in found if reason is not None), None)


def _unreadable(config: RewardsConfig, rows: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Returns why math_verify cannot read a gold answer, for the first READ_GOLDS rows whose answer is more
    than a number.
    """
    functions = {name: weight for name, weight in config.functions.items() if name == "math_verify"}
    formulas = [
        number for number, row in rows.items() if functions and not str(row["answer"]).strip().isdigit()
    ][:READ_GOLDS]
    if not formulas:
        return {}
    with RewardPool(config.model_copy(update={"functions": functions})) as pool:
        futures = {number: pool.submit("", [""], {"answer": rows[number]["answer"]}) for number in formulas}
        errors = {number: future.result()[0].error for number, future in futures.items()}
    return {number: f"its answer: {error}" for number, error in errors.items() if error is not None}
