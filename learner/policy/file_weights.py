"""A policy's tensors as the files of its base have them: parameters and persistent buffers, by the names and
in the shapes of files.

transformers renames, fuses and transposes what it reads: in memory the experts of a layer are two parameters,
in a file three tensors an expert. Actors, snapshots and exports speak the files' language, which vLLM and all
other tools understand. The way back is planned once, of shapes alone; then each `Unit` goes it by itself, so
that nothing is ever whole but one unit:

    module --weights_of--> Weights --file_units--> Units: some weights of the module -> their tensors in files
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learner.checkpoints.checkpoint import TensorEntry
from learner.policy.lora import Weight, weights_of


class Unit(NamedTuple):
    """Weights of a module that are converted together, and the tensors in files that they become. Most are
    one weight under one name.

    `convert` takes the tensors of `weights`, and gives those of `entries`, as views where that is enough.
    """

    weights: tuple[Weight, ...]
    entries: tuple[TensorEntry, ...]
    convert: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """The weights' tensors -> those of `entries`; views where that is enough."""

    @property
    def parameters(self) -> list[Any]:
        """All parameters that must be gathered for `tensors`."""
        return [parameter for weight in self.weights for parameter in weight.parameters]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Returns (name in files, tensor) of each entry, valid as long as `parameters` are gathered."""
        return self.named([weight.value() for weight in self.weights])

    def named(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Returns (name in files, tensor) of each entry, made of `values` that the weights have elsewhere,
        for example in a checkpoint.
        """
        return zip((entry.key for entry in self.entries), self.convert(values), strict=True)


def plain_units(weights: Iterable[Weight]) -> list[Unit]:
    """Makes a unit of each weight, by the name that it has in the module."""
    return [Unit((weight,), (_entry(weight.name, weight),), _as_it_is) for weight in weights]


def file_units(module: Any) -> list[Unit]:
    """Plans how all weights of a module become tensors in files, in the module's order, tied weights once.

    Names and shapes are those of the files that the module was loaded from (`from_pretrained`), or its own
    where there were none. The module may have adapters, and may lie on the meta device.
    """
    weights = {weight.name: weight for weight in weights_of(module)}
    for name in getattr(module, "_keys_to_ignore_on_save", None) or ():
        weights.pop(name, None)
    places = {name: place for place, name in enumerate(weights)}
    units = [
        _unit(module, [weights[name] for name in names], group)
        for names, group in _groups(module, list(weights))
    ]
    return sorted(units, key=lambda unit: min(places[weight.name] for weight in unit.weights))


def wider_first(units: Iterable[Unit]) -> list[Unit]:
    """Sorts units as files hold them: wider dtypes first, which
    `learner.checkpoints.checkpoint.write_tensors` asks for.
    """
    return sorted(
        units, key=lambda unit: -max(getattr(torch, entry.dtype).itemsize for entry in unit.entries)
    )


def buckets(units: Iterable[Unit], bucket_bytes: int) -> Iterator[list[Unit]]:
    """Yields units whose parameters, gathered, take at most `bucket_bytes`; a larger unit is one by itself.

    Sizes are those of ZeRO-3 (`ds_numel`), since `numel()` of a partitioned parameter is 0.
    """
    bucket: list[Unit] = []
    size = 0
    for unit in units:
        num_bytes = sum(parameter.ds_numel * parameter.element_size() for parameter in unit.parameters)
        if bucket and size + num_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += num_bytes
    if bucket:
        yield bucket


class _Group(NamedTuple):
    """What the names of a group become: `target`, the first of them, by `converter`; None leaves the tensor
    as it is.

    `patterns` are what the converter knows each of the group's names by.
    """

    target: str
    converter: Any
    patterns: tuple[str, ...]
    """Of each of the group's names: what the converter knows it by."""


def _groups(module: Any, names: list[str]) -> Iterator[tuple[list[str], _Group]]:
    """Yields the names of the module's weights, in groups that one conversion takes together."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    # Under ZeRO-3 transformers keeps all conversions there are, also those of names that the files do not
    # have.
    used = [
        conversion
        for conversion in getattr(module, "_weight_conversions", None) or ()
        if conversion.was_used()
    ]
    back = [conversion.reverse_transform() for conversion in reversed(used)]
    renamings = [conversion for conversion in back if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in back if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, list[tuple[str, str]]] = {}
    # The order that some conversions of transformers count on.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault(target, []).append((name, pattern or ""))
    for target, members in groups.items():
        patterns = tuple(pattern for _, pattern in members)
        yield [name for name, _ in members], _Group(target, by_pattern.get(patterns[0]), patterns)


def _unit(module: Any, weights: list[Weight], group: _Group) -> Unit:
    if group.converter is None:
        (weight,) = weights
        return Unit((weight,), (_entry(group.target, weight),), _as_it_is)

    def convert(values: Sequence[Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(group.converter)
        for weight, pattern, value in zip(weights, group.patterns, values, strict=True):
            converter.add_tensor(group.target, weight.name, pattern, value)
        found = converter.convert(group.target, model=module, config=module.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}

    # Shapes alone, so that they are known before anything is gathered.
    empty = convert(
        [torch.empty(weight.shape, dtype=weight.parameter.dtype, device="meta") for weight in weights]
    )
    entries = tuple(
        TensorEntry(name, _name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in empty.items()
    )
    return Unit(tuple(weights), entries, lambda values: list(convert(values).values()))


def _entry(name: str, weight: Weight) -> TensorEntry:
    return TensorEntry(name, _name_of(weight.parameter.dtype), weight.shape)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_it_is(values: Sequence[Tensor]) -> Sequence[Tensor]:
    return values
