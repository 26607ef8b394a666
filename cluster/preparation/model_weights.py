"""Checks that a model's directory holds weights that can be read: their files are opened, no tensor is
loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from core.config import ModelConfig
from core.errors import ConfigError

WHOLE = ("model.safetensors", "pytorch_model.bin")
REMEDY = "Fetch it again from where the model comes from."


def check_weights(model: ModelConfig) -> None:
    """Raises ConfigError, in one line, for a directory whose weights are missing, torn, or pointers to
    weights.

    What is taken from the hub is checked as it is fetched.
    """
    folder = Path(model.path)
    if not folder.is_dir():
        return
    for path in _weight_files(folder):
        if not path.is_file():
            raise ConfigError(
                f"model.path = {folder}: its index names {path.name}, which is not there. {REMEDY}"
            )
        if why := _why_unreadable(path):
            raise ConfigError(f"{path} {why}. {REMEDY}")


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers would load, in its order of preference. Raises ConfigError where
    there are none.
    """
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                return [
                    folder / shard
                    for shard in sorted({*json.loads(index.read_bytes())["weight_map"].values()})
                ]
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ConfigError(f"{index} is no index of weights (weight_map). {REMEDY}") from None
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise ConfigError(
        f"model.path = {folder}: no weights: neither {' nor '.join(WHOLE)}, but {present}. "
        "Copy the model's weights there."
    )


def _why_unreadable(path: Path) -> str:
    """Returns what is wrong with the file; empty when its header can be read and fits its length."""
    import safetensors

    with path.open("rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            return "is a pointer of git-lfs, not the weights (`git lfs pull`)"
    if path.suffix != ".safetensors":
        return "" if path.stat().st_size else "is empty"
    try:
        with safetensors.safe_open(path, framework="pt"):
            return ""
    except (safetensors.SafetensorError, OSError) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
