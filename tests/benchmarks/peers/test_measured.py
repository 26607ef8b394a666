"""Tests of what is made of the rows that a system writes, and of looks at its processes."""

import json
import math
import subprocess
import sys

import psutil
import pytest

from benchmarks.peers.jobs import PeerJob
from benchmarks.peers.measured import Row, Seen, WindowCpu, cpu_s_of, figures_of, is_over, rows_of_ours

JOB = PeerJob("sums", "exact_match", warm_steps=1, window_s=3.0, timeout_s=10.0, solved=0.5)


def run(num_steps: int, *, solved_from: int = 99) -> tuple[list[Seen], list[Row]]:
    """Returns a system that starts for 5 s and then does a step of 4 samples a second on half a core."""
    rows = [Row(100.0 + n, 4 * (n + 1), 12 * (n + 1), float(n >= solved_from)) for n in range(num_steps)]
    return [Seen(5.0 + n, n + 1) for n in range(num_steps)], rows


SPENT = WindowCpu({"actor": 2.1, "learner": 1.4}, in_s=7.0)


def test_figures_are_of_the_steady_state_by_the_systems_own_clock():
    figures = figures_of(JOB, *run(9, solved_from=3), SPENT)
    assert figures["samples_per_s"] == pytest.approx(4.0)
    assert figures["tokens_per_s"] == pytest.approx(12.0)
    assert figures["cpu_ms_per_sample"] == pytest.approx(125.0)
    assert figures["cpu_ms_per_sample_by"] == pytest.approx({"actor": 75.0, "learner": 50.0})
    assert (figures["first_step_s"], figures["steps"]) == (5.0, 7)
    assert figures["solved_s"] == 5.0  # Three of the five newest rows: steps 2 to 6.


def test_what_is_not_reached_is_no_number():
    assert math.isnan(figures_of(JOB, *run(9), SPENT)["solved_s"])


def test_a_measurement_ends_with_a_step_after_window_and_reward_or_at_the_limit():
    seen, rows = run(9, solved_from=0)
    assert is_over(JOB, seen[-1].at_s, seen, rows)
    assert not is_over(JOB, seen[-1].at_s + 0.1, seen, rows)  # Between two steps.
    seen, rows = run(9)
    assert not is_over(JOB, seen[-1].at_s, seen, rows)
    seen, rows = run(12)
    assert is_over(JOB, seen[-1].at_s, seen, rows)


def test_rows_are_read_once_when_they_are_whole(tmp_path):
    rows, path = rows_of_ours(tmp_path), tmp_path / "metrics.jsonl"
    assert not rows.read()
    row = {"time/wall_s": 3.0, "progress/samples": 8, "progress/sampled_tokens": 24, "reward/mean": 0.5}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"eval/reward": 1.0}) + '\n{"time/wa')
    assert rows.read()
    assert not rows.read()
    with path.open("a") as file:
        file.write('ll_s": 4.0, "progress/samples": 9, "progress/sampled_tokens": 27, "reward/mean": 1}\n')
    assert rows.read()
    assert rows.found == [Row(3.0, 8, 24, 0.5), Row(4.0, 9, 27, 1.0)]


def test_processes_that_are_gone_count_as_what_started_them():
    work = "sum(range(10_000_000))"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{work}']); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        cpu_s = cpu_s_of(process.pid)
        own_s = sum(psutil.Process(process.pid).cpu_times()[:2])
        process.stdin.close()
    assert sum(cpu_s.values()) > own_s
