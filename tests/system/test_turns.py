"""A whole run of several turns: real vLLM, real ZeRO-3, environments in their processes, and actors that are
killed in the phases of their episodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from buffer.ledger import audit_run
from tests.support.environments.sums import MARKS
from tests.support.runs import actor_of, described, rows_of, start_train, wait_for_step

pytestmark = pytest.mark.slow

STEPS = 8
MOST_S = 240.0
MODULE = "tests.support.environments.sums"


def until(condition: Callable[[], Any], what: str, timeout_s: float = MOST_S) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return found


def actor_in(marks: Path, phase: str) -> psutil.Process | None:
    return next((actor for mark in marks.glob(f"{phase}-*") if (actor := actor_of(mark)) is not None), None)


def test_a_run_of_several_turns_ends_with_a_clean_audit_though_actors_are_killed_in_the_middle_of_episodes(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv(MARKS, str(marks))
    strangers = set(psutil.Process().children(recursive=True))
    process = start_train(
        tiny_models["tied"],
        run_dir,
        STEPS,
        f"environments={MODULE}:Twice",
        f"rewards.functions={{'{MODULE}:scored': 1}}",
        "actors.count=2",
        "actors.slots=32",
        "actors.max_turns=4",
        "buffer.max_staleness=100",
        "eval.every=4",
        "data.eval_rows=4",
    )
    for phase in ("reset", "act", "scored"):
        until(lambda phase=phase: actor_in(marks, phase) or process.poll() is not None, phase)  # type: ignore[misc]
        assert process.poll() is None, process.communicate()
        victim = actor_in(marks, phase) or until(lambda phase=phase: actor_in(marks, phase), phase)  # type: ignore[misc]
        family = victim.children(recursive=True)
        assert len(family) > 2, "workers, a template and places"
        victim.kill()
        until(lambda family=family: not described(family), f"the processes of {victim.pid} end")  # type: ignore[misc]
    wait_for_step(process, run_dir, STEPS)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    left = set(psutil.Process().children(recursive=True)) - strangers
    assert not described([*left]), out
    found = audit_run(run_dir)
    assert found["violations"] == []
    last = rows_of(run_dir)[-1]
    assert last["completions/turns"] > 1
    assert (last["environment/errors"], last["environment/crashes"]) == (0, 0)
    assert any((row["environment/answer_s"] or 0) > 0.1 for row in rows_of(run_dir))
    assert last["mismatch/mean"] is None or last["mismatch/mean"] < 1e-4
    assert any(row["mismatch/tokens"] for row in rows_of(run_dir)), "of fresh samples of several turns"
    assert last["eval/solve_rate"] is not None
    told = [[role for role, _ in sample["transcript"]] for sample in rows_of(run_dir, "samples")]
    assert told
    assert all(roles == ["assistant", "user", "assistant"][: len(roles)] for roles in told)
