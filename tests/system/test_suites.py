"""A run with several suites, killed in the middle of them: nothing is lost or evaluated twice, and the best
version is kept.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest

from learner.checkpoints.checkpoint import latest_checkpoint
from tests.support.runs import rows_of, start_train

pytestmark = pytest.mark.slow

STEPS = 12
SUITES = {"many": 2, "few": 1}
MORE = [
    "eval.suites={many: {path: configs/arithmetic, rows: 24, samples: 2}, few: {path: configs/arithmetic, rows: 8}}",
    "data.eval_path=configs/arithmetic",
    "eval.keep_best=many/pass@2",
    "checkpoint.every=3",
]


def keys(run_dir: Path) -> list[tuple[str, int]]:
    return [(line["suite"], line["policy_version"]) for line in rows_of(run_dir, "evaluations")]


def test_a_driver_killed_in_the_middle_of_suites_loses_and_repeats_nothing(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = start_train(tiny_models["tied"], run_dir, STEPS, *MORE)
    deadline_s = time.monotonic() + 280
    while not any(version > 0 for _, version in keys(run_dir)):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before, newest = keys(run_dir), latest_checkpoint(run_dir)
    again = start_train(tiny_models["tied"], run_dir, STEPS, *MORE)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    found = collections.Counter(keys(run_dir))
    told = [event["text"] for event in rows_of(run_dir, "events")]
    gone = [
        re.search(r"before version (\d+) .* was written, and its weights are gone", text) for text in told
    ]
    lost = {("many", int(match[1])) for match in gone if match}
    for suite in (*SUITES, "held_out"):
        start, *between, end = sorted(version for name, version in found if name == suite)
        assert (start, end) == (0, STEPS)
        # Made up for with the checkpoint's version, where that was beyond 6 already; by the suite that says
        # which version is kept, also where the weights that were to be kept went with the driver.
        # Where the last checkpoint was written before any other result, with that, which is the end's.
        is_lost = suite == "many" and bool(lost)
        is_over = newest is not None and newest[1].step == STEPS
        assert between in ([6], [9]) or (is_lost and between == [6, 9]) or (is_over and between == [])
    # Evaluated once more is what was to be kept and went with the driver, and nothing else.
    twice = {key for key, times in found.items() if times > 1}
    assert twice <= lost, "what was done before the kill is not done again"
    assert max(found.values()) <= 2
    assert set(before) <= set(found)
    lines = rows_of(run_dir, "evaluations")
    assert {line["suite"]: line["num_samples"] for line in lines} == {"many": 48, "few": 8, "held_out": 20}
    last = rows_of(run_dir)[-1]
    for suite, samples in SUITES.items():
        assert last[f"eval/{suite}/policy_version"] == STEPS
        assert last[f"eval/{suite}/avg@{samples}"] is not None
    best = json.loads((run_dir / "best" / "evaluation.json").read_text())
    values = {line["policy_version"]: line["metrics"]["pass@2"] for line in lines if line["suite"] == "many"}
    assert best["value"] == values[best["policy_version"]]
    assert math.isclose(best["value"], max(values.values())) or "before version" in out
    assert (run_dir / "best" / "model.safetensors").is_file()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["best"]["policy_version"] == best["policy_version"]
    assert summary["suites"]["many"]["final_policy_version"] == STEPS
    assert "Suite many" in (run_dir / "report.html").read_text()
