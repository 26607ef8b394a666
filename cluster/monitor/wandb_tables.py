"""What W&B's tables of samples hold: a line a sample, of an episode with its whole conversation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

TABLE_ROWS = 16
SAMPLE_COLUMNS = (
    "step",
    "version",
    "staleness",
    "prompt",
    "completion",
    "reward",
    "error",
    "advantage",
    "answer",
)
EPISODE_COLUMNS = ("turns", "tool_calls", "conversation")
"""Columns of tables in which a sample has several turns."""

Samples = Sequence[Mapping[str, Any]]


def table_of(samples: Samples) -> Any:
    """Returns the W&B table of the last `TABLE_ROWS` samples."""
    import wandb

    samples = samples[-TABLE_ROWS:]
    has_episodes = any(sample.get("transcript") for sample in samples)
    columns = [*SAMPLE_COLUMNS, *(EPISODE_COLUMNS if has_episodes else ())]
    told = [{**sample, "conversation": conversation(sample)} for sample in samples]
    data = [[sample.get(column) for column in columns] for sample in told]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def conversation(sample: Mapping[str, Any]) -> str | None:
    """Returns what was said after the prompt as one text, a heading a message; None for a prompt's answer."""
    transcript = sample.get("transcript")
    return "\n\n".join(f"[{role}]\n{text}" for role, text in transcript) if transcript else None


class EvaluationTables:
    """Samples of evaluations, each suite's newest, until the next row takes them along: they are ready when
    their evaluation is, which is after the step that they are of.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Samples] = {}

    def put(self, suite: str, samples: Samples) -> None:
        """Keeps the samples of an evaluation; none are no table."""
        if samples:
            self._waiting[f"eval/{suite}/samples"] = samples

    def update(self, newer: EvaluationTables) -> None:
        """Takes over what another has, in place of its own of the same suites."""
        self._waiting.update(newer._waiting)

    def take(self) -> dict[str, Any]:
        """Returns the tables for a row, by their names, once."""
        waiting, self._waiting = self._waiting, {}
        return {name: table_of(samples) for name, samples in waiting.items()}


class EarlierEvaluations:
    """The evaluations of a run's earlier starts, for its rows told again in order."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """`lines` are those of evaluations.jsonl; of one repeated the last counts."""
        self._samples = {
            (line.get("suite"), line.get("policy_version")): line.get("samples") or () for line in lines
        }
        self._told: set[tuple[Any, Any]] = set()

    def of(self, row: Mapping[str, Any]) -> Iterator[tuple[str, Samples]]:
        """Yields suite and samples of the evaluations that are new in a row of metrics.jsonl."""
        for suite, version in self._samples:
            seen = row.get(f"eval/{suite}/policy_version")
            if seen is not None and seen == version and (suite, version) not in self._told:
                self._told.add((suite, version))
                yield str(suite), self._samples[suite, version]

    def rest(self) -> Iterator[tuple[str, Samples]]:
        """Yields suite and samples of the newest evaluations that no row has had yet."""
        newest = {suite: (suite, version) for suite, version in self._samples}
        for suite, key in newest.items():
            if key not in self._told:
                yield str(suite), self._samples[key]
