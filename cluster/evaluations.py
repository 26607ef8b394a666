"""The evaluations of a run, as its driver knows them: what is open, what came out, what a new board hears."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.monitor.report import read_evaluations
from cluster.services import Services
from core.calls import Call, Pending, Polled
from core.records import Evaluation


class Evaluations:
    """Asks the board again and again; it sends only the results that are new.

    results   those of this start of the run, by policy version
    """

    def __init__(self, services: Services, run_dir: Path, last_version: int) -> None:
        """`last_version` is the one after the last step: its evaluation is waited for at the end."""
        self._services, self._last_version = services, last_version
        self._earlier = read_evaluations(run_dir)  # Of earlier starts of the run.
        self._polled = Polled(services.calls, self._ask)
        self._open: Sequence[int] = ()
        self._is_last_begun = False
        self._restoring: Pending[None] | None = None
        self.results: dict[int, Evaluation] = {}

    @property
    def is_known(self) -> bool:
        """True once the board has answered."""
        return self._polled.value is not None

    @property
    def open_versions(self) -> set[int]:
        """The versions under evaluation: the last one also while a board that died is told of it again."""
        last = self._last_version
        is_last_open = self._is_last_begun and last not in self.results
        return {*self._open, last} if is_last_open else set(self._open)

    def poll(self) -> bool:
        """Takes the board's answers; True once a board that was started again knows what the old one knew.

        Raises AgroError where the board does not answer.
        """
        if self._polled.poll() and self._polled.value is not None:
            self.take(*self._polled.value)
        if self._restoring is None or not self._restoring.is_done():
            return False
        self._restoring.result()
        self._restoring = None
        return True

    def take(self, open_versions: Sequence[int], results: Sequence[Evaluation]) -> None:
        """Takes note of what the board says."""
        self._open = open_versions
        self.results |= {result.policy_version: result for result in results}
        self._is_last_begun |= self._last_version in open_versions

    def restore(self) -> None:
        """Begins to tell a board that was started again what is done; `poll` says when it knows."""
        self._restoring = self._services.restore_board(list(self.results.values()))

    def of_all_starts(self) -> list[Evaluation]:
        """Returns the evaluations of the whole run, by policy version."""
        found = [*self._earlier, *self.results.values()]
        return sorted(found, key=lambda evaluation: evaluation.policy_version)

    def _ask(self) -> Call[tuple[list[int], list[Evaluation]]]:
        return self._services.board.evaluations(len(self.results))
