"""W&B's view of a project, with fakes in place of its service and of wandb-workspaces."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.monitor import wandb_view
from cluster.monitor.curves import CURVES
from cluster.monitor.wandb_view import make_view

RUN = SimpleNamespace(entity="me", project="sums", resumed=False)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was saved; the project has as many runs as `num_runs` says."""
    found: list[dict[str, Any]] = []

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def workspace(**named: Any) -> Any:
        return SimpleNamespace(save=lambda: found.append(named))

    module("wandb_workspaces")
    module("wandb_workspaces.workspaces", Section=lambda **named: named, Workspace=workspace)
    module("wandb_workspaces.reports.v2", LinePlot=lambda **named: named)
    monkeypatch.setattr(wandb_view.importlib.util, "find_spec", lambda name: object())
    return found


def with_runs(monkeypatch: pytest.MonkeyPatch, num_runs: int) -> None:
    api = SimpleNamespace(runs=lambda path, per_page: range(num_runs) if path == "me/sums" else None)
    monkeypatch.setattr("wandb.Api", lambda: api)


def test_the_first_run_of_a_project_makes_its_view(
    saved: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_runs(monkeypatch, 1)
    assert make_view(RUN)
    (view,) = saved
    assert (view["entity"], view["project"], view["name"]) == ("me", "sums", "AGRO")
    assert [section["name"] for section in view["sections"]] == list(CURVES)
    reward = {"title": "Reward", "x": "progress/step", "y": ["reward/mean"]}
    assert view["sections"][0]["panels"][0] == reward


def test_later_runs_leave_it_alone(saved: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with_runs(monkeypatch, 2)
    assert not make_view(RUN)
    assert saved == []


def test_a_run_that_goes_on_makes_none_though_it_is_the_only_one(
    saved: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_runs(monkeypatch, 1)
    assert not make_view(SimpleNamespace(entity="me", project="sums", resumed=True))
    assert saved == []


def test_nothing_is_made_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)  # type: ignore[arg-type]
    assert not make_view(RUN)
