"""Prompts without a download: `data.path: reasoning_gym:FAMILY`, generated on the spot by reasoning-gym.

    reasoning_gym:chain_sum                          about a hundred families: algebra, logic, graphs, games
    reasoning_gym:chain_sum?max_terms=3&size=2000    the family's own parameters, and the number of prompts

A split is a seed: the prompts are the same on every machine and at every start. Held-out prompts that the
run trains on are left out: those of every source of `data.path` that is of the family, whatever its
parameters and its split.
"""

from __future__ import annotations

import difflib
import itertools
import urllib.parse
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from core.config import text as config_text
from core.errors import DataError
from rewards.reasoning_gym import library, procedural_row

PREFIX = "reasoning_gym:"
TRAIN_SPLIT = "train"
TRAIN_ROWS = 1000
TRIES_PER_ROW, MAX_REPEATS = 20, 10_000


def read_rows(
    key: str, path: str, split: str, limit: int | None, trained: Sequence[tuple[str, str]] = ()
) -> dict[int, dict[str, Any]]:
    """Returns rows with `question`, `answer` where there is one only, and what the reward `reasoning_gym`
    scores by (rewards/reasoning_gym.py), by index; `key` is the config key that `path` came from.

    `trained` are the paths and splits that the run trains on, whose questions are left out.

    Raises DataError when reasoning-gym is not installed, for an unknown family or parameter, and for a family
    that gives too few different prompts.
    """
    family, parameters, size = _read_path(key, path)
    taken: set[str] = set()
    for other, other_split in trained:
        if other.startswith(PREFIX) and _family(other) == family:
            taken |= {row["question"] for row in read_rows("data.path", other, other_split, None).values()}
    questions = _distinct(key, path, family, parameters, split, size if limit is None else limit, taken)
    return dict(enumerate(questions))


def _family(path: str) -> str:
    return path.removeprefix(PREFIX).partition("?")[0]


def _read_path(key: str, path: str) -> tuple[str, dict[str, Any], int]:
    """Returns the family, its parameters, and the number of prompts."""
    parameters = _parameters(key, path, path.partition("?")[2])
    size = parameters.pop("size", TRAIN_ROWS)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DataError(f"{key} = {path}: size = {size!r}, expected a whole number of at least 1.")
    return _family(path), parameters, size


def _distinct(
    key: str,
    path: str,
    family: str,
    parameters: dict[str, Any],
    split: str,
    count: int,
    taken: set[str],
) -> list[dict[str, Any]]:
    """Returns `count` rows with different questions, none of them in `taken`; fewer where the family has no
    more, but not none.

    A family has no more where MAX_REPEATS in a row are known.
    """
    seen = set(taken)
    rows: list[dict[str, Any]] = []
    num_tries = (count + len(taken)) * TRIES_PER_ROW
    entries = _entries(key, path, family, {**parameters, "size": num_tries}, zlib.crc32(split.encode()))
    num_repeats = 0
    for entry in itertools.islice(entries, num_tries):
        num_repeats += 1
        if entry["question"] not in seen:
            num_repeats = 0
            seen.add(entry["question"])
            rows.append(procedural_row(entry, family, parameters))
        if len(rows) == count or num_repeats == MAX_REPEATS:
            break
    if not rows:
        raise DataError(
            f"{key} = {path}: split {split!r} has no prompt that is not trained on. Lower the size of "
            "data.path, or raise the difficulty."
        )
    return rows


def _entries(
    key: str, path: str, family: str, parameters: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    try:
        datasets = library().factory.DATASETS
    except ImportError as error:
        raise DataError(
            f"{key} = {path}: reasoning-gym is not installed ({error}). `make setup` installs it."
        ) from None
    if family not in datasets:
        near = difflib.get_close_matches(family, datasets, 3) or sorted(datasets)[:5]
        raise DataError(
            f"{key} = {path}: reasoning-gym has no family {family!r}. Did you mean {', '.join(near)}?"
        )
    make, config_of = datasets[family]
    names = sorted({field.name for field in fields(config_of)} - {"seed"})
    if unknown := parameters.keys() - set(names):
        raise DataError(
            f"{key} = {path}: {family} has no parameter {', '.join(sorted(unknown))}. It has "
            f"{', '.join(names)}."
        )
    try:
        config = config_of(**parameters, seed=seed)
        config.validate()
        yield from make(config=config)
    except (AssertionError, ImportError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"{key} = {path}: {family} refuses that: {str(error) or type(error).__name__}"
        ) from None


def _parameters(key: str, path: str, query: str) -> dict[str, Any]:
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
        parameters = {name: config_text.read(value, comments=False) for name, value in pairs}
    except ValueError:
        raise DataError(
            f"{key} = {path}: expected parameters as in {PREFIX}chain_sum?max_terms=3&size=2000"
        ) from None
    if len(parameters) < len(pairs):
        raise DataError(f"{key} = {path}: a parameter is there twice.")
    return parameters
