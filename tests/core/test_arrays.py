"""Arrays are the bytes they are sent as: the values come back, and what is torn or too large is an error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.arrays import Bits, Float32s, Int32s

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
NANS = st.floats(width=32)


@given(TOKENS)
def test_token_ids_come_back(values: list[int]) -> None:
    found = Int32s.of(values)
    assert found.numpy().tolist() == values
    assert len(found) == len(values)
    assert found == Int32s.of(np.array(values))
    assert hash(found) == hash(Int32s(found.data))
    assert not found.numpy().flags.writeable


@given(st.lists(NANS))
def test_log_probs_come_back_to_the_last_bit(values: list[float]) -> None:
    np.testing.assert_array_equal(Float32s.of(values).numpy(), np.array(values, np.float32))
    assert Float32s.of(values) == Float32s.of(values), "NaN too: equal are the bytes"


@given(st.lists(st.booleans()))
def test_bits_come_back(values: list[bool]) -> None:
    found = Bits.of(values)
    assert found.numpy().tolist() == values
    assert found.numpy().dtype == np.bool_
    assert (len(found), found.count()) == (len(values), sum(values))
    assert Bits(found.data) == found
    assert len(found.data) == 1 + -(-len(values) // 8)


def test_runs_are_observations_and_actions_in_turn() -> None:
    assert Bits.runs(2, 1, 0, 2, 3) == Bits.of([0, 0, 1, 1, 1, 0, 0, 0])
    assert Bits.runs() == Bits.of([]) == Bits()


def test_arrays_of_different_kinds_are_different() -> None:
    assert Int32s.of([0]) != Float32s.of([0.0]), "though their bytes are the same"
    assert Int32s.of([1]) != Int32s.of([2])
    assert Int32s.of([1]) != [1]


@pytest.mark.parametrize("values", [[2**31], [-(2**31) - 1], np.array([2**31])])
def test_a_token_id_beyond_32_bits_is_an_error(values: list[int]) -> None:
    with pytest.raises(OverflowError):
        Int32s.of(values)


@given(st.lists(TOKENS, max_size=4))
def test_arrays_are_joined_one_after_another(parts: list[list[int]]) -> None:
    joined = Int32s.joined(map(Int32s.of, parts))
    assert joined.numpy().tolist() == [value for part in parts for value in part]


@pytest.mark.parametrize("data", [b"a", b"abcde"])
def test_bytes_that_are_no_whole_number_of_values_are_torn(data: bytes) -> None:
    with pytest.raises(ValueError, match="no whole number of int32 values: torn, or foreign"):
        Int32s(data)
    with pytest.raises(ValueError, match="no whole number of float32 values"):
        Float32s(data)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x08\x00", b"\x03\xff"])
def test_bytes_that_are_no_bits_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="are no bits: torn, or foreign"):
        Bits(data)
