"""What a run came to: summary.json, from its totals, its evaluations and its counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cluster.deaths import ACTOR, BOARD, MONITOR, RANK, SHARD, Deaths
from cluster.evaluations.best import FOLDER, Kept
from cluster.preparation.prepare import Inputs
from core.config.evaluation import HELD_OUT
from core.evaluation.records import Evaluation


def run_summary(
    inputs: Inputs,
    wall_s: float,
    *,
    totals: Mapping[str, float],
    evaluations: Sequence[Evaluation],
    stats: Mapping[str, float],
    deaths: Deaths,
    stopped: str | None,
    best: Kept | None = None,
    last_errors: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns summary.json: of one start of the run, but for the evaluations.

    `totals` are those of rank 0, empty when training did not end; `evaluations` are by policy version;
    `stats` are the buffer's; `stopped` is the signal or the error that ended the run, None where it ended by
    itself; `best` is the best version that is kept; `last_errors` say why samples got no reward, with counts.
    """
    run_dir = inputs.run_dir
    by_suite = {name: _course(evaluations, name) for name in {each.suite for each in evaluations}}
    held_out = by_suite.get(HELD_OUT) or {}
    # Of a run in one piece only: the wall time of its earlier starts is not known here.
    is_timed = bool(totals) and not inputs.is_continued
    samples_per_s = totals["samples"] / wall_s if is_timed else None
    # Without it, what lies there is of an earlier start.
    policy_dir = str(run_dir / "policy") if totals.get("policy_written") else None
    return {
        "name": inputs.config.run.name,
        "steps": totals.get("steps"),
        "wall_s": wall_s,
        "base_solve_rate": held_out.get("base"),
        "final_solve_rate": held_out.get("final"),
        "final_policy_version": held_out.get("final_policy_version"),
        "suites": {name: by_suite[name] for name in sorted(by_suite)},
        **{name: _known(totals.get(name)) for name in ("staleness_mean", "staleness_max")},
        "samples": totals.get("samples"),
        "tokens": totals.get("tokens"),
        "samples_per_s": samples_per_s,
        "policy_dir": policy_dir,
        "environments": sorted(inputs.config.environment_paths),
        "best": None if best is None else {**msgspec.structs.asdict(best), "dir": str(run_dir / FOLDER)},
        "report": str(run_dir / "report.html"),
        "run_dir": str(run_dir),
        "stopped": stopped,
        "is_continued": inputs.is_continued,
        "last_errors": dict(last_errors or {}),
        "errors": {
            "failed rewards": stats["buffer/samples_error"],
            "bad rows skipped": inputs.prompts.num_bad_rows,
            "groups evicted as stale": stats["buffer/evicted_stale"],
            "actor restarts": deaths.total(ACTOR),
            "learner restarts": deaths.total(RANK),
            "buffer restarts": deaths.total(SHARD),
            "board restarts": deaths.total(BOARD),
            "monitor restarts": deaths.total(MONITOR),
        },
        "wandb_mode": inputs.wandb_mode,
    }


def _course(evaluations: Sequence[Evaluation], suite: str) -> dict[str, Any]:
    """Returns the first and the last solve rate of a suite, and every metric of its last version."""
    of_suite = {each.policy_version: each for each in evaluations if each.suite == suite}
    last = of_suite[max(of_suite)]
    return {
        "base": of_suite[0].solve_rate if 0 in of_suite else None,
        "final": last.solve_rate,
        "final_policy_version": last.policy_version,
        "problems": last.num_problems,
        "metrics": last.metrics,
    }


def _known(value: float | None) -> float | None:
    """None for NaN: all samples were offline, and had no age."""
    return None if value is None or math.isnan(value) else value
