"""What is measured: three jobs, and how each system is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from core.config import Config

HERE = Path(__file__).parent


class PeerJob(NamedTuple):
    """A job by the name of its config beside this file.

    reward    the name of its reward function in benchmarks/peers/trl_grpo.py
    warm_steps  steps before the steady state
    window_s    so long a system is measured in its steady state, at least until its next step is done
    timeout_s     and at most so long after its first step, where it is to reach `solved`
    solved      the mean reward that ends a measurement, once the window is over; None: not waited for
    threads     OpenMP threads of the plain loop: two cost small models more than they give
    """

    name: str
    reward: str
    warm_steps: int
    window_s: float
    timeout_s: float
    solved: float | None = None
    threads: int = 1

    @property
    def config_path(self) -> Path:
        """Returns the path of its config."""
        return HERE / f"{self.name}.yaml"


JOBS = {
    job.name: job
    for job in (
        PeerJob("sums", "exact_match", warm_steps=10, window_s=15.0, timeout_s=50.0, solved=0.8),
        PeerJob("tail", "countdown", warm_steps=1, window_s=25.0, timeout_s=40.0, threads=2),
        PeerJob("turns", "exact_match", warm_steps=3, window_s=15.0, timeout_s=30.0),
    )
}


def told(job: PeerJob, config: Config) -> dict[str, Any]:
    """Returns what benchmarks/peers/trl_grpo.py is told of a job."""
    from actors.sources import TRAIN_SPLIT, read_source

    actors, learner = config.actors, config.learner
    source = read_source("data.path", next(iter(config.data.sources)), TRAIN_SPLIT, None)
    rows: list[dict[str, Any]] = [row for row in source.rows.values() if isinstance(row, dict)]
    turns = actors.max_turns if config.environments else 1
    if turns > 1:
        rows = [
            {"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]}
            for row in rows
        ]
    warmup_steps, schedule = learner.schedule
    return {
        "model": config.model.path,
        "rows": rows,
        "reward": job.reward,
        "groups": learner.groups_per_step,
        "group_size": actors.group_size,
        "max_new_tokens": actors.max_new_tokens,
        "max_turns": turns,
        "lr": learner.lr,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "steps": config.run.steps,
        "seed": config.run.seed,
    }
