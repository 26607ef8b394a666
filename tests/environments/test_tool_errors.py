"""A tool that fails at most calls is told of: once, with its last error and the user's line."""

from __future__ import annotations

import logging

import pytest

from environments import ToolCall, Turn
from environments.tool_errors import MIN_CALLS, ToolErrors
from tests.support.environments.places import (
    SOON_S,
    SPECS,
    TurningPool,
    opened,
)

pytestmark = pytest.mark.timed


def test_a_tool_that_raises_at_every_call_is_told_of_once_with_its_last_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    with TurningPool(SPECS, turn_timeout_s=20.0, memory_bytes=2**28) as pool:
        place = opened(pool, "counter")
        calls = (ToolCall("increment", {"step": 50}),) * (MIN_CALLS // 2)
        for _ in range(4):
            place.act("", calls).result(SOON_S)
        place.close()
    (told,) = [record.getMessage() for record in caplog.records if record.name == "environments.tool_errors"]
    assert told.startswith(
        "environment counter: 20 of 20 tool calls failed; the last: increment raised ValueError"
    )
    assert ": too far (trl.py:" in told


@pytest.mark.parametrize(
    ("num_turns", "num_errors", "is_told"),
    [(MIN_CALLS, 1, True), (MIN_CALLS - 1, 1, False), (MIN_CALLS, 0, False)],
)
def test_few_calls_and_few_errors_are_the_policys_own(
    num_turns: int, num_errors: int, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    errors = ToolErrors("game")
    for _ in range(num_turns):
        errors.count(1, Turn("", False, tool_errors=("raised",) * num_errors, last_error="x" * num_errors))
    assert bool(caplog.records) == is_told


def test_half_of_the_calls_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    errors = ToolErrors("game")
    for _ in range(MIN_CALLS):
        errors.count(2, Turn("", False, tool_errors=("arguments",), last_error="add: missing 'b'"))
    assert not caplog.records
    errors.count(1, Turn("", False, tool_errors=("arguments",), last_error="add: missing 'b'"))
    assert [record.getMessage() for record in caplog.records] == [
        "environment game: 21 of 41 tool calls failed; the last: add: missing 'b'"
    ]
