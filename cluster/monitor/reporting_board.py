"""The board of a run: it tells the monitor of evaluations. It has a file of its own, so that its process
imports no torch, as cluster/services.py does with what a run is prepared by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from core.calls import Calls
from core.config import RunConfig
from core.evaluation.open_evaluation import SuiteSize
from core.evaluation.records import Evaluation
from core.monitor_client import MONITOR, MonitorClient
from core.weights.board import Board


class ReportingBoard(Board):
    """A board that tells the monitor of its evaluations.

    It is given the monitor's name: a handle among its arguments would lie in Ray's object store, where a
    restart may not find it.
    """

    def __init__(
        self, run: RunConfig, suites: Mapping[str, SuiteSize], monitor_name: str, kept_suite: str
    ) -> None:
        super().__init__(run, suites, self._report, kept_suite=kept_suite)
        self._monitor = MonitorClient(ray.get_actor(monitor_name), MONITOR)
        self._calls = Calls(run.timeout_s, self._monitor.event, name="the board")

    def _report(self, evaluation: Evaluation, samples: list[dict[str, Any]]) -> None:
        self._calls.post(self._monitor.log_evaluation(evaluation, samples), "an evaluation")
