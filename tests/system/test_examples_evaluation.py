"""The example of docs/evaluation.md is the files beside it, and does what the page says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.fake_engine import FakeEngine
from cluster.cli import evaluate as module
from core.config import Config
from learner.catalogue import load_config
from tests.support import ROOT

EXAMPLES = ROOT / "docs" / "examples"


@pytest.mark.parametrize(("name", "kind"), [("suites.yaml", "yaml"), ("closeness.py", "python")])
def test_the_page_shows_the_file(name: str, kind: str) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert f"```{kind}\n# docs/examples/{name}\n{text}```" in page


def test_its_suites_are_what_the_page_says() -> None:
    config = load_config(EXAMPLES / "suites.yaml")
    found = {
        suite.name: (suite.rows, suite.samples, suite.temperature, suite.every) for suite in config.suites
    }
    assert found == {
        "held_out": (100, 4, 1.0, 100),
        "many": (50, 16, 1.0, 100),
        "greedy": (50, 1, 0.0, 50),
        "near": (50, 4, 1.0, 100),
    }


def test_evaluate_runs_it(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(config: Config) -> FakeEngine:
        return FakeEngine(config.actors, num_tokens=(2, 3), version=0)

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "closeness.py").write_bytes((EXAMPLES / "closeness.py").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(module, "_make_engine", make)
    found = module.evaluate(
        str(tiny_models["tied"]),
        config_path=str(EXAMPLES / "suites.yaml"),
        suites=["near", "greedy"],
        out="out",
    )
    near, greedy = ({result.suite: result for result in found.results}[name] for name in ("near", "greedy"))
    assert (near.num_errors, near.num_samples, greedy.num_samples) == (0, 200, 50)
    assert 0.0 < near.solve_rate < 1.0, "between right and wrong"
    assert greedy.solve_rate == greedy.metrics["avg@1"] == greedy.metrics["pass@1"]
