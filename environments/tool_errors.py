"""Warns of an environment whose tools fail: the policy is told of each error, and its user else sees only a
number.
"""

from __future__ import annotations

import logging

from environments import Turn

MIN_CALLS = 20
"""Among fewer calls a policy's own mistakes may be most."""
_log = logging.getLogger(__name__)


class ToolErrors:
    """Counts the calls of the tools of the environment called `name`: `errors.count(num_calls, turn)`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_calls = self._num_errors = 0
        self._is_told = False

    def count(self, num_calls: int, turn: Turn) -> None:
        """Counts the calls that `turn` answers. Warns once, as soon as more than half of at least MIN_CALLS
        have failed.
        """
        self._num_calls += num_calls
        self._num_errors += len(turn.tool_errors)
        if self._is_told or self._num_calls < MIN_CALLS or self._num_errors * 2 <= self._num_calls:
            return
        if not turn.last_error:
            return
        self._is_told = True
        _log.warning(
            "environment %s: %d of %d tool calls failed; the last: %s",
            self._name,
            self._num_errors,
            self._num_calls,
            turn.last_error,
        )
