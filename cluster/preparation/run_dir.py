"""The run directory is made for a new run, or taken up again to continue one. It has one driver at a time."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Config, RunConfig
from core.config.files import dump_config, read_tree
from core.errors import AgroError, ConfigError
from core.text import user_path
from learner.catalogue import parse_config
from learner.checkpoints.checkpoint import latest_checkpoint

# What a run is about: with another value its prompts, its groups or its weights would mean something else.
_FIXED = (
    "run.seed",
    "model.path",
    "model.dtype",
    "model.trust_remote_code",
    "data.path",
    "data.offline",
    "data.chat_template",
    "data.columns",
    "data.system_prompt",
    "data.template_options",
    "data.max_prompt_tokens",
    "actors.temperature",
    "actors.top_p",
    "buffer.num_shards",
    "buffer.samples_per_insert",
    "learner.lora_rank",
)
_OF_A_SHELL = (".log", ".out", ".err")
"""What may lie in a new run's directory: `> DIR/train.log` is there before the run is."""
MAX_PATH_BYTES = 400
"""sqlite opens no path of more than 512."""
_held_locks: list[int] = []
"""Descriptors of the run directories this process holds: the kernel lets go of them when it ends,
however it ends.
"""


@dataclass(frozen=True)
class RunDir:
    """An open run directory; `notes` are to be told at the start of the run."""

    path: Path
    is_continued: bool
    notes: tuple[str, ...] = ()


def open_run_dir(config: Config) -> RunDir:
    """Returns the run directory, with the resolved config in it: a fresh one, or that of an unfinished run,
    which is continued.

    Raises ConfigError when it holds other things, is in use, finished, has no checkpoints, or when the config
    contradicts the run in it; what was made for it is gone then.
    """
    with _explained(config.run):
        path = _path(config.run)
        is_made = path is None or not path.exists()
        path = _make_fresh(config) if path is None else path
        path.mkdir(parents=True, exist_ok=True)
        _run_in(path)  # It comes first, so that no lock is left among files that are no run's.
        lock = _lock(path)
        try:
            before = _run_in(path)
            notes = () if before is None else _continue(config, before, path)
            (path / ".config.yaml.tmp").write_text(dump_config(config), encoding="utf-8")
            (path / ".config.yaml.tmp").replace(path / "config.yaml")
        except BaseException:
            if is_made:
                shutil.rmtree(path, ignore_errors=True)
            _unlock(lock)
            raise
    return RunDir(path, before is not None, notes)


def check_run_dir(config: Config) -> str:
    """Says what `open_run_dir` would do; raises what it would raise, and leaves everything as it is."""
    with _explained(config.run):
        path = _path(config.run)
        if path is None:
            path = _of_fair_length((runs_root() / _fresh_name(config.run)).resolve())
            _try_to_make(path)
            return f"{path} would be made"
        if (before := _run_in(path)) is None:
            _try_to_make(path)
            return f"{path} would be made" if not path.exists() else f"{path} would be used; no run is in it"
        _unlock(_lock(path))
        _changes(config, before, path)
        return f"the run in {path} would be continued"


@contextlib.contextmanager
def kept_if_begun(run_dir: Path, is_continued: bool) -> Iterator[None]:
    """Removes the run directory again when a run fails before anything was handed out: the next start must
    not continue it.

    Where parts have started already, what they logged stays; the config is then called config-refused.yaml.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # The error to tell is what ended the run, not this one.
            has_begun = any(ledger.stat().st_size for ledger in run_dir.glob("ledger*.jsonl"))
            if not is_continued and not has_begun:
                _take_back(run_dir)
        raise


def _take_back(run_dir: Path) -> None:
    logs = [path for path in run_dir.iterdir() if path.name not in ("config.yaml", "run.lock")]
    if not logs:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    (run_dir / "config.yaml").replace(run_dir / "config-refused.yaml")
    for path in (*run_dir.glob("buffer*.sqlite*"), *run_dir.glob("ledger*.jsonl")):
        path.unlink()


@contextlib.contextmanager
def _explained(run: RunConfig) -> Iterator[None]:
    name = (
        f"run.dir = {run.dir}" if run.dir else f"a run directory in {os.environ.get('AGRO_RUNS') or 'runs'}"
    )
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{name} cannot be used: {error.strerror}. Choose another run.dir.") from None
    except RuntimeError as error:  # Raised for an unknown user, or links in a circle.
        if isinstance(error, AgroError):
            raise
        raise ConfigError(f"{name} cannot be used: {error}. Choose another run.dir.") from None


def _path(run: RunConfig) -> Path | None:
    """Returns the directory that is asked for; None for a fresh one.

    Raises ConfigError where no run can be, and OSError or RuntimeError as paths do.
    """
    if run.dir is None:
        return None
    given = user_path("run.dir", run.dir)
    if given.is_symlink() and not given.exists():
        raise ConfigError(
            f"run.dir = {given} is a link that leads nowhere (to {os.readlink(given)}). Choose "
            "another run.dir."
        )
    path = _of_fair_length(given.resolve())
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir = {path} is a file. Choose a new or empty directory.")
    return path


def _of_fair_length(path: Path) -> Path:
    if (size := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise ConfigError(
            f"run.dir is too long: {size} bytes as an absolute path, at most {MAX_PATH_BYTES}. "
            "Choose another."
        )
    return path


def _run_in(path: Path) -> Config | None:
    """Returns the config of the run that the directory holds; None when it holds none. Raises ConfigError
    when it holds other things.
    """
    if not path.exists():
        return None
    names = {entry.name for entry in path.iterdir()}
    # Without these, somebody's config lies there.
    if "config.yaml" in names and names & {"run.lock", "metrics.jsonl"}:
        try:
            return parse_config(read_tree(path / "config.yaml"), source=str(path / "config.yaml"))
        except ConfigError as error:
            earlier = [name for name in sorted(names) if name.startswith("config-")]
            hint = f"Restore it (earlier ones: {', '.join(earlier)})" if earlier else "Restore it"
            raise ConfigError(
                f"run.dir = {path} holds a run whose config cannot be read: {error}\n{hint}, "
                "or choose another."
            ) from None
    others = sorted(name for name in names if name != "lost+found" and not name.endswith(_OF_A_SHELL))
    if others and "run.lock" not in names:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise ConfigError(
            f"run.dir = {path} holds other things than a run: {shown}. Choose a new or an empty directory."
        )
    return None


def _fresh_name(run: RunConfig) -> str:
    return f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _make_fresh(config: Config) -> Path:
    """Makes a directory that nobody else has, however many runs start in this second."""
    root, name = runs_root().resolve(), _fresh_name(config.run)
    _of_fair_length(root / name)
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = root / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError


def _try_to_make(path: Path) -> None:
    """Raises OSError when the directory, or a file in it, cannot be made.

    It is tried under a name of its own: another start may try the same.
    """
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    # A name that is not taken for that of another thing.
    trial = Path(tempfile.mkdtemp(prefix=".trial-", suffix=_OF_A_SHELL[0], dir=there))
    try:
        inner = trial / path.relative_to(there)
        inner.mkdir(parents=True, exist_ok=True)
        (inner / "run.lock").touch()
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def runs_root() -> Path:
    """Returns where runs go: `runs/` here, or for a submitted job, whose working directory is a throw-away
    copy, `~/agro-runs`.

    The variable `AGRO_RUNS` overrides both.
    """
    if root := os.environ.get("AGRO_RUNS"):
        return user_path("AGRO_RUNS", root)
    return Path.home() / "agro-runs" if "runtime_resources" in Path.cwd().parts else Path("runs")


def _lock(path: Path) -> int:
    """Keeps other processes out until `_unlock`, or the end of this one. Raises ConfigError that names who
    holds the lock.
    """
    descriptor = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise ConfigError(
            f"run.dir = {path} is in use by {holder}. Wait for it, stop it (SIGTERM), or "
            "choose another run.dir."
        ) from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held_locks.append(descriptor)
    return descriptor


def _unlock(descriptor: int) -> None:
    _held_locks.remove(descriptor)
    os.close(descriptor)


def _continue(config: Config, before: Config, path: Path) -> tuple[str, ...]:
    """Returns what to tell about a run that is continued, and keeps the config it had. Raises ConfigError
    when it cannot go on.
    """
    changes = _changes(config, before, path)
    if not changes:
        return (f"continuing the run in {path}",)
    number = sum(1 for _ in path.glob("config-*.yaml")) + 1
    (path / f"config-{number}.yaml").write_text(dump_config(before), encoding="utf-8")
    return (
        f"continuing the run in {path} with changes: {', '.join(changes)} (before: config-{number}.yaml)",
    )


def _changes(config: Config, before: Config, path: Path) -> list[str]:
    """Returns the settings that differ, as `name old -> new`. Raises ConfigError when a run cannot go on, or
    not with these.
    """
    steps_done = _steps_finished(path)
    if steps_done is not None and steps_done >= config.run.steps:
        raise ConfigError(
            f"run.dir = {path} already holds a finished run of {steps_done} steps. Raise run.steps to go on "
            "with it, choose another "
            "run.dir, or leave it out for a new one."
        )
    if (
        steps_done is not None
        and steps_done < before.run.steps
        and config.eval.stop_at is not None
        and config.eval.stop_at == before.eval.stop_at
    ):
        raise ConfigError(
            f"run.dir = {path} already holds a run that ended after {steps_done} steps at its target, eval.stop_at = "
            f"{list(config.eval.stop_at)}. Raise it to go on, or remove it (eval.stop_at=null)."
        )
    if not before.checkpoint.every:
        raise ConfigError(
            f"run.dir = {path} already holds a run without checkpoints (checkpoint.every = 0). "
            "Choose another run.dir."
        )
    found = latest_checkpoint(path, contents=False)  # Hashing may take minutes, and only finds an older one.
    if found is not None and found[1].step > config.run.steps:
        raise ConfigError(
            f"run.steps = {config.run.steps}, but the run in {path} has done {found[1].step} steps already. "
            "Raise run.steps to go on with it, or choose another run.dir."
        )
    differences = list(_differences(before.model_dump(), config.model_dump()))
    # With a curriculum every prompt belongs to one of the shards, otherwise ordinals do.
    is_dealt = config.buffer.num_shards > 1 and None in (before.data.curriculum, config.data.curriculum)
    named = (*_FIXED, "data.curriculum") if is_dealt else _FIXED
    if fixed := [f"{name} = {old!r}, now {new!r}" for name, old, new in differences if name in named]:
        raise ConfigError(
            f"run.dir = {path} already holds a run with {'; '.join(fixed)}. Restore that, or "
            "choose another run.dir."
        )
    return [
        f"{name} {old!r} -> {new!r}" for name, old, new in differences if name not in ("run.dir", "run.steps")
    ]


def _steps_finished(path: Path) -> int | None:
    """Returns the steps of the run if it ended by itself; None when it was stopped, died, or failed."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary.get("steps") if summary.get("stopped") is None else None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Returns (section.key, old, new) of the fields that differ, and (environments, old, new); None where
    another objective is without the key.
    """
    for section, values in now.items():
        if section == "environments":
            if before[section] != values:
                yield section, before[section], values
            continue
        for key in {**before[section], **values}:
            old, new = before[section].get(key), values.get(key)
            if old != new:
                yield f"{section}.{key}", old, new
