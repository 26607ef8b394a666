"""Keeps the best version of a run by a metric of a suite (`eval.keep_best`), as a policy directory.

    a result --better than what is kept--> its snapshot, which the board holds --> RUN_DIR/best, whole or not at all
             `--no better----------------> the board lets its snapshot go

What is written is what was evaluated, tensor by tensor: the snapshot that the actors had. RUN_DIR/best holds
`evaluation.json` beside the weights, which says of what version and value they are; both take the name at
once, so that a start that goes on knows what there is to beat. A tie does not replace.

A snapshot dies with the learner that published it, and a driver may die before it is written: what was better
and is lost is told, and what is kept stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from core.calls import Calls, Pending
from core.config import Config
from core.errors import AgroError
from core.evaluation.estimates import STANDARD_ERROR
from core.evaluation.records import Evaluation
from core.weights.board import BoardClient
from core.weights.fetching import Weights, snapshot_of
from learner.checkpoints.export import write_snapshot

FOLDER, NOTE = "best", "evaluation.json"


class Kept(msgspec.Struct, frozen=True):
    """What `evaluation.json` says: the version in RUN_DIR/best, and by which metric it is the best."""

    metric: str
    policy_version: int
    value: float
    standard_error: float | None
    num_problems: int
    num_errors: int


class BestPolicy:
    """The best version so far, `kept` (None before the first), and the one being written in its place.

    It never waits: `consider` what came out, `poll` again and again.
    """

    def __init__(
        self, config: Config, run_dir: Path, calls: Calls, board: BoardClient, tell: Callable[[str], None]
    ) -> None:
        self._config, self._folder = config, run_dir / FOLDER
        self._calls, self._board, self._tell = calls, board, tell
        self._metric = config.eval.keep_best or ""
        self._suite = self._metric.partition("/")[0]
        self._seen: set[int] = set()
        self._next: Kept | None = None
        self._current: Kept | None = None
        self._fetching: Pending[Weights] | None = None
        self._writing: Pending[None] | None = None
        self.kept = self._found() if self._metric else None

    @property
    def is_busy(self) -> bool:
        """Says whether a version waits to be written, or is being written."""
        return self._current is not None or self._next is not None

    @property
    def held(self) -> list[int]:
        """The versions whose snapshots the board must hold for it."""
        return [kept.policy_version for kept in (self._current, self._next) if kept is not None]

    def begin(self, earlier: Sequence[Evaluation]) -> list[Evaluation]:
        """Takes note of the evaluations of earlier starts, whose snapshots are gone.

        Returns those that count: what was better than what is kept, and is lost, is evaluated again if the
        run comes to its version again.
        """
        scored = [found for result in earlier if (found := self._scored(result)) is not None]
        lost = {found.policy_version: found for found in scored if self._is_best(found)}
        self._seen |= {found.policy_version for found in scored} - lost.keys()
        for found in lost.values():
            self._tell(
                f"the run ended before {_told(found)} was written, and its weights are gone: it is evaluated again if "
                f"the run comes to it again; eval.keep_best: {self._in_folder()}"
            )
        return [each for each in earlier if each.suite != self._suite or each.policy_version not in lost]

    def consider(self, results: Iterable[Evaluation]) -> None:
        """Takes results, also ones that it has seen; what is the best so far will be written."""
        for result in results:
            version = result.policy_version
            if result.suite != self._suite or version in self._seen:
                continue
            self._seen.add(version)
            found = self._scored(result)
            if found is None or not self._is_best(found):
                self._let_go(version)
            else:
                replaced, self._next = self._next, found
                if replaced is not None:
                    self._let_go(replaced.policy_version)

    def poll(self) -> None:
        """Takes it one step further: a snapshot is fetched, then written. A failure is told; what is kept
        stays.
        """
        if self._current is None:
            if self._next is not None:
                self._current, self._next = self._next, None
                fetch = snapshot_of(self._board, self._current.policy_version)
                self._fetching = self._calls.start(fetch)
            return
        try:
            if self._fetching is not None and self._fetching.is_done():
                weights, self._fetching = self._fetching.result(), None
                self._writing = self._write(self._current, weights)
            elif self._writing is not None and self._writing.is_done():
                self._writing.result()
                self.kept = self._current
                self._tell(f"eval.keep_best: {self._in_folder()}")
                self._end()
        except (AgroError, OSError) as error:
            reason = str(error).splitlines()[0]
            self._tell(f"{_told(self._current)} could not be kept: {reason}; {self._in_folder()}")
            self._end()

    def _write(self, kept: Kept, weights: Weights) -> Pending[None]:
        notes = {NOTE: msgspec.to_builtins(kept)}
        config, folder = self._config, self._folder
        return self._calls.in_background(
            lambda: write_snapshot(folder, config, weights, notes), "writing the best version"
        )

    def _end(self) -> None:
        assert self._current is not None
        self._let_go(self._current.policy_version)
        self._current = self._fetching = self._writing = None

    def _let_go(self, version: int) -> None:
        self._calls.post(self._board.let_go([version]), "a snapshot that is not needed")

    def _scored(self, result: Evaluation) -> Kept | None:
        """Returns what the result says of the metric; None where it is of another suite, or has no value."""
        _, _, metric = self._metric.partition("/")
        value = result.metrics.get(metric)
        if result.suite != self._suite or value is None:
            return None
        return Kept(
            metric=self._metric,
            policy_version=result.policy_version,
            value=value,
            standard_error=result.metrics.get(metric + STANDARD_ERROR),
            num_problems=result.num_problems,
            num_errors=result.num_errors,
        )

    def _is_best(self, found: Kept) -> bool:
        others = (self.kept, self._current, self._next)
        return all(found.value > other.value for other in others if other is not None)

    def _in_folder(self) -> str:
        return f"{self._folder} holds {_told(self.kept)}" if self.kept else f"there is no {self._folder} yet"

    def _found(self) -> Kept | None:
        """Returns what an earlier start kept, and mends what a kill left in the middle of its last step."""
        parent = self._folder.parent
        old = sorted(parent.glob(f".{FOLDER}.old-*"))
        if old and not self._folder.exists():
            old.pop().rename(self._folder)
        for left in (*old, *parent.glob(f".{FOLDER}.making-*")):
            shutil.rmtree(left, ignore_errors=True)
        try:
            kept = msgspec.json.decode((self._folder / NOTE).read_bytes(), type=Kept)
        except (OSError, msgspec.MsgspecError):
            return None
        if kept.metric != self._metric:
            self._tell(
                f"{self._folder} holds {_told(kept)}; eval.keep_best is {self._metric} now: the first version with a value "
                "takes its place"
            )
            return None
        return kept


def _told(kept: Kept) -> str:
    error = "" if kept.standard_error is None else f" ± {kept.standard_error:.3f}"
    return f"version {kept.policy_version} ({kept.metric} {kept.value:.4f}{error})"
