"""Checkpoints on disk: what one is, whether it can be trusted, and reading it on any number of ranks.

    checkpoints/step-000050/
        rank-0.safetensors ...   that rank's part of every tensor; its random states in the metadata
        state.json               what is the same on all ranks: counts, config, code version, W&B run id
        manifest.json            written last: dtype and shape of every tensor, size and sha256 of every file

One format for any number of ranks: of a tensor of N elements, rank r of W holds the elements [r n, (r + 1) n)
of the flattened tensor, n = ceil(N / W), which is how ZeRO-3 partitions, less its padding. A reader asks for
the elements it wants (`Checkpoint.read`) and gets them from whichever files hold them; nothing is ever whole
on a rank.

Tensors are named `<kind>/<name in the module>`: master (fp32 weights), exp_avg, exp_avg_sq, buffer
(persistent ones, in their own dtype); and reference, proximal where these have moved. A directory counts only
when its manifest verifies. `learner/checkpoints/writer.py` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from core.errors import CheckpointError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
CHUNK_BYTES = 8 * 2**20
MAX_HASHED_AT_ONCE = 4
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Those that parameters and buffers have."""
_STEP_NAME = re.compile(r"step-(\d{6,})")


class TensorEntry(msgspec.Struct, frozen=True):
    """What is known of a whole tensor: its key, torch's name of its dtype, its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes its elements take."""
        return self.numel * getattr(torch, self.dtype).itemsize


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the checkpoint as it was written: its name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


class CheckpointManifest(msgspec.Struct, frozen=True):
    """What a checkpoint contains: its step, the ranks that wrote it, every tensor and every file."""

    format: int
    step: int
    world_size: int
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]


class _SealedManifest(msgspec.Struct, frozen=True):
    """The manifest's file: the manifest as it was written, and its sha256."""

    sha256: str
    manifest: msgspec.Raw


@dataclass(frozen=True)
class TensorPart:
    """One rank's elements of a tensor: `values` [stop - start], flat, without padding; `shape` is the whole
    tensor's.
    """

    key: str
    shape: tuple[int, ...]
    values: Tensor

    @property
    def entry(self) -> TensorEntry:
        """The whole tensor that it is a part of."""
        return TensorEntry(self.key, str(self.values.dtype).removeprefix("torch."), self.shape)


def partition(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """Returns (start, stop): the elements of a flattened tensor that `rank` of `world_size` holds; equal when
    it holds none.
    """
    size = -(-numel // world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


# --- reading ---


class Checkpoint:
    """A checkpoint to read from: `Checkpoint(path, verify(path)).read("master/lm_head.weight", 0, 100)`.

    `manifest` is what `verify` or `latest_checkpoint` returned.
    """

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.path, self.manifest = path, manifest
        self.tensors = {entry.key: entry for entry in manifest.tensors}
        self._files: dict[int, Any] = {}

    @cached_property
    def state(self) -> dict[str, Any]:
        """What `state.json` holds."""
        return json.loads((self.path / STATE_NAME).read_text(encoding="utf-8"))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns the elements [start, stop) of the flattened tensor `key`. Raises CheckpointError when there
        is no such tensor.
        """
        if key not in self.tensors:
            raise CheckpointError(
                f"{self.path} holds no tensor {key}: it is of another model, or of other "
                "settings (objective)."
            )
        entry, world_size = self.tensors[key], self.manifest.world_size
        stop = entry.numel if stop is None else stop
        values = torch.empty(stop - start, dtype=getattr(torch, entry.dtype))
        for rank in range(world_size):
            first, last = partition(entry.numel, world_size, rank)
            low, high = max(first, start), min(last, stop)
            if low < high:
                values[low - start : high - start] = self._file(rank).get_slice(key)[
                    low - first : high - first
                ]
        return values

    def rank_metadata(self, rank: int) -> dict[str, str]:
        """Returns what the writer of that rank noted besides its tensors; nothing for a rank that did not
        exist.
        """
        return self._file(rank).metadata() if rank < self.manifest.world_size else {}

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            from safetensors import safe_open

            self._files[rank] = safe_open(self.path / rank_file(rank), framework="pt")
        return self._files[rank]


def latest_checkpoint(
    run_dir: str | Path, on_problem: Callable[[str], None] = lambda text: None, *, contents: bool = True
) -> tuple[Path, CheckpointManifest] | None:
    """Returns the newest checkpoint that verifies, every byte of it (without `contents`, its sizes), or None.

    `on_problem` gets a sentence for each newer one that does not verify: which file, and what is wrong with
    it.
    """
    for _, path in reversed(checkpoint_dirs(run_dir)):
        try:
            return path, verify(path, contents=contents)
        except CheckpointError as error:
            on_problem(str(error))
    return None


def verify(path: Path, *, contents: bool = True) -> CheckpointManifest:
    """Returns the manifest of the checkpoint `path`, checked against its files; without `contents` against
    their sizes only.

    Raises CheckpointError that names the file and what is wrong with it.
    """
    manifest = _read_manifest(path)
    number = _STEP_NAME.fullmatch(path.name)
    if number is None or int(number[1]) != manifest.step:
        raise CheckpointError(f"checkpoint {path.name}: {MANIFEST_NAME} is that of step {manifest.step}")
    missing = {*map(rank_file, range(manifest.world_size)), STATE_NAME} - {
        file.name for file in manifest.files
    }
    if missing:
        raise CheckpointError(f"checkpoint {path.name}: {MANIFEST_NAME} does not list {sorted(missing)[0]}")
    # hashlib lets go of the interpreter: a thread hashes a gigabyte in a second, and there is a file a rank.
    with ThreadPoolExecutor(MAX_HASHED_AT_ONCE) as pool:
        for _ in pool.map(lambda file: _verify_file(path, file, contents=contents), manifest.files):
            pass
    return manifest


def _verify_file(path: Path, file: FileEntry, *, contents: bool) -> None:
    """Raises CheckpointError where the file is not the one that was written, as `verify` says."""
    try:
        size = (path / file.name).stat().st_size
        digest = _sha256(path / file.name) if contents and size == file.size else file.sha256
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path.name}: {file.name} cannot be read: {error.strerror}"
        ) from None
    if size != file.size:
        raise CheckpointError(
            f"checkpoint {path.name}: {file.name} has {size} bytes, written were {file.size}"
        )
    if digest != file.sha256:
        raise CheckpointError(
            f"checkpoint {path.name}: {file.name} has the sha256 {digest[:12]}, "
            f"written was {file.sha256[:12]}"
        )


def checkpoint_dirs(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Returns (step, directory) of each checkpoint of a run, oldest first, whether it verifies or not."""
    root = checkpoint_root(run_dir)
    names = [(match, path) for path in root.glob("step-*") if (match := _STEP_NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in names)


def checkpoint_root(run_dir: str | Path) -> Path:
    """Returns the directory in which the checkpoints of a run lie."""
    return Path(run_dir) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Returns the name of a checkpoint's directory."""
    return f"step-{step:06d}"


def rank_file(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank-{rank}.safetensors"


def _read_manifest(path: Path) -> CheckpointManifest:
    try:
        sealed = msgspec.json.decode((path / MANIFEST_NAME).read_bytes(), type=_SealedManifest)
        intact = hashlib.sha256(sealed.manifest).hexdigest() == sealed.sha256
        manifest = msgspec.json.decode(sealed.manifest, type=CheckpointManifest)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path.name}: {MANIFEST_NAME} is missing") from None
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path.name}: {MANIFEST_NAME} cannot be read: {error.strerror}"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path.name}: {MANIFEST_NAME} is damaged: {error}") from None
    if not intact:
        raise CheckpointError(
            f"checkpoint {path.name}: {MANIFEST_NAME} is damaged: it has another sha256 "
            "than when it was written"
        )
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"checkpoint {path.name}: {MANIFEST_NAME} has format {manifest.format}; this "
            f"version reads {FORMAT}"
        )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ---


def write_tensors(
    path: Path, entries: Sequence[TensorEntry], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> FileEntry:
    """Writes a safetensors file, one tensor at a time in the order of `entries`; it is durable when this
    returns.

    The library writes whole dicts only. Wider dtypes must come first, since readers want tensors aligned
    (ValueError). Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        dtype = getattr(torch, entry.dtype)
        if start % dtype.itemsize:
            raise ValueError(
                f"{entry.key} ({entry.dtype}) would lie at byte {start}: give wider dtypes first"
            )
        header[entry.key] = {"dtype": _DTYPES[dtype], "shape": entry.shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for _, tensor in zip(entries, tensors, strict=True):
            data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK_BYTES):
                digest.update(data[start : start + CHUNK_BYTES])
                file.write(data[start : start + CHUNK_BYTES])
        _sync(file)
    return FileEntry(path.name, 8 + len(head) + end, digest.hexdigest())


def write_file(path: Path, data: bytes) -> FileEntry:
    """Writes a small file, durable when this returns, whole or not at all to those who look. Raises
    OSError.
    """
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(data)
        _sync(file)
    aside.rename(path)
    return FileEntry(path.name, len(data), hashlib.sha256(data).hexdigest())


def write_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest, which must be the last file of a checkpoint. Raises OSError."""
    body = msgspec.json.encode(manifest)
    sealed = _SealedManifest(hashlib.sha256(body).hexdigest(), msgspec.Raw(body))
    write_file(directory / MANIFEST_NAME, msgspec.json.encode(sealed))


def replace_directory(aside: Path, target: Path) -> None:
    """Renames the finished directory `aside` to `target`, durably; what was there before goes. Raises
    OSError.
    """
    sync_directory(aside)
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}") if target.exists() else None
    if old:
        target.rename(old)
    aside.rename(target)
    sync_directory(target.parent)
    if old:
        shutil.rmtree(old)


def remove_directory(target: Path) -> None:
    """Removes a directory; a kill on the way leaves nothing under its name. Raises OSError."""
    old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    target.rename(old)
    shutil.rmtree(old)


def sync_directory(path: Path) -> None:
    """Makes the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
