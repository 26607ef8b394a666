"""The learner of a run: its gang of ranks, and another one from the newest checkpoint when a rank dies.

    verifying a checkpoint (in a thread: every byte is hashed) --> a gang: waiting for placement --> ... --> done
              ^                                                       |
              '---- a rank died, and the board has forgotten what it had published

Actors and buffer live on meanwhile. The batches since the checkpoint are asked for again by their steps, and
are the same. The ranks' place stays theirs: what a lost node had of it is found elsewhere, before any actor
is placed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster.deaths import RANK, Deaths
from cluster.gang import LearnerGang, RankDied
from cluster.gang import State as GangState
from core.calls import Calls, Client, Pending
from core.config import Config
from core.process_log import ProcessLog
from core.processes import is_placed
from learner.checkpoints.checkpoint import CheckpointManifest, checkpoint_dirs, latest_checkpoint

State: TypeAlias = Literal["verifying a checkpoint"] | GangState


class Learner:
    """Starts a gang, and another in its place for as long as the policy of deaths.py allows."""

    def __init__(
        self,
        config: Config,
        pad_id: int,
        peers: Sequence[Any],
        run_dir: Path,
        *,
        log_of: Callable[[str], ProcessLog],
        tell: Callable[[str], None],
        forget_snapshots: Callable[[], Pending[list[int]]],
        on_going_on: Callable[[int], None] = lambda step: None,
        deaths: Deaths,
        calls: Calls,
    ) -> None:
        """`peers` are buffer shards, board and monitor. `log_of` a rank is where it writes.
        `forget_snapshots` begins to make the board forget what a dead learner published, which cannot be
        fetched any more. `on_going_on` is told from which step it goes on, before it does.
        """
        self._config, self._pad_id, self._peers, self._run_dir = config, pad_id, tuple(peers), run_dir
        self._log_of, self._tell, self._forget_snapshots = log_of, tell, forget_snapshots
        self._deaths, self._calls, self._on_going_on = deaths, calls, on_going_on
        self._stopping = self._is_target_reached = False
        self._gang: LearnerGang | None = None
        self._place: PlacementGroup | None = None  # Of the gang before.
        self._forgetting: Pending[list[int]] | None = None
        self._verifying = self._begin_verifying()

    @property
    def state(self) -> State:
        """How far the gang that runs now is, or is about to be."""
        return "verifying a checkpoint" if self._gang is None else self._gang.state

    @property
    def wants_place(self) -> bool:
        """Says whether its ranks have no place, or may just have lost it: actors leave it to them."""
        if self._gang is not None:
            return self._gang.wants_place
        return self._place is None or not is_placed(self._place)

    @property
    def totals(self) -> list[dict[str, float]]:
        """What each rank's `train` returned, once `state` is `done`."""
        return [] if self._gang is None else self._gang.totals

    @property
    def num_deaths(self) -> int:
        """Deaths of a gang so far."""
        return self._deaths.total(RANK)

    def clients(self) -> dict[str, Client]:
        """Returns the ranks that exist as processes, by name."""
        return {} if self._gang is None else self._gang.clients()

    def poll(self) -> None:
        """Takes the answers that have come. Raises AgroError for what another start would not mend, and for
        too many deaths.
        """
        if self._gang is not None:
            was_training = self._gang.state == "training"
            self._mourn(self._gang.poll)
            if self._is_target_reached and not was_training:
                self._end_gang()
        elif self._verifying.is_done() and (self._forgetting is None or self._forgetting.is_done()):
            if self._forgetting is not None and (dropped := self._forgetting.result()):
                self._tell(
                    f"evaluations of versions {dropped} ended with the learner's death; the versions it publishes "
                    "again are evaluated again, and in place of others the one that comes next"
                )
            self._gang = self._make_gang(self._verifying.result())

    def tick(self, now_s: float) -> None:
        """Does what is due at `now_s` of the clock. Raises as `poll` does."""
        if self._gang is not None:
            gang = self._gang
            self._mourn(lambda: gang.tick(now_s))

    def request_stop(self) -> None:
        """Ends training in order after the step in progress."""
        self._stopping = True
        if self._gang is not None:
            self._gang.request_stop()

    def end_at_target(self) -> None:
        """Ends training as after its last step: the target is reached. Ranks that start again are told
        again.
        """
        self._is_target_reached = True
        self._end_gang()

    def _end_gang(self) -> None:
        if self._gang is not None and self._gang.state == "training":
            self._gang.request_stop(is_target_reached=True)

    def republish(self) -> None:
        """Tells a board that was started again of the weights once more."""
        if self._gang is not None:
            self._gang.republish()

    def kill(self) -> None:
        """Ends the ranks at once and frees their place."""
        if self._gang is not None:
            self._gang.kill()
        elif self._place is not None:
            remove_placement_group(self._place)

    def _mourn(self, step: Callable[[], None]) -> None:
        """Takes the step; begins another start when a rank turns out to have died."""
        try:
            step()
        except RankDied as error:
            self._restart(error)

    def _restart(self, error: RankDied) -> None:
        assert self._gang is not None
        is_over = self._stopping or not self._config.checkpoint.every
        done = f"the run ends: {'it was stopping anyway' if self._stopping else 'it keeps no checkpoints'}"
        saved = max((step for step, _ in checkpoint_dirs(self._run_dir)), default=0)
        held = f"{max(0, self._deaths.step - saved)} steps since step {saved}, its newest checkpoint"
        for place, rank in enumerate(
            self._gang.dead
        ):  # However many ranks die of one cause: it is one death.
            self._deaths.note(
                RANK,
                rank.name,
                rank.cause,
                where=rank.where,
                held=held,
                done=done if is_over else "",
                counts=not place,
            )
        if is_over:
            raise error
        died, _, words = str(error).partition("\n")
        self._tell(f"{died}; starting the learner again\n{words}".strip())
        self._gang.kill(keeps_place=True)
        self._place, self._gang = self._gang.place, None
        self._forgetting = self._forget_snapshots()
        self._verifying = self._begin_verifying()

    def _begin_verifying(self) -> Pending[tuple[Path, CheckpointManifest] | None]:
        return self._calls.in_background(lambda: latest_checkpoint(self._run_dir, self._tell), "verifying")

    def _make_gang(self, found: tuple[Path, CheckpointManifest] | None) -> LearnerGang:
        if found is not None:
            self._tell(f"going on from {found[0].name}")
            self._on_going_on(found[1].step)
        train_arguments = (*self._peers, str(self._run_dir / "policy"), str(found[0]) if found else None)
        return LearnerGang(
            self._config, self._pad_id, train_arguments, self._log_of, self._calls, self._place
        )
