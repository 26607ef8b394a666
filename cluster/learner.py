"""The learner of a run: its gang of ranks, and another one from the newest checkpoint when a rank dies.

Actors and buffer live on meanwhile. The batches since the checkpoint are asked for again by their steps, and
are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.fleet import MAX_DEATHS, DeathCount
from cluster.gang import LearnerGang, RankDied, State
from core.config import Config
from core.errors import ConfigError, TrainingError
from learner.checkpoints.checkpoint import latest_checkpoint

DEATHS_WINDOW_S = 1800.0


class Learner:
    """As a LearnerGang, but that dies of nothing less than `MAX_DEATHS` deaths within `DEATHS_WINDOW_S`."""

    def __init__(
        self,
        config: Config,
        pad_id: int,
        peers: Sequence[Any],
        run_dir: Path,
        *,
        tell: Callable[[str], None],
        forget_snapshots: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`peers`: buffer shards, board, monitor. `forget_snapshots`: what a dead learner published
        cannot be fetched any more.
        """
        self._config, self._pad_id, self._peers, self._run_dir = config, pad_id, tuple(peers), run_dir
        self._tell, self._forget_snapshots, self._clock = tell, forget_snapshots, clock
        self._deaths = DeathCount(DEATHS_WINDOW_S)
        self._stopping = False
        self._gang = self._make_gang()

    @property
    def state(self) -> State:
        """Of the gang that runs now."""
        return self._gang.state

    @property
    def totals(self) -> list[dict[str, float]]:
        """What each rank's `train` returned, once `state` is `done`."""
        return self._gang.totals

    @property
    def num_deaths(self) -> int:
        """Deaths of a gang so far."""
        return self._deaths.total

    def handles(self) -> dict[str, Any]:
        """The ranks that exist as processes, by name."""
        return self._gang.handles()

    def look(self) -> None:
        """One step further. Raises AgroError for what another start would not mend, and for too many
        deaths.
        """
        try:
            self._gang.look()
        except RankDied as error:
            self._restart(error)

    def request_stop(self) -> None:
        """End training in order after the step in progress."""
        self._stopping = True
        self._gang.request_stop()

    def republish(self) -> None:
        """As `LearnerGang.republish`."""
        self._gang.republish()

    def kill(self) -> None:
        """End the ranks at once and free their place."""
        self._gang.kill()

    def _restart(self, error: RankDied) -> None:
        count = self._deaths.note("learner", self._clock())
        if self._stopping or not self._config.checkpoint.every:
            raise error
        if count >= MAX_DEATHS:
            raise TrainingError(
                f"learner ranks died {count} times within {DEATHS_WINDOW_S / 60:.0f} "
                f"minutes, the last time: {error}"
            )
        self._tell(f"{error}; starting the learner again")
        self._gang.kill()
        self._forget_snapshots()
        self._gang = self._make_gang()

    def _make_gang(self) -> LearnerGang:
        found = latest_checkpoint(self._run_dir, self._tell)
        if found is not None:
            if found[1].step > self._config.run.steps:
                raise ConfigError(
                    f"run.steps = {self._config.run.steps}, but the run in {self._run_dir} has done "
                    f"{found[1].step} steps already. "
                    "Raise run.steps."
                )
            self._tell(f"going on from {found[0].name}")
        train_arguments = (*self._peers, str(self._run_dir / "policy"), str(found[0]) if found else None)
        return LearnerGang(self._config, self._pad_id, train_arguments)
