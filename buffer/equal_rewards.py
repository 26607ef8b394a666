"""Says which groups without signal stay out of the buffer (`buffer.skip_equal_rewards`). Pure.

A group without signal is one whose samples, those with an error left out, all have the same reward: nothing
tells one from another. It is skipped at the cost of a budget:

    full at first: MAX_SKIPPED_BATCHES batches of groups
    a group that is skipped takes one off it, a group with signal gives MAX_SKIPPED_BATCHES back, up to that
    at 0, groups without signal are let through, and counted

So a batch costs at most MAX_SKIPPED_BATCHES batches of skipped groups besides itself, in the long run,
whatever the task is. A task without any signal costs the budget once; from then on it runs as if nothing were
skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

MAX_SKIPPED_BATCHES = 8


class Since(msgspec.Struct):
    """What came since the budget was full: `groups`, those of them with `equal` rewards, and of these those
    with the `highest` reward that the run has seen, and the `lowest`.
    """

    groups: int = 0
    equal: int = 0
    highest: int = 0
    lowest: int = 0


class EqualRewards:
    """Decides on one group after another: `skipping.skips([1.0, 1.0])`.

    `let_through` counts groups without signal that were stored all the same; `pop_warning` gives what is to
    be said of them, once.
    """

    def __init__(self, is_on: bool, groups_per_step: int) -> None:
        self._is_on = is_on
        self._full = self._budget = MAX_SKIPPED_BATCHES * groups_per_step
        self._since = Since()
        self._lowest, self._highest = float("inf"), float("-inf")
        self._is_told = False
        self.let_through = 0

    def skips(self, rewards: Sequence[float]) -> bool:
        """Returns whether the group of these rewards is to be left out; takes note of it."""
        if not self._is_on:
            return False
        if min(rewards) < self._lowest:
            self._lowest, self._since.lowest = min(rewards), 0
        if max(rewards) > self._highest:
            self._highest, self._since.highest = max(rewards), 0
        self._since.groups += 1
        if min(rewards) != max(rewards):
            self._budget = min(self._full, self._budget + MAX_SKIPPED_BATCHES)
            if self._budget == self._full:
                self._since, self._is_told = Since(), False
            return False
        self._since.equal += 1
        self._since.highest += rewards[0] == self._highest
        self._since.lowest += rewards[0] == self._lowest
        if not self._budget:
            self.let_through += 1
            return False
        self._budget -= 1
        return True

    def pop_warning(self) -> str:
        """Returns a sentence when the budget has just come to its end, "" otherwise."""
        if self._budget or self._is_told or not self._is_on:
            return ""
        self._is_told, since = True, self._since
        if self._lowest == self._highest:
            what = f"every sample so far has the reward {self._highest:g}: all are solved, or none is"
        else:
            others = since.equal - since.highest - since.lowest
            what = (
                f"{since.highest} of them all solved (reward {self._highest:g}, the highest so far), "
                f"{since.lowest} not at all ({self._lowest:g}, the lowest), {others} in between"
            )
        return (
            f"the task gives hardly any signal: of the last {since.groups} groups {since.equal} had the same reward in "
            f"all samples; {what}. buffer.skip_equal_rewards has left out {self._full} of them and lets others through "
            "until there is signal again (buffer/equal_let_through)"
        )

    def get_state(self) -> dict[str, Any]:
        """Returns what it knows, as JSON."""
        return {
            "budget": self._budget,
            "since": msgspec.to_builtins(self._since),
            "range": [self._lowest, self._highest] if self._lowest <= self._highest else None,
            "is_told": self._is_told,
            "let_through": self.let_through,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` returned; a budget that is smaller by now is not exceeded."""
        self._budget = min(self._full, state["budget"])
        self._since = msgspec.convert(state["since"], Since)
        if state["range"] is not None:
            self._lowest, self._highest = state["range"]
        self._is_told, self.let_through = state["is_told"], state["let_through"]
