"""What has changed of a bucket: put into what it has changed since, it is the bucket, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import SnapshotError
from core.weights.deltas import changed, difference


def bucket(size_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


@given(
    st.integers(1, 3000),
    st.sets(st.integers(0, 2999), max_size=40),
    st.integers(0, 9),
)
def test_a_bucket_comes_back_wherever_it_has_changed(num_words, places, seed):
    base = bucket(2 * num_words, seed)
    after = base.copy()
    after.view("<u2")[[place for place in places if place < num_words]] += 1
    delta = difference(base, after)
    if delta is None:  # Too little of it is the same.
        assert num_words < 300
        return
    assert delta.nbytes <= after.nbytes / 2
    assert np.array_equal(changed(base, delta), after)
    assert np.array_equal(base, bucket(2 * num_words, seed)), "the base is read only"


@pytest.mark.parametrize("gap", [255, 256, 257, 511, 512, 513, 70_000])
def test_places_far_from_one_another_are_found(gap):
    base = bucket(2 * 150_000)
    after = base.copy()
    after.view("<u2")[[0, gap, 2 * gap]] ^= 7
    delta = difference(base, after)
    assert delta is not None
    assert delta.nbytes < 3 * (3 + 2 * gap // 256 + 1) + 16
    assert np.array_equal(changed(base, delta), after)


def test_a_changed_element_of_16_bits_costs_three_bytes():
    base = bucket(2_000_000)
    after = base.copy()
    after.view("<u2")[::50] ^= 1  # 2 % of them.
    delta = difference(base, after)
    assert delta is not None
    assert delta.nbytes == 8 + 3 * 20_000


def test_what_is_much_changed_or_of_another_size_is_sent_whole():
    base = bucket(1000)
    assert difference(base, bucket(1000, seed=1)) is None
    assert difference(base, base[:-2]) is None
    assert difference(base[:-1], base[:-1]) is None, "no whole number of words"
    nothing = difference(base, base.copy())
    assert nothing is not None
    assert np.array_equal(changed(base, nothing), base)


def test_a_torn_delta_is_refused_and_nothing_outside_the_bucket_is_written():
    base = bucket(4000)
    after = base.copy()
    after.view("<u2")[[5, 1999]] ^= 1
    delta = difference(base, after)
    assert delta is not None
    for torn in (delta[:-1], delta[:4], delta[:0], np.append(delta, delta)):
        with pytest.raises(SnapshotError, match="torn"):
            changed(base, torn)
    with pytest.raises(SnapshotError, match="changes word 1999 of 1900: it is torn"):
        changed(base[:3800], delta)
