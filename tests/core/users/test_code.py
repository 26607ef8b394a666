"""Errors of users' code are told with the user's own line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import numpy as np
import pytest

from core.users.code import place_of


def _in_the_standard_library() -> None:
    json.loads("{")


def _in_an_installed_library() -> None:
    np.zeros(3).reshape(2, 2).cumsum(axis=5)


def _in_a_room() -> None:
    place_of(None, "")  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [_in_the_standard_library, _in_an_installed_library, _in_a_room])
def test_an_error_is_placed_in_the_users_line_not_in_the_library_that_it_calls(
    fails: Callable[[], None],
) -> None:
    with pytest.raises((ValueError, AttributeError)) as raised:
        fails()
    place = place_of(raised.value, "")
    assert place is not None
    assert (os.path.basename(place.filename), place.name) == ("test_code.py", fails.__name__)


def test_an_error_in_no_code_of_the_users_is_placed_where_it_was_raised() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        place = place_of(error, __file__)
        assert place is not None
        assert os.path.basename(place.filename) == "decoder.py"
        assert place_of(ValueError(), __file__) is None
