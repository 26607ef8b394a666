"""Makes of samples, and of what the reward functions say of them, the Group that is inserted."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec

from actors.prompts import PromptRow
from core.records import Group, Sample, WorkItem
from rewards.scoring import Scored


def with_scores(samples: Sequence[Sample], scores: Sequence[Scored]) -> list[Sample]:
    """Returns the samples with reward or error, and answer; a reward or an error that came with a sample
    stands, whatever the functions say.
    """
    return [_with_score(sample, score) for sample, score in zip(samples, scores, strict=True)]


def _with_score(sample: Sample, score: Scored) -> Sample:
    if sample.error is not None:
        return sample
    answer = sample.text.strip() if score.answer is None else score.answer
    reward, error = score.reward, score.error
    if sample.reward is not None:
        reward, error = sample.reward, None
    return msgspec.structs.replace(sample, reward=reward, error=error, answer_id=answer_id(answer))


def answer_id(answer: str) -> int:
    """Returns a number that is equal for equal answers."""
    return zlib.crc32(answer.encode())


def group_of(item: WorkItem, prompt: PromptRow, samples: Sequence[Sample], actor: str) -> Group:
    """Returns the group to insert.

    Of the texts and transcripts it keeps one, that of the first sample without an error: it is what a human
    is shown of a group, and four bytes a token, where the tokens say the same.
    """
    shown = next((place for place, sample in enumerate(samples) if sample.error is None), 0)
    kept = (
        sample if place == shown else msgspec.structs.replace(sample, text="", transcript=())
        for place, sample in enumerate(samples)
    )
    return Group(
        group_id=item.ordinal,
        prompt_index=item.prompt_index,
        source_row=prompt.source_row,
        prompt=prompt.text,
        samples=tuple(kept),
        actor=actor,
    )
