"""The reward `reasoning_gym` scores an answer as its task family does, by the family's own `score_answer`.

    data.path: reasoning_gym:FAMILY --procedural_row--> row --reasoning_gym--> a number from 0 to 1

A row carries what its family scores by: the entry's `metadata`, and in the column `reasoning_gym` the family
with its parameters. So rows of several families may be mixed, and a family without one right answer can be
trained on. Scored is what the completion marks as its answer (`rewards.final_answer.marked_answer`): what is
in <answer> or in a box, else all outside of thinking. Most families give part of the reward for an answer
with words around it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from typing import Any

from core.errors import RewardError
from rewards.final_answer import marked_answer

FAMILIES_OF = {
    "bfi": "bf",
    "cellpylib": "game_of_life, game_of_life_halting",
    "pycosat": "zebra_puzzles",
    "zss": "codeio",
}
"""What reasoning-gym imports but is no wheel, and the families that need it: installed by hand, or done
without.
"""


class _Absent(types.ModuleType):
    """Stands for a package that is not installed, until it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(
            f"it needs the package {self.__name__}: pip install {self.__name__}", name=self.__name__
        )


def procedural_row(entry: Mapping[str, Any], family: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row of an entry that a family made with `parameters`: its question, its answer where it has
    one, and what it is scored by.
    """
    row = {"question": entry["question"], "metadata": entry["metadata"]}
    row["reasoning_gym"] = {"family": family, "parameters": dict(parameters)}
    return row if entry["answer"] is None else {**row, "answer": entry["answer"]}


def reasoning_gym(
    completions: list[str],
    question: list[Any] | None = None,
    answer: list[Any] | None = None,
    metadata: list[Any] | None = None,
    reasoning_gym: list[Any] | None = None,
) -> list[float | None]:
    """Returns what the row's family gives for each completion's answer.

    Raises RewardError for a row that did not come from `data.path: reasoning_gym:FAMILY`.
    """
    if question is None or metadata is None or reasoning_gym is None:
        raise RewardError(_row_problem({}))
    answers = answer or [None] * len(completions)
    entries = zip(question, answers, metadata, strict=True)
    keys = ("question", "answer", "metadata")
    return [
        _score(completion, made_by, dict(zip(keys, entry, strict=True)))
        for completion, made_by, entry in zip(completions, reasoning_gym, entries, strict=True)
    ]


def _score(completion: str, made_by: Mapping[str, Any], entry: dict[str, Any]) -> float:
    family = _family(made_by["family"], json.dumps(made_by["parameters"]))
    return float(family.score_answer(marked_answer(completion) or None, entry))


@functools.lru_cache(maxsize=256)
def _family(name: str, parameters: str) -> Any:
    """Returns a family with its parameters, JSON text; some score by them."""
    make, config_of = library().factory.DATASETS[name]
    return make(config=config_of(**json.loads(parameters), seed=0))


def _row_problem(row: Mapping[str, Any]) -> str | None:
    """Returns why a row cannot be scored, or None when it can."""
    missing = [name for name in ("reasoning_gym", "metadata", "question") if name not in row]
    if not missing:
        return None
    return (
        f"no {missing[0]!r}: the reward reasoning_gym scores rows of data.path: reasoning_gym:FAMILY alone; "
        "use another reward for these"
    )


def _prepare() -> None:
    try:
        library()
    except ImportError as error:
        raise RewardError(
            f"reward function 'reasoning_gym': reasoning-gym is not installed ({error}). `make setup` installs it."
        ) from None


reasoning_gym.row_problem = _row_problem  # type: ignore[attr-defined]
reasoning_gym.prepare = _prepare  # type: ignore[attr-defined]


def library() -> Any:
    """Returns reasoning-gym, which imports every family at once, those too whose packages are missing. Raises
    ImportError when it is not installed.
    """
    absent = [
        name for name in FAMILIES_OF if name not in sys.modules and importlib.util.find_spec(name) is None
    ]
    sys.modules.update({name: _Absent(name) for name in absent})
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        for name in absent:
            del sys.modules[name]
