"""Metrics of a run that are made of the cumulative counters of all its actors: `environment/*` and
`reward/queue_s` and its like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple


class Kinds(NamedTuple):
    """What to make of counters.

    sums    metrics that are sums over all actors there ever were, and the counters they are sums of
    ratios  metrics that are the growth of one counter by that of another, since the row before
    """

    sums: Mapping[str, str]
    ratios: Mapping[str, tuple[str, str]]

    @property
    def metrics(self) -> list[str]:
        """Returns the names of the metrics."""
        return [*self.sums, *self.ratios]

    @property
    def counters(self) -> list[str]:
        """Returns the names of the counters."""
        return [*self.sums.values(), *(name for pair in self.ratios.values() for name in pair)]


ENVIRONMENT = Kinds(
    {
        "environment/errors": "environment_errors",
        "environment/timeouts": "environment_timeouts",
        "environment/crashes": "environment_crashes",
        "environment/tool_errors": "tool_errors",
        "environment/cut_at_max_turns": "cut_at_max_turns",
        "environment/cut_at_max_new_tokens": "cut_at_max_new_tokens",
        "environment/cut_at_max_sequence_tokens": "cut_at_max_sequence_tokens",
        "environment/wait_s": "wait_environment_s",
    },
    {"environment/answer_s": ("environment_s", "environment_answers")},
)
REWARD = Kinds(
    {
        "reward/timeouts": "reward_timeouts",
        "reward/crashes": "reward_crashes",
        "reward/wait_s": "wait_rewards_s",
    },
    {
        "reward/queue_s": ("reward_queue_s", "reward_groups"),
        "reward/busy_share": ("reward_busy_s", "reward_worker_s"),
    },
)


def actor_totals(has_environments: bool) -> list[ActorTotals]:
    """Returns the totals of a run, with environments or without."""
    return [ActorTotals(REWARD), ActorTotals(ENVIRONMENT)] if has_environments else [ActorTotals(REWARD)]


class ActorTotals:
    """The counters of all actors so far: `take("actor-0", {"reward_timeouts": 2})`, then `row()`."""

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._newest: defaultdict[str, dict[str, float]] = defaultdict(self._zeros)
        self._before = self._zeros()  # Of actors that were started again since, or are gone.
        self._at_last_row = self._zeros()

    def _zeros(self) -> dict[str, float]:
        return dict.fromkeys(self._kinds.counters, 0.0)

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
        for name, value in self._newest.pop(actor, {}).items():
            self._before[name] += value

    def row(self) -> dict[str, float]:
        """Returns the metrics for the next row; a ratio only where its second counter has grown."""
        totals = {
            name: value + sum(counters[name] for counters in self._newest.values())
            for name, value in self._before.items()
        }
        grown = {name: value - self._at_last_row[name] for name, value in totals.items()}
        self._at_last_row = totals
        ratios = {metric: (grown[part], grown[whole]) for metric, (part, whole) in self._kinds.ratios.items()}
        return {
            **{metric: totals[name] for metric, name in self._kinds.sums.items()},
            **{metric: part / whole for metric, (part, whole) in ratios.items() if whole},
        }
