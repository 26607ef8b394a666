"""The cases of benchmarks/gpu: all can be called, one that takes too long is ended with all that it has
started, and what was measured is a table.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import benchmarks.gpu.__main__ as command
from benchmarks.gpu import cases
from benchmarks.gpu.cases import CASES, Case, by_name, function_of, run_case
from benchmarks.gpu.checks import RUNS
from benchmarks.gpu.measures import ON_CARD, TASK
from benchmarks.gpu.table import tables
from benchmarks.processes import end_session
from learner.catalogue import load_config
from tests.support import ROOT
from tests.support.configs import quickstart

STARTS_OTHERS = """
trap '' TERM
setsid sleep 600 & echo $! >> "$1"
sleep 600 & echo $! >> "$1"
echo $$ >> "$1"
while true; do sleep 1; done
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_ignores_sigterm_or_has_a_session_of_its_own_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    process = subprocess.Popen(
        ["bash", "-c", STARTS_OTHERS, "bash", str(pids)],
        env={**os.environ, "AGRO_MARK": str(tmp_path)},
        text=True,
        start_new_session=True,
    )
    deadline_s = time.monotonic() + 60
    while not pids.exists() or len(pids.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    started = [int(line) for line in pids.read_text().splitlines()]
    assert all(map(lives, started))
    end_session(process, f"AGRO_MARK={tmp_path}", grace_s=0.2)
    deadline_s = time.monotonic() + 60
    while any(map(lives, started)):  # The kernel ends them when it gets to it.
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert process.returncode == -9


def test_what_ends_at_sigterm_is_not_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"], text=True, start_new_session=True)
    end_session(process, f"AGRO_MARK={tmp_path}", grace_s=600.0)
    assert process.returncode == -15
    end_session(process, f"AGRO_MARK={tmp_path}", grace_s=600.0)


def test_a_case_that_takes_too_long_says_so_and_is_gone() -> None:
    found = run_case(by_name("row-softmax")._replace(timeout_s=0.0), on_cpu=True)
    assert (found["ok"], found["found"]) == (False, "it took more than 0 s")
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert "row-softmax" not in child.cmdline()


ALL = [case for cases in CASES.values() for case in cases]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_case_can_be_called_and_fits_a_piece(case: Case) -> None:
    inspect.signature(function_of(case)).bind(*case.given, on_gpu=True)
    assert by_name(case.name) is case
    assert case.timeout_s <= 9 * 60


def test_what_is_set_on_a_card_is_a_config() -> None:
    for on_card, everywhere in RUNS.values():
        config = quickstart(*on_card.split(), *everywhere.split())
        assert config.actors.fewest * config.actors.num_gpus + config.learner.num_gpus <= 2
    overrides = [f"data.path={TASK}", "data.eval_rows=0", *ON_CARD]
    config = load_config(ROOT / "configs/smollm2_sums.yaml", overrides)
    assert config.actors.num_gpus + config.learner.num_gpus == 1
    assert config.learner.groups_per_step * config.actors.group_size <= config.actors.slots


@pytest.mark.parametrize("what", [*CASES])
def test_without_a_gpu_it_says_what_it_would_do(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", what])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"No GPU here: nothing is run. On a machine with one, `make {what}-gpu` shows that"
    )
    for case in CASES[what]:
        assert f"  {case.name} " in said
        assert case.shows in said
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", what, "--minutes", "1", CASES[what][0].name])
    assert command.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_is_done_is_not_done_again_and_what_has_no_time_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(case: Case, *, on_cpu: bool) -> dict[str, Any]:
        ran.append(case.name)
        return (
            {"ok": True}
            if case.name != "b"
            else {"ok": False, "found": "the end", "said": ["why", "the end"]}
        )

    monkeypatch.setattr(command, "run_case", run)
    monkeypatch.setattr(command, "num_gpus", lambda: 1)
    cases = [Case("a", "", ""), Case("b", "", ""), Case("c", "", "", gpus=2)]
    path = tmp_path / "gpu-card.json"
    assert command._run(cases, path, minutes=0.0, again=False) == 0
    assert "1 cases have no time left" in capsys.readouterr().out
    assert command._run(cases, path, minutes=0.0, again=False) == 1
    assert ran == ["a", "b"]
    assert "\n    why\n    the end\n" in capsys.readouterr().out
    done = json.loads(path.read_text())
    assert done["a"] == {"ok": True}
    assert done["b"] == {"ok": False, "found": "the end"}
    assert done["machine"]["cpus"]


def test_what_was_measured_is_a_table(tmp_path: Path) -> None:
    learner = [
        {
            "case": "ours",
            "budget_tokens": 8192,
            "tokens_per_s": 30_000,
            "mfu": 0.4,
            "peak_gib": 30.1,
            "ratio": 1.5,
        },
        {"case": "plain loop", "budget_tokens": 8192, "tokens_per_s": 20_000, "mfu": 0.27, "peak_gib": 50.2},
    ]
    done = {
        "machine": {"gpus": ["a card"]},
        "memory": {"ok": False, "found": "no"},
        "actor-0.5B": {"ok": True, "tokens_per_s": 40_000, "bare": 41_000, "ratio": 0.976},
        "publish-1.5B": {"ok": True, "gb": 3.1, "stall_s": 0.2, "bare_copy_s": 0.1, "store_s": 3.0},
        "update-1.5B": {"ok": True, "gb": 3.1, "verify_s": 0.3, "pause_s": 0.5},
        "learner-8k": {"ok": True, "rows": learner},
        "reward-together": {
            "ok": True,
            "aim": 0.6,
            "seconds": 100.0,
            "steps": 90.0,
            "reward": 0.61,
            "is_reached": True,
        },
        "reward-alternating": {
            "ok": True,
            "aim": 0.6,
            "seconds": 240.0,
            "steps": 99.0,
            "reward": 0.4,
            "is_reached": False,
        },
    }
    (tmp_path / "gpu-a-card.json").write_text(json.dumps(done))
    lines = tables(tmp_path).splitlines()
    assert lines[0] == "| a-card | this system | bare | of bare |"
    assert "| tokens/s of an engine, 0.5B, against vLLM's own loop | 40,000 | 41,000 | 0.98 |" in lines
    assert any(line.endswith("| 0.20 s | 0.10 s | 0.50 |") for line in lines)
    assert any(line.endswith("| 30,000 | 20,000 | 1.50 |") for line in lines)
    assert any("0.40 after 240 s |  |" in line for line in lines)
    assert len({line.count("|") for line in lines}) == 1
    assert tables(tmp_path / "none") == ""


def test_what_a_library_prints_as_it_ends_is_not_taken_for_what_was_found():
    said = ["warming up", '{"ok": true, "found": 3}', '{"bye": 1}', "[1]", "leaked a semaphore"]
    assert cases._found(said) == {"ok": True, "found": 3}
    assert cases._found(["nothing"]) is None
