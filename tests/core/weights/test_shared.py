"""Weights in memory that other processes map: equal there, and gone with who shared them."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from core.errors import SnapshotError
from core.weights import shared
from core.weights.shared import share
from tests.support import ROOT

READ = """
import pickle, sys
for name, tensor in pickle.loads(sys.stdin.buffer.read()):
    print(name, tensor.dtype, tuple(tensor.shape), float(tensor.double().sum()))
"""


def made() -> list[tuple[str, torch.Tensor]]:
    """Parameters of several dtypes and odd sizes, one of them empty, one a scalar, one not contiguous."""
    return [
        ("a", torch.arange(7, dtype=torch.bfloat16)),
        ("b", torch.arange(12, dtype=torch.float32).view(3, 4).T),
        ("empty", torch.zeros(0, 5)),
        ("scalar", torch.tensor(3, dtype=torch.int64)),
    ]


def test_another_process_reads_what_was_shared() -> None:
    weights = share(made())
    read = subprocess.run(
        [sys.executable, "-c", READ], input=pickle.dumps(weights), cwd=ROOT, capture_output=True, check=True
    )
    assert read.stdout.decode().splitlines() == [
        f"{name} {tensor.dtype} {tuple(tensor.shape)} {float(tensor.double().sum())}"
        for name, tensor in made()
    ]


def test_here_it_can_be_read_again_and_again() -> None:
    weights = share(made())
    for _ in range(2):
        for (name, tensor), (wanted, expected) in zip(weights, made(), strict=True):
            assert name == wanted
            assert torch.equal(tensor, expected)


def test_the_memory_is_gone_with_who_shared_it() -> None:
    weights = share(made())
    pickled = pickle.dumps(weights)
    del weights
    with pytest.raises(SnapshotError, match="cannot be read"):
        list(pickle.loads(pickled))


def test_a_lack_of_memory_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.os, "posix_fallocate", full)
    with pytest.raises(SnapshotError, match=r"no 0\.0 GiB of memory to share weights in"):
        share(made())
