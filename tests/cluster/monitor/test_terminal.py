"""The terminal: plain lines, the live screen and the summary."""

from __future__ import annotations

import contextlib
import io
import math
import os
from pathlib import Path

from rich.console import Console

from cluster.monitor.monitor import Monitor
from cluster.monitor.terminal import Terminal, duration, plain_line, screen, sparkline, summary_screen
from tests.support.monitored import Clock, monitored, rows_of


def run_for_terminal(tmp_path: Path, steps: int, stream: io.StringIO) -> tuple[Monitor, list[str]]:
    clock = Clock()
    monitor = Monitor(monitored(steps=steps), str(tmp_path), clock)
    with Terminal(stream, live=False, clock=clock) as terminal:
        monitor.event("actor rollout-0 started")
        for step in range(1, steps + 1):
            clock.now_s += 0.1
            monitor.log_buffer({"buffer/groups": 64})
            monitor.log_step(
                {
                    "progress/step": step,
                    "reward/mean": 0.52,
                    "staleness/mean": 2.1,
                    "staleness/oldest_token": 5,
                }
            )
            terminal.update(monitor.view())
            terminal.update(monitor.view())
    return monitor, stream.getvalue().splitlines() if isinstance(stream, io.StringIO) else []


def test_plain_lines_are_about_forty_a_run_and_events_come_once(tmp_path: Path) -> None:
    _, lines = run_for_terminal(tmp_path, 600, io.StringIO())
    assert lines[0] == "[0s] actor rollout-0 started"
    assert sum("rollout-0 started" in line for line in lines) == 1
    step_lines = [line for line in lines if line.startswith("step ")]
    assert 38 <= len(step_lines) <= 43
    assert step_lines[-1].startswith(
        "step 600/600  reward 0.52  solve -  stale 2.1/5  - tok/s  buffer 64  kl -"
    )
    assert step_lines[1].endswith("eta 58s")


def test_an_output_that_is_closed_does_not_end_the_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", closefd=False) as stream:
        run_for_terminal(tmp_path, 5, stream)  # type: ignore[arg-type]
        with contextlib.suppress(BrokenPipeError):
            stream.close()
    assert len(rows_of(tmp_path)) == 4  # The last step's waits for the final evaluation.


def test_the_live_screen_shows_what_is_known_and_a_dash_for_the_rest(tmp_path: Path) -> None:
    monitor, _ = run_for_terminal(tmp_path, 20, io.StringIO())
    monitor.log_actor("rollout-0 [x]", {"generated_tokens": 10, "version": 3, "errors": 1})
    console = Console(file=io.StringIO(), width=110)
    console.print(screen(monitor.view()))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 20/20" in shown
    assert "rollout-0 [x]" in shown
    assert "64 of 256 groups" in shown
    assert "actor rollout-0 started" in shown


def test_a_view_before_the_first_step_can_be_shown(tmp_path: Path) -> None:
    view = Monitor(monitored(), str(tmp_path)).view()
    assert plain_line(view).startswith("step -/10  reward -  solve -")
    console = Console(file=io.StringIO(), width=100)
    console.print(screen(view))
    stream = io.StringIO()
    with Terminal(stream, live=True) as terminal:
        terminal.update(view)
    assert "step 0/10" in stream.getvalue()


def test_the_summary_screen_shows_results_commands_and_dashes() -> None:
    full = summary_screen(
        {
            "name": "quick",
            "steps": 1200,
            "wall_s": 130.0,
            "base_solve_rate": 0.23,
            "final_solve_rate": 0.75,
            "final_policy_version": 1200,
            "policy_dir": "runs/a b/policy",
            "errors": {"reward": 3, "stale": 0},
            "last_errors": {"f raised ValueError": 3},
        }
    )
    assert "0.230 -> 0.750 at v1200" in full
    assert "1200 in 2m10s" in full
    assert "launch.py chat 'runs/a b/policy'" in full
    assert "reward 3\n" in full
    assert "3 x f raised ValueError\n" in full
    assert len(full.splitlines()) < 20
    continued = {"steps": 63, "wall_s": 58.0, "is_continued": True, "final_policy_version": 0}
    nothing = summary_screen({**continued, "base_solve_rate": math.nan, "final_solve_rate": math.nan})
    assert "63; 58s since the last start" in nothing
    assert "solve rate - at v0, and none later" in nothing
    played = summary_screen({"policy_dir": "policy", "environments": ["game"]})
    assert "launch.py evaluate policy" in played
    assert "chat" not in played, "it has no environment"
    empty = summary_screen({"stopped": "no step for 600 s"})
    assert "stopped: no step for 600 s" in empty
    assert "- -> -" in empty
    assert "chat" not in empty


def test_sparkline_and_duration() -> None:
    assert sparkline([0, 1, 0.5, 1]) in ("▁█▄█", "▁█▅█")
    assert sparkline([2, 2]) == "▁▁"
    assert sparkline([]) == ""
    assert [duration(value) for value in (None, 8, 130, 7500)] == ["-", "8s", "2m10s", "2h05m"]


def test_a_run_with_environments_shows_its_turns_and_what_went_wrong_by_kind(tmp_path: Path) -> None:
    monitor = Monitor(monitored(), str(tmp_path))
    counts = {"environment/errors": 0, "environment/timeouts": 2, "environment/tool_errors": 7}
    told = {"completions/turns": 2.5, "completions/tool_calls": 1.2, "environment/answer_s": 0.25}
    for row, is_shown in (({}, False), ({**counts, **told}, True)):
        monitor.log_step({"progress/step": 1, **row})
        console = Console(file=io.StringIO(), width=140)
        console.print(screen(monitor.view()))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("episodes" in shown) is is_shown
    assert "turns, 1.2 tool calls, 0.25 s an answer" in shown
    assert "timed out 2  tool errors 7" in shown
    assert "raised" not in shown
