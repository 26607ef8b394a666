"""The run directory: made for a new run, or taken up again to continue one. One driver at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Config
from cluster.config_file import dump_config
from cluster.errors import ConfigError

# What a run is about: with another value its prompts, its groups or its weights would mean something else.
_FIXED = (
    "run.seed",
    "model.path",
    "model.dtype",
    "model.trust_remote_code",
    "data.path",
    "data.split",
    "data.offline",
    "data.offline_share",
    "data.chat_template",
    "data.system_prompt",
    "data.max_prompt_tokens",
    "actors.temperature",
    "buffer.num_shards",
    "buffer.samples_per_insert",
    "learner.lora_rank",
    "learner.lora_alpha",
)
_held_locks: list[int] = []
"""Descriptors of the run directories this process holds: the kernel lets go of them when it ends, however it ends."""


@dataclass(frozen=True)
class RunDir:
    """`notes` are to be told at the start of the run."""

    path: Path
    is_continued: bool
    notes: tuple[str, ...] = ()


def open_run_dir(config: Config) -> RunDir:
    """The run directory, with the resolved config in it. A directory that holds an unfinished run continues it.

    Raises ConfigError when it is in use, finished, has no checkpoints, or when the config contradicts the run in it.
    """
    new = runs_root() / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = (Path(config.run.dir).expanduser() if config.run.dir else new).resolve()
    is_continued = (path / "config.yaml").exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _lock(path)
        notes = _continue(config, path) if is_continued else ()
        (path / ".config.yaml.tmp").write_text(dump_config(config), encoding="utf-8")
        (path / ".config.yaml.tmp").replace(path / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run.dir = {path} cannot be used: {error.strerror}. Choose another run.dir.") from None
    return RunDir(path, is_continued, notes)


def runs_root() -> Path:
    """`runs/` here; for a submitted job, whose working directory is a throw-away copy, `~/agro-runs`. `AGRO_RUNS` overrides both."""
    if root := os.environ.get("AGRO_RUNS"):
        return Path(root)
    return Path.home() / "agro-runs" if "runtime_resources" in Path.cwd().parts else Path("runs")


def _lock(path: Path) -> None:
    descriptor = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise ConfigError(f"run.dir = {path} is in use by {holder}. Wait for it, stop it (SIGTERM), or choose another run.dir.") from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held_locks.append(descriptor)


def _continue(config: Config, path: Path) -> tuple[str, ...]:
    """What to tell about a run that is continued; raises ConfigError when it cannot be."""
    before = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    steps_done = _steps_finished(path)
    if steps_done is not None and steps_done >= config.run.steps:
        raise ConfigError(
            f"run.dir = {path} already holds a finished run of {steps_done} steps. Raise run.steps to go on with it, choose another "
            "run.dir, or leave it out for a new one."
        )
    if not before["checkpoint"]["every"]:
        raise ConfigError(f"run.dir = {path} already holds a run without checkpoints (checkpoint.every = 0). Choose another run.dir.")
    now = config.model_dump(mode="json")
    changes = {name: (old, new) for name, old, new in _differences(before, now) if name not in ("run.dir", "run.steps")}
    if fixed := [f"{name} = {old!r}, now {new!r}" for name, (old, new) in changes.items() if name in _FIXED]:
        raise ConfigError(f"run.dir = {path} already holds a run with {'; '.join(fixed)}. Restore that, or choose another run.dir.")
    number = sum(1 for _ in path.glob("config-*.yaml")) + 1
    if changes:
        (path / f"config-{number}.yaml").write_text(yaml.safe_dump(before, sort_keys=False, width=120), encoding="utf-8")
    told = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
    return (f"continuing the run in {path}" + (f" with changes: {told} (before: config-{number}.yaml)" if changes else ""),)


def _steps_finished(path: Path) -> int | None:
    """Steps of the run if it ended by itself; None when it was stopped, died, or failed."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary.get("steps") if summary.get("stopped") is None else None


def _differences(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(section.key, old, new) of the fields that differ; a field that one of them lacks is None there."""
    for section in now:
        old, new = before.get(section) or {}, now[section]
        for key in dict.fromkeys((*old, *new)):
            if old.get(key) != new.get(key):
                yield f"{section}.{key}", old.get(key), new.get(key)
