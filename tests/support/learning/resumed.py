"""A learner of several ranks in a run directory, to be killed and started again."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.config import Config
from learner.catalogue import parse_config
from learner.checkpoints.checkpoint import Checkpoint, latest_checkpoint, verify
from tests.support.configs import update_config
from tests.support.learning.ranks import start_ranks
from tests.support.scenarios.checkpoint_scenario import train

STEPS = 12


def run_config(model_dir: Path, *, dtype: str = "float32", ranks: int = 2, steps: int = STEPS) -> Config:
    """In fp32 with a moving reference and proximal policy. Saves every 3 steps and keeps all."""
    tree = update_config(
        str(model_dir), moving=dtype == "float32", ranks=ranks, schedule=(3, "cosine")
    ).model_dump()
    tree["model"]["dtype"] = dtype
    tree["run"] = {"steps": steps, "deterministic": True, "timeout_s": 120.0}
    tree["checkpoint"] = {"every": 3}
    return parse_config(tree)


class Run:
    """A run directory and the processes of its ranks."""

    def __init__(self, directory: Path, config: Config, **script: Any) -> None:
        self.dir, self.config = directory, config
        directory.mkdir(exist_ok=True)
        (directory / "script.json").write_text(json.dumps(script))
        (directory / "config.json").write_text(config.model_dump_json())
        (directory / "wandb_id").write_text("a1b2c3\n")

    def start(self, **script: Any) -> None:
        """Starts the ranks, with another script where there is one."""
        if script:
            (self.dir / "script.json").write_text(json.dumps(script))
        found = latest_checkpoint(self.dir)
        (self.dir / "port").unlink(missing_ok=True)
        resume_from = str(found[0]) if found else None
        self.ranks = start_ranks(train, self.config.learner.ranks, self.dir, resume_from)

    def ended(self) -> list[int | None]:
        for rank in self.ranks:
            rank.join(240)
        return [rank.exitcode for rank in self.ranks]

    def finish(self) -> None:
        assert self.ended() == [0] * len(self.ranks), (self.dir / "stderr-0.txt").read_text()[-3000:]

    def kill_when(self, is_time: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 240
        while not is_time():
            assert all(rank.is_alive() for rank in self.ranks), (self.dir / "stderr-0.txt").read_text()[
                -3000:
            ]
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        for rank in self.ranks:
            rank.kill()
        assert self.ended() == [-signal.SIGKILL] * len(self.ranks)

    def die_in(self, where: str) -> None:
        """One rank is killed there, and then the other, as the gang does: it waits for the dead one in
        a collective.
        """
        self.start(dies=where)
        self.ranks[1].join(240)
        assert self.ranks[1].exitcode == -signal.SIGKILL, (self.dir / "stderr-1.txt").read_text()[-3000:]
        self.ranks[0].kill()
        self.ended()

    def notes(self, what: str) -> list[Any]:
        """What rank 0 has noted by that name; a line that is torn, or half written yet, says nothing."""
        path, found = self.dir / "log-0.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                if what in (record := json.loads(line)):
                    found.append(record[what])
        return found

    def rows(self) -> dict[int, dict[str, str]]:
        """`repr` of the metrics of each step, the last written of each, without what depends on the clock."""
        clocks = ("time/", "perf/", "checkpoint/", "weights/publish_s", "weights/store_s")
        rows = {int(row["progress/step"]): row for row in self.notes("row")}
        return {
            step: {name: row[name] for name in row if not name.startswith(clocks)}
            for step, row in rows.items()
        }

    def checkpoint(self, step: int) -> Checkpoint:
        path = self.dir / "checkpoints" / f"step-{step:06d}"
        return Checkpoint(path, verify(path))
