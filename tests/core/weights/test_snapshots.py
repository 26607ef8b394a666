"""Weight snapshots: what was written comes back, bit for bit and in order, or not at all."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import SnapshotError
from core.weights.snapshots import Base, Manifest, SnapshotWriter, read_snapshot

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
SHAPES = ((), (0,), (1,), (3, 0, 2), (7, 5), (1, 1, 17), (129,))


def parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    """One parameter of every dtype and shape, odd sizes next to wide dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{dtype} {shape}": (10 * torch.randn(shape, generator=generator)).to(dtype)
        for shape in SHAPES
        for dtype in DTYPES
    }


def written(
    params: dict[str, torch.Tensor], bucket_bytes: int = 512, version: int = 3
) -> tuple[Manifest, list[np.ndarray]]:
    writer = SnapshotWriter(bucket_bytes)
    for name, tensor in params.items():
        writer.add(name, tensor)
    return writer.finish(version)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape, bits(found[name])) == (
            tensor.dtype,
            tensor.shape,
            bits(tensor),
        ), name


def test_every_dtype_and_shape_comes_back_in_order_over_several_buckets():
    params = parameters()
    manifest, buckets = written(params)
    assert len(buckets) > 5
    assert manifest.version == 3
    assert_same(dict(read_snapshot(manifest, buckets)), params)


def test_transposed_and_differentiable_parameters_come_back_whole():
    params = {"transposed": torch.arange(12.0).view(3, 4).T, "trained": torch.nn.Parameter(torch.arange(5.0))}
    assert_same(
        dict(read_snapshot(*written(params))), {name: tensor.detach() for name, tensor in params.items()}
    )


def test_a_snapshot_does_not_follow_later_changes_of_the_parameters():
    weight = torch.ones(10)
    writer = SnapshotWriter(bucket_bytes=512)
    writer.add("weight", weight)
    weight.zero_()
    assert_same(dict(read_snapshot(*writer.finish(1))), {"weight": torch.ones(10)})


def test_an_empty_snapshot_has_no_buckets():
    manifest, buckets = written({})
    assert buckets == []
    assert list(read_snapshot(manifest, buckets)) == []


@given(sizes=st.lists(st.integers(0, 300), max_size=20), bucket_bytes=st.integers(1, 400))
def test_a_bucket_is_no_larger_than_the_limit_or_its_one_parameter(sizes: list[int], bucket_bytes: int):
    params = {str(index): torch.arange(size).to(torch.uint8) for index, size in enumerate(sizes)}
    manifest, buckets = written(params, bucket_bytes)
    assert max(manifest.sizes, default=0) <= max([bucket_bytes, *sizes])
    assert list(manifest.sizes) == [bucket.nbytes for bucket in buckets]
    assert manifest.num_bytes >= sum(sizes)
    assert_same(dict(read_snapshot(manifest, buckets)), params)


def test_buckets_go_to_the_store_one_by_one_as_they_fill():
    stored: list[int] = []

    def store(bucket: np.ndarray) -> str:
        stored.append(bucket.nbytes)
        return f"reference {len(stored)}"

    writer = SnapshotWriter(1000, store)
    for index in range(4):
        writer.add(str(index), torch.zeros(150))
    assert stored == [600, 600, 600]
    assert writer.finish(1)[1] == [f"reference {number}" for number in (1, 2, 3, 4)]


def test_read_only_buckets_are_viewed_without_a_copy_or_a_warning():
    params = parameters()
    manifest, buckets = written(params)
    for bucket in buckets:
        bucket.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(read_snapshot(manifest, buckets))
    assert_same(found, params)
    for entry in manifest.params:
        if found[entry.name].numel():
            assert found[entry.name].data_ptr() == buckets[entry.bucket].ctypes.data + entry.offset


def flipped_bit(buckets: list[np.ndarray]) -> list[np.ndarray]:
    buckets[-1][7] ^= 1
    return buckets


DAMAGES = {
    "a flipped bit": (flipped_bit, r"bucket \d+: checksum"),
    "a truncated bucket": (
        lambda buckets: [*buckets[:-1], buckets[-1][:-1]],
        r"bucket \d+: \d+ bytes "
        r"arrived of \d+",
    ),
    "a missing bucket": (lambda buckets: buckets[:-1], r"has \d+ buckets, \d+ arrived"),
    "one bucket too many": (lambda buckets: [*buckets, buckets[0]], r"has \d+ buckets, \d+ arrived"),
    "buckets in another order": (lambda buckets: buckets[::-1], "bucket 0"),
    "buckets of another version": (lambda buckets: written(parameters(seed=1))[1], "bucket 0: checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_refused_before_its_first_tensor(damage: str):
    manifest, buckets = written(parameters())
    harm, message = DAMAGES[damage]
    with pytest.raises(SnapshotError, match=f"snapshot 3.*{message}"):
        read_snapshot(manifest, harm(buckets))


def moved(params: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same parameters with one element of some of them changed."""
    generator = torch.Generator().manual_seed(seed)
    after = {name: tensor.clone() for name, tensor in params.items()}
    for tensor in after.values():
        if tensor.numel() > 1 and torch.rand((), generator=generator) < 0.5:
            place = int(torch.randint(tensor.numel(), (), generator=generator))
            tensor.view(-1)[place] = torch.zeros((), dtype=tensor.dtype)
    return after


def deltas(
    params: dict[str, torch.Tensor], base: Base, version: int = 4
) -> tuple[Manifest, list[np.ndarray]]:
    writer = SnapshotWriter(512, base=base)
    for name, tensor in params.items():
        writer.add(name, tensor)
    return writer.finish(version)


def test_what_has_changed_since_another_snapshot_makes_the_newest_and_no_other_is_needed():
    params = parameters()
    _, whole = written(params)
    base = Base(whole, whole)
    for version in range(4, 9):  # Each is of the whole one: whoever missed some takes the last.
        params = moved(params, seed=version)
        manifest, buckets = deltas(params, base, version)
        assert manifest.deltas
        assert sum(bucket.nbytes for bucket in buckets[: len(manifest.sizes)]) < manifest.num_bytes
        assert_same(dict(read_snapshot(manifest, buckets)), params)
        assert all(
            found is whole[number]
            for number, found in zip(manifest.deltas, buckets[-len(manifest.deltas) :], strict=True)
        )


def test_buckets_of_which_all_has_changed_and_those_beyond_the_base_come_whole():
    _, whole = written(parameters())
    others = parameters(seed=1) | {"one more": torch.ones(300)}
    manifest, buckets = deltas(others, Base(whole, whole))
    assert len(buckets) < 2 * len(manifest.sizes)
    assert_same(dict(read_snapshot(manifest, buckets)), others)


@pytest.mark.parametrize("place", ["in the delta", "in its base"])
def test_a_delta_or_a_base_that_is_damaged_is_refused_before_the_first_tensor(place: str):
    params = parameters()
    _, whole = written(params)
    manifest, buckets = deltas(moved(params, seed=7), Base(whole, whole))
    for number in (manifest.deltas[-1],) if place == "in the delta" else range(-len(manifest.deltas), 0):
        harmed = [bucket.copy() for bucket in buckets]
        harmed[number][-1] ^= 1
        with pytest.raises(SnapshotError, match=r"snapshot 4, bucket \d+: .*torn"):
            read_snapshot(manifest, harmed)
    with pytest.raises(SnapshotError, match=r"has \d+ buckets, \d+ arrived"):
        read_snapshot(manifest, buckets[:-1])
    with pytest.raises(SnapshotError, match=r"snapshot 4, bucket \d+: .*torn"):
        read_snapshot(
            manifest,
            [*buckets[: len(manifest.sizes)], *written(parameters(seed=1))[1][: len(manifest.deltas)]],
        )
