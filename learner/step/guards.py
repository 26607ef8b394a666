"""What keeps a bad batch or a bad moment from becoming a bad policy, and says so: the same on every rank,
since all see the same.

    batch --check_batch--> update --Guards.judge--> skipped: counted, told, its batch kept;
                                      |             the third in a row ends the run
                                      `-----------> done: alarms on the metrics, which stop nothing
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from core.errors import TrainingError
from learner.step.bad_batch import BadBatch, Skip, file_name, write_bad_batch
from learner.step.mismatch import is_above

MAX_SKIPS = 3
"""So many skipped steps in a row end the run: it is not the batch then."""

WINDOW, MIN_SEEN, NUM_MADS, QUIET_STEPS = 50, 20, 10.0, 25
MIN_SPREAD = 0.02
"""Least spread, as a share of the median: where a series hardly moves, its MAD makes a spike of every
small change.
"""
NO_SIGNAL = 1e-9
"""What is watched and no larger is rounding: all groups of the step agreed. Once the task is solved nearly
all steps are such, and beside them every other would be a spike.
"""
JUMP, BEFORE = 2.0, slice(-5, -2)
"""The KL to the reference grows while a policy learns. A rise that goes on is no spike: that is at more than
`JUMP` times the most of a few steps before, which a KL that runs away soon is, too.
"""
WATCHED = {"loss spike": ("objective/residual_std", "optim/grad_norm"), "KL spike": ("objective/kl_ref",)}
"""By alarm, the metric it looks at: the first that is known. AGRO's loss is half the square of the residual's
spread; a gradient norm has heavy tails (in recorded healthy runs such an alarm every 200 steps), and serves
where an objective has no reference.
"""


class Alarms:
    """Tells of values far above what they were lately: `for sentence in alarms.observe(step, metrics)`.

    A value is far when it is more than `NUM_MADS` median absolute deviations above the running median, and no
    rise of the KL that goes on. Each series is judged against its last `WINDOW` values, once it has
    `MIN_SEEN`; after an alarm it is quiet for `QUIET_STEPS`. Steps without a signal are left out. Log-probs
    of actors and learner that are further apart than `mismatch_bound_nats` give an alarm, too.
    """

    def __init__(self, mismatch_bound_nats: float = math.inf) -> None:
        self.count = 0
        self._mismatch_bound_nats = mismatch_bound_nats
        self._seen: dict[str, deque[float]] = {alarm: deque(maxlen=WINDOW) for alarm in WATCHED}
        self._told: dict[str, int] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Returns the alarms of this learner step, a sentence each. What is missing or not finite is left
        out.
        """
        events = []
        for alarm, seen in self._seen.items():
            known = [name for name in WATCHED[alarm] if math.isfinite(metrics.get(name, math.nan))]
            if not known:
                continue
            value, limit = metrics[known[0]], alarm_limit(seen) if len(seen) >= MIN_SEEN else math.inf
            if 0 <= value <= NO_SIGNAL:
                continue
            goes_on = alarm == "KL spike" and value <= JUMP * max(map(abs, list(seen)[BEFORE]), default=0.0)
            if value > limit and not goes_on and step - self._told.get(alarm, -QUIET_STEPS) >= QUIET_STEPS:
                self._told[alarm] = step
                events.append(
                    f"{alarm} at learner step {step}: {known[0]} = {value:.4g}, above {limit:.4g}, which is "
                    f"the median of the last {len(seen)} steps and {NUM_MADS:g} times their median deviation"
                )
            seen.append(value)
        events += self._mismatch(step, metrics)
        self.count += len(events)
        return events

    def _mismatch(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        mean, error = metrics.get("mismatch/mean", 0.0), metrics.get("mismatch/standard_error", 0.0)
        bound = self._mismatch_bound_nats
        if not is_above(mean, error, bound) or step - self._told.get("mismatch", -QUIET_STEPS) < QUIET_STEPS:
            return []
        self._told["mismatch"] = step
        return [
            f"mismatch at learner step {step}: log-probs by actors and learner of "
            f"{metrics['mismatch/tokens']:.0f} fresh tokens differ by {mean:.3g} nats on average, above "
            f"{bound:g}: the actors no longer sample from what the learner computes (mismatch/*)"
        ]

    def get_state(self) -> dict[str, Any]:
        """Returns the series, and when which alarm was last given, as JSON."""
        return {
            "count": self.count,
            "seen": {alarm: list(values) for alarm, values in self._seen.items()},
            "told": dict(self._told),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned."""
        self.count, self._told = int(state["count"]), dict(state["told"])
        self._seen = {alarm: deque(state["seen"][alarm], maxlen=WINDOW) for alarm in WATCHED}


def alarm_limit(values: Collection[float]) -> float:
    """Returns median + NUM_MADS * MAD of the values; the MAD is at least MIN_SPREAD of the median."""
    median = statistics.median(values)
    spread = statistics.median(abs(value - median) for value in values)
    return median + NUM_MADS * max(spread, MIN_SPREAD * abs(median))


class Guards:
    """Judges every step: `guards.judge(step, payload, result.metrics(), result.skip)` on all ranks at once.

    directory            where the batches of skipped steps are kept, by rank 0
    tell                 gets a sentence about each skipped step and each alarm, on rank 0
    share                brings rank 0's sentence to every rank
    mismatch_bound_nats  mean difference of log-probs above which actors and learner differ
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        *,
        tell: Callable[[str], Any],
        share: Callable[[str], str],
        mismatch_bound_nats: float = math.inf,
    ) -> None:
        self._directory, self._rank, self._tell, self._share = directory, rank, tell, share
        self._alarms = Alarms(mismatch_bound_nats)
        self._skipped = self._in_a_row = 0

    def judge(self, step: int, payload: bytes, metrics: Mapping[str, float], skip: Skip | None) -> None:
        """Judges learner step `step`, whose encoded batch `payload` rank 0 has. Collective when the step was
        skipped.

        Raises TrainingError on every rank, with the batch kept, when it is the `MAX_SKIPS`th skipped in a
        row.
        """
        if skip is None:
            self._in_a_row = 0
            events = self._alarms.observe(step, metrics)
        else:
            self._skipped += 1
            self._in_a_row += 1
            # Rank 0 has written before any rank raises: the others' end may be the end of its process.
            kept = self._share(self._keep(step, payload, skip) if self._rank == 0 else "")
            if self._in_a_row >= MAX_SKIPS:
                raise TrainingError(
                    f"{self._in_a_row} learner steps in a row were skipped, the last is step {step}: "
                    f"{skip.describe()}\n{kept}\n"
                    "The parameters are as they were before. Lower learner.lr, look at the batch with "
                    "launch.py inspect-batch, or check the model with transformers."
                )
            events = [f"learner step {step} skipped: {skip.describe()}; {kept}"]
        if self._rank == 0:
            for event in events:
                self._tell(event)

    def metrics(self) -> dict[str, float]:
        """Returns the counts of skipped steps and alarms by their names in metrics.jsonl."""
        return {"guard/skipped_steps": float(self._skipped), "guard/alarms": float(self._alarms.count)}

    def get_state(self) -> dict[str, Any]:
        """Returns the counts and series as JSON; equal on every rank."""
        return {"skipped": self._skipped, "in_a_row": self._in_a_row, "alarms": self._alarms.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned."""
        self._skipped, self._in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self._alarms.set_state(state["alarms"])

    def _keep(self, step: int, payload: bytes, skip: Skip) -> str:
        """Keeps the batch and says where it is now, or why it is not kept: a full disk does not stop
        training.
        """
        path = self._directory / file_name(step)
        try:
            write_bad_batch(path, BadBatch(step=step, skip=skip, batch=payload))
        except OSError as error:
            return f"its batch could not be kept: {error}"
        return f"its batch is kept in {path}"
