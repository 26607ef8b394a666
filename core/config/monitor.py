"""The section `monitor` of a config: where a run's metrics go besides its own files."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from core.config.section import Section, shown

BackendName = Literal["wandb", "tensorboard", "trackio", "prometheus"]
BACKENDS: tuple[BackendName, ...] = ("wandb", "tensorboard", "trackio", "prometheus")


class MonitorConfig(Section):
    """What the monitor writes to besides the run directory's files, which it always writes."""

    backends: tuple[BackendName, ...] = Field(
        ("wandb",),
        description="Where metrics go besides metrics.jsonl and report.html: `wandb` (online or offline by WANDB_MODE), "
        "`tensorboard` (event files in RUN_DIR/tensorboard), `trackio` (install it yourself), `prometheus` (gauges of Ray's "
        "own endpoint; `deploy/grafana.json` shows them). For example `[tensorboard, prometheus]`; `[]`: nowhere.",
    )

    @pydantic.field_validator("backends", mode="before")
    @classmethod
    def _backends_are_known_and_named_once(cls, value: Any) -> Any:
        is_known = isinstance(value, tuple) and all(name in BACKENDS for name in value)
        if is_known and len(set(value)) == len(value):
            return value
        raise ValueError(
            f"monitor.backends = {shown(value)}: expected some of {', '.join(BACKENDS)}, each once, for example [wandb, "
            "tensorboard]"
        )
