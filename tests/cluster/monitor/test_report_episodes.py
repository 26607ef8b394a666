"""The report of a run with environments shows whole conversations, of training and of evaluations, and what
went wrong by kind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.monitor.report import report_data, write_report
from cluster.monitor.wandb_tables import EarlierEvaluations, conversation
from tests.support import ROOT

CALL = 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
TRANSCRIPT = [
    ["user", "the table says 2 and 3"],
    ["assistant", CALL],
    ["tool", "<b>5</b>"],
    ["assistant", "It is 5."],
]
SAMPLE = {
    "prompt": "What is the sum?",
    "completion": "It is 5.",
    "reward": 1.0,
    "error": None,
    "advantage": 0.5,
    "version": 3,
    "staleness": 1,
    "turns": 2,
    "tool_calls": 1,
    "transcript": TRANSCRIPT,
}
ROW = {
    "completions/turns": 1.8,
    "completions/tool_calls": 0.9,
    "environment/errors": 1,
    "environment/timeouts": 2,
    "environment/crashes": 0,
    "environment/tool_errors": 4,
    "environment/cut_at_max_turns": 3,
    "environment/answer_s": 0.25,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The files of a run of two steps in which the policy uses a tool."""
    rows = [{"progress/step": step, "reward/mean": 0.5, **ROW} for step in (1, 2)]
    evaluated = {"suite": "sums", "step": 0, **SAMPLE, "advantage": None}
    evaluations = [{"suite": "sums", "policy_version": 0, "solve_rate": 1.0, "samples": [evaluated]}]
    plain = {"step": 2, "prompt": "1+1=", "completion": "2", "reward": 1.0, "error": None}
    for name, lines in (
        ("metrics", rows),
        ("evaluations", evaluations),
        ("samples", [{"step": 1, **SAMPLE}, plain]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def charts_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    return {
        chart["title"]: {line["label"]: line["y"] for line in chart["lines"]}
        for chart in report_data(run_dir)["charts"]
    }


def test_turns_tool_calls_and_errors_by_kind_are_curves_where_there_are_environments(run_dir: Path) -> None:
    charts = charts_of(run_dir)
    assert charts["Turns and tool calls"] == {"turns": [1.8, 1.8], "tool calls": [0.9, 0.9]}
    assert charts["Environment failures"] == {"raised": [1, 1], "timed out": [2, 2], "died": [0, 0]}
    assert charts["Cut and told"]["max_turns"] == [3, 3]
    assert charts["Environment answers"]["answer"] == [0.25, 0.25]
    (run_dir / "metrics.jsonl").write_text(
        '{"progress/step": 1, "completions/turns": 1.0, "reward/busy_share": 0.4}\n'
    )
    assert charts_of(run_dir)["Reward workers"] == {"busy": [0.4]}
    assert not {"Turns and tool calls", "Environment failures"} & set(charts_of(run_dir))


def test_long_texts_of_a_conversation_are_cut_and_said_to_be(run_dir: Path) -> None:
    long = {"step": 1, **SAMPLE, "transcript": [["assistant", "x" * 30_000]]}
    (run_dir / "samples.jsonl").write_text(json.dumps(long) + "\n")
    ((_, text),) = report_data(run_dir)["samples"][0]["transcript"]
    assert text.endswith("[10000 more characters in the run directory]")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_the_viewer_shows_each_message_by_its_role_and_marks_tool_calls(run_dir: Path) -> None:
    page = write_report(run_dir)
    command = ["node", str(ROOT / "tests" / "support" / "fake_dom.js"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    training, plain, evaluation = json.loads(done.stdout)
    for sample in (training, evaluation):
        chips, prompt, talk = sample["children"]
        assert "turns 2" in chips["text"]
        assert "tool calls 1" in chips["text"]
        assert "What is the sum?" in prompt["text"]
        labels = [said["children"][0]["text"] for said in talk["children"]]
        assert labels == ["Environment", "Policy, turn 1", "Tool", "Policy, turn 2"]
        texts = [said["children"][1]["text"] for said in talk["children"]]
        assert texts == [text for _, text in TRANSCRIPT]
        (mark,) = [part for part in talk["children"][1]["children"][1]["children"] if isinstance(part, dict)]
        assert (mark["tag"], mark["text"]) == ("mark", CALL.removeprefix("I add.\n"))
    assert "suite sums" in evaluation["children"][0]["text"]
    assert [pane["children"][0]["text"] for pane in plain["children"][1]["children"]] == [
        "Prompt",
        "Completion",
    ]


def test_a_table_has_the_conversation_as_text() -> None:
    text = conversation(SAMPLE)
    assert text is not None
    assert text.startswith("[user]\nthe table says 2 and 3\n\n[assistant]\nI add.")
    assert text.endswith("[tool]\n<b>5</b>\n\n[assistant]\nIt is 5.")
    assert conversation({"prompt": "1+1=", "completion": "2"}) is None


def test_evaluations_of_earlier_starts_are_told_with_the_first_row_that_has_them() -> None:
    lines = [{"suite": "sums", "policy_version": version, "samples": [version]} for version in (0, 4)]
    earlier = EarlierEvaluations(lines)
    rows = [{}, *({"eval/sums/policy_version": version} for version in (0, 0, 4, 4))]
    assert [list(earlier.of(row)) for row in rows] == [[], [("sums", [0])], [], [("sums", [4])], []]
