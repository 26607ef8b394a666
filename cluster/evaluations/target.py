"""The target of a run (`eval.stop_at`): the value of a metric of a suite at which it ends before `run.steps`.

What earlier starts of a run evaluated counts too: one that was killed on its way to the end goes on to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from core.config import EvalConfig
from core.evaluation.records import Evaluation


class Target:
    """Looks at evaluations; `is_reached` once one of them has come to the value."""

    def __init__(self, config: EvalConfig, tell: Callable[[str], None]) -> None:
        """`tell` gets one sentence, when the target is reached."""
        self._metric, self._value = config.stop_at or ("", 0.0)
        self._tell = tell
        self.is_reached = False

    def consider(self, results: Iterable[Evaluation]) -> bool:
        """Takes results, also ones that it has seen; True when one of them reaches the target for the first
        time.
        """
        suite, _, metric = self._metric.partition("/")
        if self.is_reached or not suite:
            return False
        for result in results:
            value = result.metrics.get(metric)
            if result.suite == suite and value is not None and value >= self._value:
                self.is_reached = True
                self._tell(
                    f"version {result.policy_version} reached {self._metric} {value:.4f}, of {self._value:g} asked for "
                    "(eval.stop_at): the run ends"
                )
                return True
        return False
