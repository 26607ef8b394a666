"""Whole runs on a log of completions, alone and mixed with generated ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.ledger import audit
from tests.support.runs import ROOT, environment, overrides, rows_of
from tests.support.scores import write_rows

TRAINING = [json.loads(line) for line in (ROOT / "configs/arithmetic/train.jsonl").read_text().splitlines()]


def run_train(model: Path, run_dir: Path, *more: str) -> str:
    command = [
        sys.executable,
        "launch.py",
        "train",
        "configs/quickstart.yaml",
        *overrides(model, run_dir, 4),
        "objective.importance_weight=none",
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=560, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_trains_on_a_log_alone_without_any_actor(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {**row, "completion": str(int(row["answer"]) + off)} for row in TRAINING[:24] for off in range(10)
    ]
    log = write_rows(tmp_path / "log.jsonl", *rows, rows[0])
    run_dir = tmp_path / "run"
    out = run_train(tiny_models["tied"], run_dir, "data.path=null", f"data.offline={log}", "actors.count=0")
    metrics = rows_of(run_dir)
    assert [row["staleness/offline_fraction"] for row in metrics] == [1.0] * 4
    assert all(row["staleness/mean"] is None and row["optim/grad_norm"] > 0 for row in metrics)
    assert [row["reward/mean"] for row in metrics] == [pytest.approx(0.1, abs=0.07)] * 4, (
        "8 of 10 completions, of which 1 is right"
    )
    assert metrics[-1]["progress/samples"] == 4 * 8 * 8
    assert {(sample["version"], sample["staleness"]) for sample in rows_of(run_dir, "samples")} == {
        (None, None)
    }
    result = audit(run_dir / "ledger.jsonl")
    assert (result["violations"], result["events"]["trained"], result["max_staleness"]) == ([], 32, 0)
    events = " ".join(event["text"] for event in rows_of(run_dir, "events"))
    assert "nothing is evaluated" in events
    assert "241 samples of 24 prompts, 1 of them exact duplicates" in events
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["final_solve_rate"], summary["staleness_mean"], summary["steps"]) == (None, None, 4)
    assert "solve rate - -> -" in " ".join(out.split())
    assert (run_dir / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_mixes_a_quarter_of_logged_samples_into_every_group(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [
        {**row, "completion": str(int(row["answer"]) + off), "reward": 5.0}
        for row in TRAINING[:-1]
        for off in range(3)
    ]
    log = write_rows(tmp_path / "log.jsonl", *rows)
    run_dir = tmp_path / "run"
    run_train(
        tiny_models["tied"],
        run_dir,
        f"data.offline={log}?share=0.25",
        "actors.count=1",
        "data.eval_rows=0",
    )
    metrics = rows_of(run_dir)
    assert [row["staleness/offline_fraction"] for row in metrics] == [
        pytest.approx(0.25, abs=0.25 / 8 + 1e-9)
    ] * 4
    assert max(row["staleness/offline_fraction"] for row in metrics) == 0.25
    assert all(row["reward/mean"] >= 0.25 * 7 / 8 * 5 for row in metrics), "logged rewards stand"
    assert all(row["staleness/mean"] is not None for row in metrics)
    assert metrics[-1]["progress/samples"] == 4 * 8 * 8
    result = audit(run_dir / "ledger.jsonl")
    assert (result["violations"], result["events"]["trained"]) == ([], 32)
    events = " ".join(event["text"] for event in rows_of(run_dir, "events"))
    assert "offline samples for 299 of 300 prompts (2 of each group)" in events
