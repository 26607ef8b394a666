"""Weights pushed into a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tied", "untied"])
def engine_report(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("engine")
    road = {"tied": "ipc", "untied": "nccl"}[request.param]
    command = [
        sys.executable,
        str(ROOT / "tests/support/scenarios/transport_scenario.py"),
        str(tiny_models[request.param]),
        str(out),
        road,
    ]
    run = subprocess.run(command, timeout=200, check=False)
    assert run.returncode == 0
    return json.loads((out / "report.json").read_text())


class TestRealEngine:
    """A real vLLM engine; nccl with untied embeddings, ipc with tied ones."""

    @pytest.mark.parametrize("phase", ["pushed", "pushed in flight", "undone", "lost, then a snapshot"])
    def test_fresh_samples_are_those_of_the_weights_that_count(
        self, engine_report: dict[str, Any], phase: str
    ):
        assert engine_report[phase]["samples"] > 10
        assert engine_report[phase]["worst"] < 5e-5

    def test_which_weights_count_would_show(self, engine_report: dict[str, Any]):
        assert engine_report["of the version before"]["worst"] > 0.1

    def test_versions_say_what_counts(self, engine_report: dict[str, Any]):
        assert engine_report["versions"] == {
            "pushed": 1,
            "in flight": 2,
            "undone": 2,
            "lost": -1,
            "snapshot": 3,
        }

    def test_the_probes_were_confirmed_by_vllms_own_parameters(self, engine_report: dict[str, Any]):
        assert engine_report["confirmed"] == [5, 5]  # Two norms in each of two layers and the last one.

    def test_damage_is_found(self, engine_report: dict[str, Any]):
        assert "arrived damaged: model.norm.weight" in engine_report["damage"]
