"""Samplers: which stored groups a batch takes. Pure functions; one more is one function and one line in SAMPLERS.

A group of offline samples has no age. To `uniform` and `oldest` that makes no difference. To `fresh` it is newer than
every version: were it older, it would never be taken while there is anything else, and as it never goes stale such groups
would fill the buffer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec
import numpy as np

AGELESS = 2**62
"""`GroupMeta.oldest_version` of a group without a version: a number, so that it can be compared and stored as one."""


class GroupMeta(msgspec.Struct, frozen=True):
    """What is kept in memory of a stored group.

    `oldest_version` is the policy version of its oldest token, AGELESS when all samples are offline; `num_tokens` counts
    prompt and completion tokens of all samples, `uses` the batches it was in.
    """

    group_id: int
    oldest_version: int
    num_tokens: int
    uses: int = 0

    @property
    def version(self) -> int | None:
        """`oldest_version`; None when there is none."""
        return None if self.oldest_version == AGELESS else self.oldest_version


Sampler: TypeAlias = Callable[[Sequence[GroupMeta], int, np.random.Generator], list[int]]
"""`(groups in order of insertion, k <= len(groups), rng) -> k different group ids`."""


def uniform(groups: Sequence[GroupMeta], k: int, rng: np.random.Generator) -> list[int]:
    """Every set of k groups equally likely."""
    return [groups[index].group_id for index in rng.choice(len(groups), size=k, replace=False)]


def fresh(groups: Sequence[GroupMeta], k: int, rng: np.random.Generator) -> list[int]:
    """Newest first: by policy version (offline groups before all), then by insertion."""
    ranked = heapq.nlargest(k, enumerate(groups), key=lambda entry: (entry[1].oldest_version, entry[0]))
    return [group.group_id for _, group in ranked]


def oldest(groups: Sequence[GroupMeta], k: int, rng: np.random.Generator) -> list[int]:
    """First in, first out."""
    return [group.group_id for group in groups[:k]]


SAMPLERS: dict[str, Sampler] = {"uniform": uniform, "fresh": fresh, "oldest": oldest}
"""By the names of `buffer.sampler`."""
