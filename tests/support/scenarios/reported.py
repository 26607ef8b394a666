"""Runs a scenario in a process of its own, as one with an engine must have, and reads what it reports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.support import ROOT

T = TypeVar("T")


def report_of(
    scenario: str, kind: type[T], model_dir: Path, out: Path, *arguments: object, timeout_s: float = 600.0
) -> T:
    """The report that `python -m tests.support.scenarios.<scenario> MODEL_DIR OUT ...` writes to `out`."""
    command = [sys.executable, "-m", f"tests.support.scenarios.{scenario}", str(model_dir), str(out)]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return msgspec.json.decode(out.read_bytes(), type=kind)
