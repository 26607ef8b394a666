"""Saving checkpoints while training goes on.

    step thread:    save(step) -- copy this rank's parts into host buffers (no NaN) --> back to training
    writer thread:  rank file --> report
                    on rank 0: wait for the reports --> manifest --> `first` --> rename --> drop old ones

A checkpoint is written aside, in `checkpoints/.step-000050.<session>/`, and counts from the rename on. Ranks
meet in that directory and nowhere else, so that a dead rank hangs nobody: a rank leaves `rank-<r>.json` when
its file is on disk, or `rank-<r>.failed` with the reason; rank 0 waits for these with a limit, the others
wait for nobody.

A full disk or a late rank costs this one checkpoint: it is counted, told, and removed. A `save` while the one
before is still being written waits for it: all ranks then save at the same steps without having to agree, and
a disk that is too slow for `checkpoint.every` shows as `checkpoint/stall_s` instead of as checkpoints that
are missing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from core.errors import CheckpointError, PeerTimeout
from learner.checkpoints.checkpoint import (
    FORMAT,
    STATE_NAME,
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    TensorPart,
    checkpoint_dirs,
    checkpoint_name,
    checkpoint_root,
    rank_file,
    remove_directory,
    replace_directory,
    verify,
    write_file,
    write_manifest,
    write_tensors,
)

KEPT_CHECKPOINTS = 2
"""So many of the newest stay: the older is used when the newest does not verify."""
POLL_S = 0.02
SPARE_BYTES = 16 * 2**20
"""Free space beyond the tensors that a checkpoint asks for: headers, state, and what the run's logs
write meanwhile.
"""


class CheckpointWriter:
    """One rank's part in saving; every rank has one. `writer.save(step, parts, state)` on all of them makes a
    checkpoint.

    session     a word drawn once for this start of the learner, equal on all ranks
    keep        so many checkpoints stay; None: `KEPT_CHECKPOINTS`
    timeout_s   limits the wait for the other ranks' files
    on_event    gets a sentence when a checkpoint fails (rank 0)
    on_durable  gets the oldest step that can be resumed from, after each checkpoint (rank 0, writer thread)
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        world_size: int,
        *,
        session: str,
        keep: int | None = None,
        timeout_s: float = 600.0,
        on_event: Callable[[str], None] = lambda text: None,
        on_durable: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._run_dir, self._root = Path(run_dir), checkpoint_root(run_dir)
        self._rank, self._world_size, self._session = rank, world_size, session
        self._keep, self._timeout_s = KEPT_CHECKPOINTS if keep is None else keep, timeout_s
        self._on_event, self._on_durable = on_event, on_durable
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._first: Future[Any] | None = None
        self._unexpected: BaseException | None = None
        self._metrics = {
            "checkpoint/saved": 0.0,
            "checkpoint/failed": 0.0,
            "checkpoint/stall_s": 0.0,
            "checkpoint/write_s": 0.0,
        }
        if rank == 0:
            with contextlib.suppress(OSError):  # `save` meets the same error and tells it.
                self._root.mkdir(parents=True, exist_ok=True)
            self._sweep(0)

    def save(
        self,
        step: int,
        parts: Iterable[TensorPart],
        state: Mapping[str, Any],
        *,
        first: Future[Any] | None = None,
    ) -> None:
        """Begins the checkpoint of `step`; returns when `parts` and `state` (JSON; rank 0's counts) may
        change again. It is there once `first` is over too; the other ranks and it have `timeout_s` together.

        Raises CheckpointError that names the tensor when a number is not finite: nothing is saved then.
        """
        start_s = time.perf_counter()
        self.wait()
        entries = self._copy(step, parts)
        self._first = first
        metadata = {"rng": json.dumps(random_states())}
        encoded = json.dumps(dict(state)).encode() if self._rank == 0 else b""
        self._thread = threading.Thread(
            target=self._run, args=(step, entries, metadata, encoded), name="checkpoint", daemon=True
        )
        self._thread.start()
        self._metrics["checkpoint/stall_s"] = time.perf_counter() - start_s

    def wait(self) -> None:
        """Waits until nothing is being written. Raises what the writer did not expect: an error of ours, or
        of `on_durable`.

        Raises PeerTimeout when the disk hangs: the writer's own waits end long before.
        """
        if self._thread is not None:
            self._thread.join(2 * self._timeout_s)
            if self._thread.is_alive():
                raise PeerTimeout(
                    f"the disk under {self._root} did not take a checkpoint within {2 * self._timeout_s:.0f} "
                    "s (2 run.timeout_s)"
                )
            self._thread = None
        if self._unexpected is not None:
            raise self._unexpected

    def close(self) -> None:
        """Waits until nothing is being written, and leaves nothing aside."""
        self.wait()
        if self._rank == 0:
            self._sweep(math.inf)

    def metrics(self) -> dict[str, float]:
        """Returns the counts so far, and the seconds that the newest checkpoint took."""
        return dict(self._metrics)

    # --- step thread ---

    def _copy(self, step: int, parts: Iterable[TensorPart]) -> list[TensorEntry]:
        entries = []
        for part in parts:
            if part.key not in self._host:
                self._host[part.key] = torch.empty(
                    part.values.shape, dtype=part.values.dtype, pin_memory=part.values.is_cuda
                )
            if part.values.is_floating_point() and part.values.numel() and not _is_finite(part.values):
                text = (
                    f"{part.key} is not finite at step {step}: nothing is saved. Go on from a checkpoint, "
                    "with a lower learner.lr."
                )
                self._leave_note(step, text)
                raise CheckpointError(text)
            self._host[part.key].copy_(part.values)
            entries.append(part.entry)
        return entries

    # --- writer thread ---

    def _run(self, step: int, entries: list[TensorEntry], metadata: dict[str, str], state: bytes) -> None:
        start_s = time.perf_counter()
        try:
            saved = self._write_or_give_up(step, entries, metadata, state)
            self._metrics["checkpoint/saved" if saved else "checkpoint/failed"] += 1
            self._metrics["checkpoint/write_s"] = time.perf_counter() - start_s
            if saved and self._rank == 0:
                self._on_durable(self._drop_old()[-1])
        except BaseException as error:  # noqa: BLE001 -- the edge of a thread: the next save raises it
            self._unexpected = error

    def _write_or_give_up(
        self, step: int, entries: list[TensorEntry], metadata: dict[str, str], state: bytes
    ) -> bool:
        try:
            self._write(step, entries, metadata, state)
        except OSError as error:  # PeerTimeout is one, too.
            self._give_up(step, f"{type(error).__name__}: {error}")
            return False
        return True

    def _write(self, step: int, entries: list[TensorEntry], metadata: dict[str, str], state: bytes) -> None:
        aside = self._aside(step)
        aside.mkdir(parents=True, exist_ok=True)  # By whoever comes first.
        if self._rank == 0:
            self._sweep(step)
            self._drop_old()  # One is left each time that a kill comes between the rename and the drop.
            self._check_free_space(entries)
        held = [entry for entry in entries if self._host[entry.key].numel()]
        held.sort(key=lambda entry: -getattr(torch, entry.dtype).itemsize)  # As `write_tensors` wants them.
        shards = [TensorEntry(entry.key, entry.dtype, (self._host[entry.key].numel(),)) for entry in held]
        mine = write_tensors(
            aside / rank_file(self._rank), shards, (self._host[entry.key] for entry in held), metadata
        )
        if self._rank:
            write_file(aside / f"rank-{self._rank}.json", msgspec.json.encode(mine))
            return
        deadline_s = time.monotonic() + self._timeout_s
        others = self._collect_reports(aside, deadline_s)
        files = (mine, *others, write_file(aside / STATE_NAME, state))
        write_manifest(aside, CheckpointManifest(FORMAT, step, self._world_size, tuple(entries), files))
        if self._first is not None:
            wait([self._first], max(0.0, deadline_s - time.monotonic()))
        replace_directory(aside, self._root / checkpoint_name(step))

    def _check_free_space(self, entries: list[TensorEntry]) -> None:
        needed, free = (
            sum(entry.num_bytes for entry in entries) + SPARE_BYTES,
            shutil.disk_usage(self._root).free,
        )
        if free < needed:
            raise OSError(
                f"{needed / 2**20:.0f} MiB are needed in {self._root}, {free / 2**20:.0f} are "
                f"free: {self._keep} checkpoints are kept beside the one that is written. Make room there."
            )

    def _collect_reports(self, aside: Path, deadline_s: float) -> list[FileEntry]:
        """Returns what the other ranks wrote, when all have.

        Raises OSError with a rank's reason, PeerTimeout with the names of the late.
        """
        found: dict[int, FileEntry] = {}
        while missing := [rank for rank in range(1, self._world_size) if rank not in found]:
            for rank in missing:
                if (note := aside / f"rank-{rank}.failed").exists():
                    reason = note.read_text(encoding="utf-8") or "the disk had no room for its reason"
                    raise OSError(f"rank {rank}: {reason}")
                if (report := aside / f"rank-{rank}.json").exists():
                    found[rank] = msgspec.json.decode(report.read_bytes(), type=FileEntry)
                    report.unlink()
            if len(found) < self._world_size - 1:
                if time.monotonic() > deadline_s:
                    late = ", ".join(str(rank) for rank in missing if rank not in found)
                    raise PeerTimeout(
                        f"learner rank {late} did not write its part within "
                        f"{self._timeout_s:.0f} s (run.timeout_s)"
                    )
                time.sleep(POLL_S)
        return [found[rank] for rank in sorted(found)]

    def _drop_old(self) -> list[int]:
        """Keeps the newest `keep` that have a good manifest and files of the right sizes; returns their
        steps, the newest first.
        """
        kept: list[int] = []
        for step, path in reversed(checkpoint_dirs(self._run_dir)):
            try:
                if len(kept) == self._keep:
                    remove_directory(path)
                else:
                    verify(path, contents=False)
                    kept.append(step)
            except CheckpointError:
                # Neither counted nor touched: it is told when the run is continued, and goes when it is old.
                continue
            except OSError as error:
                self._on_event(f"{path.name} could not be removed: {error}")
        return kept

    def _give_up(self, step: int, reason: str) -> None:
        if self._rank:
            if self._aside(step).exists():  # Else rank 0 has given up before.
                self._leave_note(step, reason)
            return
        # A rank that is late may leave something: swept before the next one.
        shutil.rmtree(self._aside(step), ignore_errors=True)
        self._on_event(f"the checkpoint of step {step} failed, training goes on: {reason}")

    def _leave_note(self, step: int, text: str) -> None:
        """Tells rank 0, if the disk lets us; an empty note where it has no room for the text."""
        note = self._aside(step) / f"rank-{self._rank}.failed"
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_file(note, text.encode())
        except OSError:
            with contextlib.suppress(OSError):  # Then rank 0 names us when its wait is over.
                note.touch()

    def _aside(self, step: int) -> Path:
        return self._root / f".{checkpoint_name(step)}.{self._session}"

    def _sweep(self, step: float) -> None:
        """Removes what was left aside by those who were killed or gave up.

        Another rank may be ahead of us: what this session wrote aside from `step` on stays.
        """
        for path in self._root.glob(".step-*"):
            number, _, session = path.name.removeprefix(".step-").partition(".")
            if session != self._session or int(number) < step:
                shutil.rmtree(path, ignore_errors=True)


def _is_finite(values: Tensor) -> bool:
    """Looks once, without a temporary: NaN and infinities show in the extremes."""
    low, high = torch.aminmax(values)
    return math.isfinite(float(low)) and math.isfinite(float(high))


# --- what belongs to a checkpoint besides tensors ---


def random_states() -> dict[str, Any]:
    """Returns the states of torch's, numpy's and Python's generators, as JSON."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [name, np.asarray(keys).tobytes().hex(), position, has_gauss, cached],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Takes over what `random_states` returned; a GPU's only where there is one."""

    def generator_state(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(generator_state(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(generator_state(states["cuda"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), dtype=np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def code_version() -> str:
    """Returns `git describe` of this code, else the installed package's version, else "unknown", for a copy
    without either.
    """
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent,
            check=True,
            timeout=10,
            capture_output=True,
            text=True,
        ).stdout.strip()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("agro")
    return "unknown"
