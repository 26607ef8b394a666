"""The evaluations of a run, as its driver knows them: what is open, what came out, what a new board hears.

The results of earlier starts of the run are told to its board too, so that nothing is evaluated twice: not
what was done before a kill in the middle of several suites, either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

from cluster.services import Services
from core.calls import Call, Polled
from core.config.evaluation import Suite
from core.evaluation.records import Evaluation

Key: TypeAlias = tuple[str, int]
"""Suite and version."""


class Evaluations:
    """Asks the board again and again; it sends only the results that are new.

    results   all that are known, by suite and version: of earlier starts, then as they came
    """

    def __init__(
        self,
        services: Services,
        earlier: Iterable[Evaluation],
        suites: Collection[str],
        last_version: int,
    ) -> None:
        """`earlier` are the results of earlier starts. `last_version` is the one after the last step: its
        evaluation on all `suites` is waited for at the end.
        """
        self._services = services
        self._last = [(suite, last_version) for suite in suites]
        self._polled = Polled(services.calls, self._ask)
        self._open: Sequence[Key] = ()
        self._is_last_begun = False
        self.results = _by_key(earlier)
        self._restoring = services.restore_board(list(self.results.values())) if self.results else None

    @property
    def is_known(self) -> bool:
        """True once the board has answered."""
        return self._polled.value is not None

    @property
    def open(self) -> set[Key]:
        """The evaluations under way: those of the last version also while a board that died is told of it
        again.
        """
        last = [key for key in self._last if key not in self.results]
        return {*self._open, *last} if self._is_last_begun else set(self._open)

    def poll(self) -> bool:
        """Takes the board's answers; True once a board knows what was known before it.

        Raises AgroError where the board does not answer.
        """
        if self._polled.poll() and self._polled.value is not None:
            self.take(*self._polled.value)
        if self._restoring is None or not self._restoring.is_done():
            return False
        self._restoring.result()
        self._restoring = None
        return True

    def take(self, is_open: Sequence[Key], results: Sequence[Evaluation]) -> None:
        """Takes note of what the board says."""
        self._open = is_open
        self.results |= _by_key(results)
        self._is_last_begun |= any(key in is_open for key in self._last)

    def restore(self, held: Sequence[int] = ()) -> None:
        """Begins to tell a board that was started again what is done, and which snapshots to hold; `poll`
        says when it knows.
        """
        self._restoring = self._services.restore_board(list(self.results.values()), held)

    def make_up(self, suites: Sequence[Suite], version: int, publish_every: int) -> None:
        """Has the board make up for what is not done, now that the learner goes on with `version`."""
        due = {suite.name: suite.last_due(version, publish_every) for suite in suites}
        owed = {name: before for name, before in due.items() if before < version}
        missing = {name: before for name, before in owed.items() if (name, before) not in self.results}
        if missing:
            self._services.calls.post(self._services.board.owe(missing), "evaluations to make up for")

    def by_version(self) -> list[Evaluation]:
        """Returns the evaluations of the whole run, by policy version."""
        return sorted(self.results.values(), key=lambda evaluation: evaluation.policy_version)

    def _ask(self) -> Call[tuple[list[Key], list[Evaluation]]]:
        return self._services.board.evaluations(len(self.results))


def _by_key(results: Iterable[Evaluation]) -> dict[Key, Evaluation]:
    return {(result.suite, result.policy_version): result for result in results}
