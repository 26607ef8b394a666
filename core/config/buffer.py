"""The section `buffer` of a config, with the shares by staleness of the sampler `stratified`."""

from __future__ import annotations

import re
from typing import Any, Literal

import pydantic
from pydantic import Field

from core.config.section import Section, shown

SAMPLERS = ("uniform", "fresh", "oldest", "stratified", "priority")
"""The names of buffer/sampling.py."""
DEFAULT_MIX = {"0-1": 0.5, "2-7": 0.3, "8+": 0.2}
"""Shares of a batch by staleness, where the sampler `stratified` is given none."""


class BufferConfig(Section):
    """The shared replay buffer."""

    sampler: str | dict[str, dict[str, float]] = Field(
        "uniform",
        description="Which stored groups a batch takes (buffer/sampling.py): `uniform`, `fresh`, `oldest`, `priority`, or "
        "`stratified`, which takes a share from each range of staleness, in learner steps: `{stratified: {0-1: 0.5, 2-7: "
        "0.3, 8+: 0.2}}`, which `stratified` alone stands for.",
    )
    samples_per_insert: tuple[float, float] | None = Field(
        None,
        description="Band of batch entries per inserted group: above it the learner waits, below it "
        "the actors; None: no band.",
    )
    uses_per_group: int = Field(1, ge=1, description="How often a group is trained on before it leaves.")
    max_staleness: int = Field(
        16, ge=0, description="Learner steps; groups with an older token are evicted and counted."
    )
    skip_equal_rewards: bool = Field(
        False,
        description="Groups whose samples all have the same reward are counted, not trained, and take no place in a batch. "
        "Bounded: where hardly any group has signal they are let through again, with a warning.",
    )
    capacity: int = Field(
        256,
        ge=1,
        description="Groups not yet trained on that may exist, stored or being generated: "
        "backpressure on actors.",
    )
    fsync: Literal["normal", "full"] = Field(
        "normal",
        description="`normal`: what was acknowledged survives any process; `full`: a power cut "
        "too, at a third of the speed.",
    )
    num_shards: int = Field(
        1,
        ge=1,
        le=64,
        description="Buffer processes; more than one where one cannot take in what the actors make.",
    )

    @property
    def sampler_name(self) -> str:
        """The sampler without its shares."""
        return self.sampler if isinstance(self.sampler, str) else "stratified"

    @property
    def mix_ranges(self) -> tuple[tuple[int, int | None, float], ...]:
        """`stratified`'s (first, last, share), learner steps, youngest first; last None: without end."""
        mix = DEFAULT_MIX if isinstance(self.sampler, str) else self.sampler["stratified"]
        return tuple(
            sorted((_range_of(name, share) for name, share in mix.items()), key=lambda entry: entry[0])
        )

    @pydantic.field_validator("sampler", mode="before")
    @classmethod
    def _sampler_is_there(cls, value: Any) -> Any:
        if isinstance(value, dict) and [*value] == ["stratified"]:
            _check_mix(value["stratified"])
        elif not isinstance(value, str) or value not in SAMPLERS:
            raise ValueError(
                f"buffer.sampler = {shown(value)}: expected {', '.join(map(repr, SAMPLERS[:-1]))} or {SAMPLERS[-1]!r}, or "
                "shares by staleness, for example {stratified: {0-1: 0.5, 2-7: 0.3, 8+: 0.2}}"
            )
        return value


def _range_of(name: str, share: float) -> tuple[int, int | None, float]:
    first, _, last = name.rstrip("+").partition("-")
    return int(first), None if name.endswith("+") else int(last or first), share


def _check_mix(mix: Any) -> None:
    """Raises ValueError unless ranges of staleness that do not overlap have shares whose sum is 1."""
    where = "buffer.sampler: stratified"
    if not isinstance(mix, dict) or not mix:
        raise ValueError(
            f"{where} = {shown(mix)}: expected shares by staleness, for example {{0-7: 0.5, 8+: 0.5}}"
        )
    if bad := [name for name in mix if not re.fullmatch(r"\d{1,9}(-\d{1,9}|\+)?", str(name))]:
        raise ValueError(
            f"{where}: {str(bad[0])[:40]!r} is no range of staleness; write for example {{0-1: 0.5, 2-7: 0.3, 8+: 0.2}}."
        )
    shares = [*mix.values()]
    if (
        any(type(share) not in (int, float) or not 0 < share <= 1 for share in shares)
        or abs(sum(shares) - 1) > 1e-6
    ):
        raise ValueError(
            f"{where}: the shares are {shown(shares)}; expected positive numbers whose sum is 1."
        )
    ranges = sorted((_range_of(name, share) for name, share in mix.items()), key=lambda entry: entry[0])
    for (first, last, _), after in zip(ranges, [*ranges[1:], None], strict=True):
        is_empty = last is not None and last < first
        overlaps = after is not None and (last is None or last >= after[0])
        if is_empty or overlaps:
            raise ValueError(f"{where}: {[*mix]}: the range from {first} is empty or overlaps another one.")
