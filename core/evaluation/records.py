"""The records of an evaluation: an item, its samples, and the result of all."""

from __future__ import annotations

import msgspec

from core.records import VersionSpan


class EvalItem(msgspec.Struct, frozen=True):
    """One held-out prompt, by its place among the usable ones, to evaluate at exactly one policy version. It
    never enters the buffer.
    """

    suite: str
    policy_version: int
    prompt_index: int
    seed: int


class EvalSample(msgspec.Struct, frozen=True, kw_only=True):
    """A held-out prompt with what was said to it and the rewards, all by one policy version.

    lengths, truncated   of each sample: its sampled tokens, and whether a limit ended it
    answer_ids           equal for equal answers, as in Sample
    shown                the conversation of the first sample, as Sample.transcript has it; empty for a prompt and
                         its answer
    tool_calls_shown     how often tools were called in it
    """

    item: EvalItem
    prompt: str
    texts: tuple[str, ...]
    rewards: tuple[float | None, ...]
    errors: tuple[str | None, ...]
    version_spans: tuple[tuple[VersionSpan, ...], ...]
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]
    answer_ids: tuple[int | None, ...]
    shown: tuple[tuple[str, str], ...] = ()
    tool_calls_shown: int = 0


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of evaluating a suite at one version; `metrics` are those of core/evaluation/estimates.py,
    the first of which, avg@n, is `solve_rate` (NaN where no sample has a reward).
    """

    suite: str
    policy_version: int
    solve_rate: float
    num_problems: int
    num_samples: int
    num_errors: int
    metrics: dict[str, float]
