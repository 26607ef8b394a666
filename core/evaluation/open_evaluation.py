"""One evaluation that is under way: which of its items wait, who has which, and what came back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from core.evaluation.estimates import Problem, estimates
from core.evaluation.records import EvalItem, EvalSample, Evaluation


class SuiteSize(NamedTuple):
    """How many prompts a suite has, and how many samples each of them gets."""

    num_prompts: int
    num_samples: int


class OpenEvaluation:
    """A suite at one version. An item is waiting, taken by an actor, or done; done once, whoever says so."""

    def __init__(self, suite: str, version: int, size: SuiteSize, seed: int) -> None:
        self.suite, self.version, self.size = suite, version, size
        self._waiting = deque(
            EvalItem(suite, version, index, (seed + index) % 2**31) for index in range(size.num_prompts)
        )
        self._taken: dict[EvalItem, str] = {}
        self._done: dict[int, EvalSample] = {}

    @property
    def is_waiting(self) -> bool:
        """Says whether items wait for an actor."""
        return bool(self._waiting)

    @property
    def is_done(self) -> bool:
        """Says whether every item is done."""
        return len(self._done) == self.size.num_prompts

    def take(self, actor: str, room: int) -> tuple[EvalItem, ...]:
        """Hands out items of at most `room` samples together, or one that is larger than that."""
        count = min(max(1, room // self.size.num_samples), len(self._waiting))
        items = tuple(self._waiting.popleft() for _ in range(count))
        self._taken.update(dict.fromkeys(items, actor))
        return items

    def release(self, actor: str) -> None:
        """Lets what the actor has not finished wait for another."""
        lost = [
            item
            for item, holder in self._taken.items()
            if holder == actor and item.prompt_index not in self._done
        ]
        for item in lost:
            del self._taken[item]
        self._waiting.extend(lost)

    def finish(self, sample: EvalSample) -> None:
        """Takes the result of an item. What is not by its version alone is none: the item waits again."""
        item = sample.item
        self._taken.pop(item, None)
        if all(span.version == self.version for spans in sample.version_spans for span in spans):
            self._done.setdefault(item.prompt_index, sample)
            if item in self._waiting:  # Its holder was given up, and answered after all.
                self._waiting.remove(item)
        elif item.prompt_index not in self._done and item not in self._waiting:
            self._waiting.append(item)

    def samples(self) -> list[EvalSample]:
        """Returns what is done, in the order of the prompts."""
        return [self._done[index] for index in sorted(self._done)]

    def result(self) -> Evaluation:
        """Returns what came of it."""
        return evaluation_of(self.suite, self.version, self.samples(), self.size.num_samples)


def evaluation_of(suite: str, version: int, samples: Sequence[EvalSample], num_samples: int) -> Evaluation:
    """Returns the result of evaluating `suite`, from the samples of all its prompts, `num_samples` each."""
    problems = [
        Problem(sample.rewards, sample.answer_ids, sample.lengths, sample.truncated) for sample in samples
    ]
    metrics = estimates(problems, num_samples)
    return Evaluation(
        suite=suite,
        policy_version=version,
        solve_rate=metrics.get(f"avg@{num_samples}", float("nan")),
        num_problems=len(samples),
        num_samples=sum(len(sample.rewards) for sample in samples),
        num_errors=int(metrics["errors"]),
        metrics=metrics,
    )
