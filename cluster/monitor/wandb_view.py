"""A view of a W&B project with the curves in the order in which one reads them, made by its first run."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from cluster.monitor.curves import CURVES

VIEW_NAME = "AGRO"
PACKAGE = "wandb_workspaces"


def make_view(run: Any) -> bool:
    """Makes the view of an online run's project, and returns whether it did.

    It does nothing where the package wandb-workspaces is not installed, or where the project has other runs
    or this one goes on: then it was made before, or somebody did not want it. Raises what W&B raises.
    """
    if run.resumed or importlib.util.find_spec(PACKAGE) is None:
        return False
    wandb = importlib.import_module("wandb")
    workspaces, reports = (
        importlib.import_module(f"{PACKAGE}.{name}") for name in ("workspaces", "reports.v2")
    )
    if len(wandb.Api().runs(f"{run.entity}/{run.project}", per_page=2)) > 1:
        return False
    sections = [
        workspaces.Section(
            name=section,
            is_open=True,
            panels=[
                reports.LinePlot(title=title, x="progress/step", y=list(metrics))
                for title, metrics in curves.items()
            ],
        )
        for section, curves in CURVES.items()
    ]
    workspaces.Workspace(entity=run.entity, project=run.project, name=VIEW_NAME, sections=sections).save()
    return True
