"""Whether the configured reward functions can score the data, asked before anything starts.

config --RewardPool--> loads in a worker as in a run, or RewardError --columns--> each row has what they need, and a gold answer
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.errors import RewardError
from rewards.pool import RewardPool
from rewards.registry import BUILTINS, load_reward

if TYPE_CHECKING:
    from cluster.config import RewardsConfig

READ_GOLDS = 50  # Reading one as mathematics takes hundredths of a second; of more rows the kind of the answer is checked.

Rows = Mapping[int, Mapping[str, Any]]


class RewardCheck:
    """The configured functions, loaded once in a worker process that ends with this; a context manager.

    Raises RewardError from the constructor, in one line, when one cannot be loaded or called.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self._pool = RewardPool(config)
        self._golds = [load_reward(name) for name in dict.fromkeys(function.name for function in config.functions) if name in BUILTINS]
        self._config = config
        self._of_math = tuple(function for function in config.functions if function.name == "math_verify")

    def __enter__(self) -> RewardCheck:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.close()

    def bad_rows(self, source: str, rows: Rows) -> dict[int, str]:
        """By row number, why a row of `source` cannot be scored: a column that is missing, or a gold answer that is none.

        Raises RewardError when a column that a function needs is missing from all of them.
        """
        self._require_columns(source, rows)
        bad = {number: reason for number, row in rows.items() if (reason := self._problem(row)) is not None}
        return bad | self._unreadable({number: row for number, row in rows.items() if number not in bad})

    def _require_columns(self, source: str, rows: Rows) -> None:
        present = {column for row in rows.values() for column in row}
        for name, columns in self._pool.columns.items():
            missing = [column for column in columns if column not in present]
            if rows and missing:
                near = difflib.get_close_matches(missing[0], [*present, "prompts", "completions"], n=1, cutoff=0.75)
                hint = f" (did you mean {near[0]!r}?)" if near and near[0] != missing[0] else ""
                raise RewardError(
                    f"reward function {name!r} needs {', '.join(map(repr, missing))}{hint}, which {source} does not have; "
                    f"its columns are {', '.join(map(repr, sorted(present)))}. Add the column, or give the parameter a default."
                )

    def _problem(self, row: Mapping[str, Any]) -> str | None:
        for name, columns in self._pool.columns.items():
            for column in columns:
                if column not in row:
                    return f"no {column!r}, which reward function {name!r} needs"
        reasons = (getattr(function, "gold_problem", lambda gold: None)(row["answer"]) for function in self._golds)
        return next((f"its answer {reason}" for reason in reasons if reason is not None), None)

    def _unreadable(self, rows: Rows) -> dict[int, str]:
        """Of the first rows whose gold answer is more than a number: why math_verify cannot read it."""
        formulas = [number for number, row in rows.items() if "answer" in row and not str(row["answer"]).strip().isdigit()][:READ_GOLDS]
        if "math_verify" not in self._pool.columns or not formulas:
            return {}
        with RewardPool(self._config.model_copy(update={"functions": self._of_math}), workers=1) as pool:
            futures = {number: pool.submit("", [""], {"answer": rows[number]["answer"]}) for number in formulas}
            errors = {number: future.result()[0].error for number, future in futures.items()}
        return {number: f"its answer: {error}" for number, error in errors.items() if error is not None}
