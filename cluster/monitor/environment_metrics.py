"""The metrics `environment/*` of a run, from the cumulative counters of its actors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

SUMS = {
    "environment/errors": "environment_errors",
    "environment/timeouts": "environment_timeouts",
    "environment/crashes": "environment_crashes",
    "environment/tool_errors": "tool_errors",
    "environment/cut_at_max_turns": "cut_at_max_turns",
    "environment/cut_at_max_new_tokens": "cut_at_max_new_tokens",
    "environment/cut_at_max_sequence_tokens": "cut_at_max_sequence_tokens",
    "environment/wait_s": "wait_environment_s",
}
"""Metrics that are sums over all actors there ever were, and the counters they are sums of."""
_SECONDS, _ANSWERS = "environment_s", "environment_answers"


def _zeros() -> dict[str, float]:
    return dict.fromkeys((*SUMS.values(), _SECONDS, _ANSWERS), 0.0)


class EnvironmentMetrics:
    """The counters of all actors so far: `take("actor-0", {"environment_errors": 2})`, then `row()`."""

    def __init__(self) -> None:
        self._newest: defaultdict[str, dict[str, float]] = defaultdict(_zeros)
        self._before = _zeros()  # Of actors that were started again since, or are gone.
        self._at_last_row = _zeros()

    def take(self, actor: str, counters: Mapping[str, Any]) -> None:
        """Takes the newest counters of an actor; one that fell belongs to an actor that was started again."""
        newest = self._newest[actor]
        for name in newest:
            value = counters.get(name) or 0.0
            if value < newest[name]:
                self._before[name] += newest[name]
            newest[name] = value

    def forget(self, actor: str) -> None:
        """Keeps of an actor that is gone for good the sums alone."""
        for name, value in self._newest.pop(actor, _zeros()).items():
            self._before[name] += value

    def row(self) -> dict[str, float]:
        """Returns the metrics for the next row."""
        totals = {
            name: value + sum(counters[name] for counters in self._newest.values())
            for name, value in self._before.items()
        }
        row = {metric: totals[name] for metric, name in SUMS.items()}
        answers = totals[_ANSWERS] - self._at_last_row[_ANSWERS]
        if answers:
            row["environment/answer_s"] = (totals[_SECONDS] - self._at_last_row[_SECONDS]) / answers
        self._at_last_row = totals
        return row
