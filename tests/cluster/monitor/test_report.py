"""The report: self-contained, safe against what a model writes, and fine with half a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.monitor.report import MAX_POINTS, MAX_SAMPLES, curves_png, report_data, write_report

NASTY = (
    '</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- & {{TITLE}} {{DATA}} \u2028 \ud800 "'
)


def write_lines(path: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [
        {
            "progress/step": step,
            "progress/samples": 8 * step,
            "time/wall_s": step / 2,
            "reward/mean": step / 2000,
            "staleness/mean": 2.0,
            "staleness/oldest_token": 9 if step == 777 else 4,
            "objective/kl_ref": None,
        }
        for step in range(1, 2001)
    ]
    write_lines(tmp_path / "metrics.jsonl", rows, '{"progress/step": 2001, "rew')
    evaluations = [
        {
            "suite": "held_out",
            "policy_version": 0,
            "solve_rate": 0.2,
            "samples": [{"prompt": "1+1=", "completion": "2", "reward": 1.0}],
        },
        {"suite": "held_out", "policy_version": 2000, "solve_rate": 0.8, "samples": []},
    ]
    write_lines(tmp_path / "evaluations.jsonl", evaluations)
    sample = {
        "step": 20,
        "version": 18,
        "staleness": 2,
        "prompt": NASTY,
        "completion": NASTY,
        "reward": 0.0,
        "error": None,
    }
    write_lines(tmp_path / "samples.jsonl", [sample, {**sample, "error": "timed out", "reward": None}])
    write_lines(tmp_path / "events.jsonl", [{"wall_s": 1.0, "text": NASTY}])
    (tmp_path / "config.yaml").write_text("run:\n  name: nice\n  steps: 2000\nbuffer:\n  max_staleness: 9\n")
    return tmp_path


def embedded(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_report_is_one_self_contained_file(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", page.replace(json_text(page), ""))
    assert "default-src 'none'" in page
    assert len(page) < 400_000
    assert "prefers-color-scheme: dark" in page


def json_text(page: str) -> str:
    return page.split('id="data">', 1)[1].split("</script>", 1)[0]


def test_what_a_model_wrote_cannot_leave_the_data(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert "<img" not in page
    data = embedded(page)
    assert data["samples"][0]["completion"] == NASTY.replace("\ud800", "?")
    assert data["events"][0]["text"].startswith("</script>")
    assert "innerHTML" not in page


def test_the_title_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"name": "<b>&x"}))
    assert "<title>&lt;b&gt;&amp;x - AGRO</title>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_headline_of_an_unfinished_run_comes_from_its_rows(run_dir: Path) -> None:
    data = report_data(run_dir)
    headline = data["headline"]
    assert (data["name"], data["finished"]) == ("nice", False)
    assert (headline["base_solve_rate"], headline["final_solve_rate"]) == (0.2, 0.8)
    assert (headline["staleness_mean"], headline["staleness_max"], headline["max_staleness"]) == (2.0, 9, 9)
    assert (headline["steps"], headline["planned_steps"], headline["samples_per_s"]) == (2000, 2000, 16.0)


def test_the_summary_goes_before_the_rows(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text(
        json.dumps({"name": "nice", "final_solve_rate": 0.85, "stopped": "too many failures"})
    )
    data = report_data(run_dir)
    assert data["headline"]["final_solve_rate"] == 0.85
    assert data["headline"]["base_solve_rate"] == 0.2
    assert data["stopped"] == "too many failures"


def test_torn_lines_are_left_out_and_named(run_dir: Path) -> None:
    assert report_data(run_dir)["notes"] == ["1 torn line of metrics.jsonl left out."]
    (run_dir / "summary.json").write_text('{"name": "ni')
    assert any("summary.json could not be read" in note for note in report_data(run_dir)["notes"])


def test_long_curves_are_thinned_but_keep_the_worst_staleness(run_dir: Path) -> None:
    charts = {chart["title"]: chart for chart in report_data(run_dir)["charts"]}
    assert all(len(line["x"]) <= MAX_POINTS for chart in charts.values() for line in chart["lines"])
    assert max(charts["Staleness"]["lines"][1]["y"]) == 9
    smoothed, batch = charts["Reward"]["lines"]
    assert batch["y"][-1] == pytest.approx(1.0, abs=0.01)
    assert smoothed["y"][len(smoothed["y"]) // 2] == pytest.approx(0.5, abs=0.01)
    assert charts["KL to the reference"]["lines"][0]["y"] == [None] * len(batch["x"])
    assert charts["Solve rate"]["lines"][0] == {
        "label": "solve rate",
        "column": "evaluation",
        "x": [0, 2000],
        "y": [0.2, 0.8],
    }


def test_steps_repeated_after_a_resume_count_once_the_last_time(tmp_path: Path) -> None:
    steps = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35)]
    write_lines(
        tmp_path / "metrics.jsonl", [{"progress/step": step, "reward/mean": reward} for step, reward in steps]
    )
    batch = report_data(tmp_path)["charts"][0]["lines"][1]
    assert (batch["x"], batch["y"]) == ([1, 2, 3], [0.1, 0.25, 0.35])


def test_many_samples_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "samples.jsonl",
        [{"step": step, "prompt": "p", "completion": "c" * 30_000} for step in range(2000)],
    )
    data = report_data(tmp_path)
    assert len(data["samples"]) == MAX_SAMPLES
    assert (data["samples"][0]["step"], data["samples"][-1]["step"]) == (0, 1999)
    assert data["samples"][0]["completion"].endswith("[10000 more characters in the run directory]")
    assert "1500 of 2000 samples" in data["notes"][0]


def test_evaluation_samples_carry_their_version(run_dir: Path) -> None:
    (sample,) = [sample for sample in report_data(run_dir)["samples"] if sample["source"] == "evaluation"]
    assert (sample["version"], sample["completion"]) == (0, "2")


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    data = embedded(write_report(tmp_path).read_text(encoding="utf-8"))
    assert data["name"] == tmp_path.name
    assert data["headline"]["final_solve_rate"] is None
    assert data["samples"] == []


@pytest.mark.slow
def test_the_curves_are_drawn_as_a_picture(run_dir: Path) -> None:
    curves_png(run_dir, run_dir / "curves.png")
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "curves.png").stat().st_size > 20_000
