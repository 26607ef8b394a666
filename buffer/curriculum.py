"""Says which prompts rest because they are solved (`data.curriculum`). Pure.

A visit of a prompt is a group that came of it with rewards. It is solved when every sample that was generated
for it has at least the bound: `?reward=` of the setting, or else the highest reward that any sample of this
shard has had so far, once there has been a lower one. A higher reward than any before means that nothing was
solved until then: all prompts begin anew.

    solved in the last k visits    the prompt is passed over the next time that the stream comes to it
    solved again when it is back   it is passed over twice as often as before, up to LONGEST_REST times
    not solved                     it does not rest, and needs k solved visits again

So a prompt rests for 1, 2, 4, 8, 8, ... epochs. At most MOST_RESTING of the prompts rest at a time: further
ones have to wait. Whatever is passed over is counted down, so that the stream always comes to a prompt that
does not rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

LONGEST_REST = 8
"""Times that a prompt is passed over before it is visited again."""
MOST_RESTING = 0.9
"""Share of the prompts that may rest at a time."""


class Visits(NamedTuple):
    """What is known of a prompt: its `solved` visits in a row, and the `rest`, how often it is still passed
    over.
    """

    solved: int = 0
    rest: int = 0


class Curriculum:
    """The prompts of one shard: `curriculum.observe(7, [1.0, 1.0])`, then `curriculum.passes_over(7)`.

    num_visits   the k of the module's text; None: no prompt ever rests
    bound        the reward from which on a sample is solved; None: the highest so far
    num_prompts  of this shard
    """

    def __init__(self, num_visits: int | None, bound: float | None, num_prompts: int) -> None:
        self._num_visits, self._bound = num_visits, bound
        self._most = int(MOST_RESTING * num_prompts)
        self._visits: dict[int, Visits] = {}
        self._range: tuple[float, float] | None = None
        self._changed: dict[int, None] = {}
        self._is_cleared = False
        self.num_resting = 0

    def observe(self, prompt_index: int, rewards: Sequence[float]) -> None:
        """Takes note of a visit with these rewards; without any it says nothing."""
        if self._num_visits is None or not rewards:
            return
        is_solved = self._judge(rewards)
        known = self._visits.get(prompt_index, Visits())
        if not is_solved:
            self._put(prompt_index, Visits())
        elif known.solved + 1 < self._num_visits:
            self._put(prompt_index, Visits(known.solved + 1, known.rest))
        elif known.rest or self.num_resting < self._most:
            longest = self._num_visits + LONGEST_REST.bit_length() - 1
            solved = min(longest, known.solved + 1)
            self._put(prompt_index, Visits(solved, max(known.rest, 2 ** (solved - self._num_visits))))

    def passes_over(self, prompt_index: int) -> bool:
        """Returns whether the prompt rests, and counts that down: it is passed over once more."""
        known = self._visits.get(prompt_index)
        if known is None or not known.rest:
            return False
        self._put(prompt_index, known._replace(rest=known.rest - 1))
        return True

    def pop_changed(self) -> tuple[bool, list[tuple[int, Visits]]]:
        """Returns whether all was forgotten since the last call, and the prompts of which something else is
        known since; nothing is known of those with `Visits()`.
        """
        is_cleared, self._is_cleared = self._is_cleared, False
        changed = [(index, self._visits.get(index, Visits())) for index in self._changed]
        self._changed.clear()
        return is_cleared, changed

    def get_state(self) -> dict[str, Any]:
        """Returns what is known of prompts, and the lowest and highest reward."""
        return {"visits": dict(self._visits), "range": self._range}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` returned; of prompts only where they may rest."""
        known_visits = {} if self._num_visits is None else state["visits"]
        self._visits = {index: Visits(*known) for index, known in known_visits.items()}
        self._range = None if state["range"] is None else (state["range"][0], state["range"][1])
        self.num_resting = sum(known.rest > 0 for known in self._visits.values())
        self._changed.clear()
        self._is_cleared = False

    def check_valid(self) -> list[str]:
        """Returns what is wrong with the state, in words; nothing when it is valid."""
        resting = sum(known.rest > 0 for known in self._visits.values())
        problems = [] if resting == self.num_resting else [f"{self.num_resting} rest, {resting} do"]
        problems += [f"{resting} prompts rest, of {self._most} that may"] if resting > self._most else []
        return problems + [
            f"prompt {index}: {known}"
            for index, known in self._visits.items()
            if not 0 <= known.rest <= LONGEST_REST or known == Visits()
        ]

    def _judge(self, rewards: Sequence[float]) -> bool:
        if self._bound is not None:
            return min(rewards) >= self._bound
        lowest, highest = self._range or (rewards[0], rewards[0])
        if max(rewards) > highest and self._visits:
            self._visits.clear()
            self._changed.clear()
            self._is_cleared, self.num_resting = True, 0
        self._range = lowest, highest = min(lowest, *rewards), max(highest, *rewards)
        return lowest < min(rewards) == highest

    def _put(self, prompt_index: int, visits: Visits) -> None:
        before = self._visits.pop(prompt_index, Visits())
        self.num_resting += (visits.rest > 0) - (before.rest > 0)
        if visits != Visits():
            self._visits[prompt_index] = visits
        if visits != before:
            self._changed[prompt_index] = None
