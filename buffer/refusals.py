"""What a shard of the buffer refuses, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DataError


def another_stream(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> ConfigError:
    """Returns the error for a run directory that was started with another prompt stream."""
    return ConfigError(
        f"{directory} was started with run.seed = {before['seed']} and {before['num_prompts']} usable "
        f"prompts{_in_parts(before)}, now run.seed = {now['seed']} and there are {now['num_prompts']}"
        f"{_in_parts(now)}: its group ids would mean other prompts. "
        "Restore seed and data, or set another run.dir."
    )


def _in_parts(state: dict[str, Any]) -> str:
    """Returns what `stream_state` says of several sources, as words that follow the number of all prompts."""
    sources = [f"{count} with share {share}" for count, share in state.get("parts", ())]
    return f" ({', '.join(sources)})" if sources else ""


def forgotten(step: int) -> DataError:
    """Returns the error for a batch that was asked for after a checkpoint, or another batch, passed it."""
    return DataError(
        f"the batch of step {step} was forgotten: the buffer is past it. Resume from a newer checkpoint."
    )


def check_ref_logprobs(group_id: int, values: Sequence[float], num_samples: int | None) -> None:
    """Raises DataError unless there is a finite number for each sample; None: nobody knows how many."""
    if (num_samples is not None and len(values) != num_samples) or not all(map(math.isfinite, values)):
        raise DataError(
            f"reference log-probs of group {group_id}: {values}; expected {num_samples} finite "
            "numbers, one per sample."
        )
