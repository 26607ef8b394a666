"""A whole run whose environment is an agent of the `openai` package: real vLLM, real ZeRO-3, samples of
several segments, and an actor that is killed while agents talk.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from buffer.ledger import audit_run
from tests.support.environments.sums_agent import MARKS
from tests.support.runs import actor_of, described, rows_of, start_train, wait_for_step

pytestmark = pytest.mark.slow

STEPS = 5
MOST_S = 240.0


def test_a_run_with_an_agent_ends_with_a_clean_audit_though_its_actor_is_killed(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv(MARKS, str(marks))
    process = start_train(
        tiny_models["tied"],
        run_dir,
        STEPS,
        "environments=tests.support.environments.sums_agent:agent",
        "rewards.functions={environment: 1}",
        "actors.slots=32",
        "actors.max_turns=4",
        "buffer.max_staleness=100",
        "eval.every=5",
        "data.eval_rows=4",
    )
    deadline_s = time.monotonic() + MOST_S
    victim = None
    while victim is None:
        assert time.monotonic() < deadline_s
        assert process.poll() is None, process.communicate()
        victim = next((actor for mark in marks.iterdir() if (actor := actor_of(mark)) is not None), None)
        time.sleep(0.01)
    family = victim.children(recursive=True)
    victim.kill()
    while described(family):
        assert time.monotonic() < deadline_s, described(family)
        time.sleep(0.05)
    wait_for_step(process, run_dir, STEPS)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert audit_run(run_dir)["violations"] == []
    last = rows_of(run_dir)[-1]
    assert last["completions/turns"] == 3
    assert (last["environment/errors"], last["environment/crashes"]) == (0, 0)
    assert last["mismatch/mean"] is None or last["mismatch/mean"] < 1e-4
    assert any(row["mismatch/tokens"] for row in rows_of(run_dir)), "of fresh samples of several segments"
    roles = [[role for role, _ in sample["transcript"]] for sample in rows_of(run_dir, "samples")]
    assert ["user", "assistant"] * 3 in roles
