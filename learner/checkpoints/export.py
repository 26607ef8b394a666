"""Hugging Face directories, written tensor by tensor: a checkpoint's policy (`export`), and the trained
policy at the end of a run.

    rank files --slices--> one tensor --cast--> shard ... + index, config, generation config, tokenizer
    (of adapters: model.path's files --> one tensor + scale B A, the slices of its adapter)

In memory at once: the largest tensor, in fp32 and in the model's dtype. Needs neither DeepSpeed nor
torch.distributed.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from core.config import Config, LearnerConfig, ModelConfig
from core.errors import CheckpointError
from core.json_lines import replace_json
from learner.catalogue import parse_text
from learner.checkpoints.checkpoint import (
    Checkpoint,
    TensorEntry,
    checkpoint_dirs,
    checkpoint_name,
    checkpoint_root,
    latest_checkpoint,
    replace_directory,
    verify,
    write_tensors,
)
from learner.policy.file_weights import Unit, file_units, wider_first
from learner.policy.lora import Weight, adapters_by_weight, merged, name_in_memory
from learner.policy.model_files import write_model_files

SHARD_BYTES = 2 * 2**30
WEIGHTS, BUFFERS = "master/", "buffer/"
INDEX_NAME = "model.safetensors.index.json"


def export(
    run_dir: str | Path, step: int | None, out_dir: str | Path, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes the policy of the run's checkpoint of `step`, None for the newest that verifies, as a Hugging
    Face directory; returns its path.

    It is written in the dtype of the run's config, tied weights once. Raises CheckpointError when there is no
    such checkpoint, it does not verify, it holds adapters whose base is not at `model.path`, or `out_dir` is
    not empty; OSError when the disk is full.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir} exists and is not an empty directory. Give another one.")
    checkpoint = _open(run_dir, step)
    config = parse_text(checkpoint.state["config"], "the checkpoint's config")
    module = _empty_module(checkpoint, config.model)
    units = wider_first(file_units(module))
    tensors = (
        _merged_weights(checkpoint, config.model, config.learner, units)
        if config.learner.lora_rank
        else _trained_weights(checkpoint, units)
    )
    entries = [entry for unit in units for entry in unit.entries]
    write_model(out_dir, config.model, entries, tensors, shard_bytes)
    return out_dir


def write_model(
    out_dir: Path,
    model: ModelConfig,
    entries: Sequence[TensorEntry],
    tensors: Iterable[Tensor],
    shard_bytes: int = SHARD_BYTES,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes `tensors`, in the order of `entries`, with everything else of `model.path` that a policy needs:
    whole or not at all. `notes` are JSON files beside them, by name.

    What was in `out_dir` goes. Raises OSError.
    """
    aside = out_dir.with_name(f".{out_dir.name}.making-{secrets.token_hex(4)}")
    aside.mkdir(parents=True)
    try:
        _write_shards(aside, entries, iter(tensors), shard_bytes)
        write_model_files(aside, model)
        for name, note in (notes or {}).items():
            replace_json(aside / name, note)
        replace_directory(aside, out_dir)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_snapshot(
    out_dir: Path,
    config: Config,
    weights: Sequence[tuple[str, Tensor]],
    notes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes the weights of a snapshot, as the learner publishes them, as `write_model` does.

    Adapters that were published alone are added to the base first. Raises CheckpointError when the base's
    files cannot be read, ConfigError when they are gone, OSError when the disk is full.
    """
    if config.weights.transport == "adapters":
        held = _PublishedAdapters(weights)
        units = wider_first(file_units(_empty_module(held, config.model)))
        entries = [entry for unit in units for entry in unit.entries]
        tensors = _merged_weights(held, config.model, config.learner, units)
    else:
        ordered = sorted(weights, key=lambda named: -named[1].dtype.itemsize)
        entries = [_entry(name, tensor) for name, tensor in ordered]
        tensors = (tensor for _, tensor in ordered)
    write_model(out_dir, config.model, entries, tensors, notes=notes)


class _Held(Protocol):
    """What holds a policy's tensors: a checkpoint, or adapters that were published."""

    @property
    def path(self) -> Path:
        """Where it is, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """What it holds, by key."""
        ...

    def read(self, key: str) -> Tensor:
        """Returns a tensor, flattened or in its shape."""
        ...


class _PublishedAdapters:
    """The adapters of a snapshot, by the keys that a checkpoint has."""

    path = Path("the snapshot")

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = {WEIGHTS + name_in_memory(name): tensor for name, tensor in weights}
        self.tensors = {key: _entry(key, tensor) for key, tensor in self._weights.items()}

    def read(self, key: str) -> Tensor:
        """Returns an adapter's A or B."""
        return self._weights[key]


def _entry(key: str, tensor: Tensor) -> TensorEntry:
    return TensorEntry(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _open(run_dir: str | Path, step: int | None) -> Checkpoint:
    if step is None:
        problems: list[str] = []
        found = latest_checkpoint(run_dir, problems.append)
        if found is None:
            raise CheckpointError(
                "\n".join([f"{run_dir} has no checkpoint that verifies (checkpoint.every).", *problems[:5]])
            )
        return Checkpoint(*found)
    path = checkpoint_root(run_dir) / checkpoint_name(step)
    if not path.is_dir():
        steps = [number for number, _ in checkpoint_dirs(run_dir)]
        raise CheckpointError(
            f"{run_dir} has no checkpoint of step {step}; there are: {', '.join(map(str, steps)) or 'none'}."
        )
    return Checkpoint(path, verify(path))


def _empty_module(checkpoint: _Held, model: ModelConfig) -> Any:
    """Returns the model on torch's meta device: it knows what its tensors are called in the files that lie at
    `model.path`.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            device_map="meta",
            trust_remote_code=model.trust_remote_code,
        )
    except Exception as error:  # noqa: BLE001 -- files that may have changed: whatever transformers raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{checkpoint.path}: its base, model.path = {model.path}, has no config or no safetensors files "
            f"that can be read: {reason}\n"
            "Take the run's policy/ directory, which is whole, or bring the base back."
        ) from None


def _trained_weights(checkpoint: Checkpoint, units: Sequence[Unit]) -> Iterator[Tensor]:
    """Returns the tensors of the units' entries as the checkpoint has them.

    Raises CheckpointError, at once, where it holds other tensors than the model has.
    """
    keys = {weight.name: _key(weight) for unit in units for weight in unit.weights}
    held = {key for key in checkpoint.tensors if key.startswith((WEIGHTS, BUFFERS))}
    if odd := sorted(held.symmetric_difference(keys.values())):
        raise CheckpointError(
            f"{checkpoint.path} and model.path, the base that it was trained from, do not fit: only one of "
            f"them has {odd[0]}. "
            "Take the run's policy/ directory, which is whole, or set model.path right."
        )

    def value(weight: Weight) -> Tensor:
        return checkpoint.read(keys[weight.name]).to(weight.parameter.dtype).view(weight.shape)

    return (tensor for unit in units for _, tensor in unit.named([value(weight) for weight in unit.weights]))


def _key(weight: Weight) -> str:
    return (WEIGHTS if isinstance(weight.parameter, torch.nn.Parameter) else BUFFERS) + weight.name


def _merged_weights(
    checkpoint: _Held, model: ModelConfig, learner: LearnerConfig, units: Sequence[Unit]
) -> Iterator[Tensor]:
    """Returns the base's tensors, each with its adapter added as the learner adds it: in its dtype and by its
    formula.
    """
    base = _base_files(checkpoint, model.path)
    adapters = adapters_by_weight(
        [key.removeprefix(WEIGHTS) for key in checkpoint.tensors if key.startswith(WEIGHTS)]
    )
    known = {
        unit.weights[0].name
        for unit in units
        if len(unit.weights) == len(unit.entries) == 1 and unit.entries[0].key in base
    }
    if missing := [name for name in adapters if name not in known]:
        raise CheckpointError(
            f"{model.path} has no {missing[0]}, to which {checkpoint.path} holds an adapter: its "
            "files are of another model, or "
            "name their tensors otherwise. Take the run's policy/ directory, which is whole, or set "
            "model.path right."
        )
    if missing := [entry.key for unit in units for entry in unit.entries if entry.key not in base]:
        raise CheckpointError(
            f"{model.path} has no {missing[0]}. Take the run's policy/ directory, which is whole."
        )
    scale = learner.lora_scale

    def tensors() -> Iterator[Tensor]:
        for unit in units:
            for entry in unit.entries:
                dtype = getattr(torch, entry.dtype)
                weight = base[entry.key].get_tensor(entry.key).to(dtype)
                if keys := adapters.get(unit.weights[0].name):
                    a, b = (
                        checkpoint.read(WEIGHTS + key).view(checkpoint.tensors[WEIGHTS + key].shape).to(dtype)
                        for key in keys
                    )
                    weight = merged(weight, a, b, scale)
                yield weight

    return tensors()


def _base_files(checkpoint: _Held, path: str) -> dict[str, Any]:
    """Maps each tensor of the model at `path`, a directory or in the hub's cache, to its open safetensors
    file, in the order of names.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    try:
        try:
            index = Path(str(cached_file(path, INDEX_NAME)))
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except OSError:
            names = ["model.safetensors"]
        files = [safe_open(cached_file(path, name), framework="pt") for name in names]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.path} holds adapters, and their base, model.path = {path}, has no safetensors "
            "files that can be read: "
            f"{str(error).strip().splitlines()[0]}\nTake the run's policy/ directory, which is whole, or "
            "bring the base back."
        ) from None
    found = {name: file for file in files for name in file.keys()}  # noqa: SIM118 -- no dict
    return {name: found[name] for name in sorted(found)}


def _write_shards(
    directory: Path, entries: Sequence[TensorEntry], tensors: Iterator[Tensor], shard_bytes: int
) -> None:
    shards = list(_shards(entries, shard_bytes))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(directory / name, shard, islice(tensors, len(shard)), {"format": "pt"})
    if len(shards) > 1:
        weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in entries)},
            "weight_map": weight_map,
        }
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _shards(entries: Sequence[TensorEntry], shard_bytes: int) -> Iterator[list[TensorEntry]]:
    """Yields consecutive entries of at most `shard_bytes` together, or one that is larger."""
    shard: list[TensorEntry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    yield shard
