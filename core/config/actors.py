"""The section `actors` of a config: how many rollout actors, what each of them takes, and how they sample."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from core.config.section import MAX_PROCESSES, MAX_TIMEOUT_S, MAX_TOKENS, Section, shown

CPU_CACHE_GIB, GPU_MEMORY_SHARE = 1.0, 0.85
"""What an engine takes where `actors.engine_memory` says nothing."""


class ActorsConfig(Section):
    """Rollout actors: one vLLM engine each."""

    count: int | tuple[int, int] = Field(
        1,
        description="Rollout actors, or a range `[1, 8]`: the run starts with the fewest, adds some while the learner "
        "waits, and lets them go while they do. 0 only where all samples are offline (nothing is evaluated then).",
    )
    num_cpus: float = Field(
        1.0, ge=0, le=MAX_PROCESSES, description="CPUs of one actor (Ray's logical CPUs, fractions allowed)."
    )
    num_gpus: float = Field(
        0.0,
        ge=0,
        description="GPUs of one actor: 0 generates on the CPU, 1 on a GPU, a fraction shares one, several are for "
        "`tensor_parallel`.",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=MAX_PROCESSES,
        description="GPUs that one engine's model is divided among, all of one node, each with a process of its own: for models that "
        "one GPU does not hold. `num_gpus` is this number then, or 0 for as many processes on CPUs.",
    )
    group_size: int = Field(8, ge=2, le=65_536, description="Samples per prompt (n; AGRO needs at least 2).")
    slots: int = Field(
        128, ge=1, le=65_536, description="Sequences an engine generates at once (vLLM max_num_seqs)."
    )
    max_new_tokens: int = Field(
        256,
        ge=1,
        le=MAX_TOKENS,
        description="Completion limit; a completion cut here is kept as truncated. With environments: of one turn.",
    )
    max_turns: int = Field(
        8,
        ge=1,
        le=65_536,
        description="With environments: how often the policy may speak in an episode; what is cut here is kept as truncated.",
    )
    max_sequence_tokens: int | None = Field(
        None,
        ge=2,
        le=MAX_TOKENS,
        description="Longest sequence, prompt and observations included; what is cut here is kept as truncated. None: "
        "`max_prompt_tokens + max_new_tokens`, with environments `max_prompt_tokens + max_turns * max_new_tokens`.",
    )
    turn_timeout_s: float = Field(
        60.0,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="With environments: one that has not answered within this is ended, and its sample marked `error`.",
    )
    endpoint_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that an actor's endpoint for harnesses listens at, on its node. A harness runs on that node: another "
        "one than the loopback is for what it starts elsewhere, in containers say; `0.0.0.0` is all of the node's.",
    )
    temperature: float = Field(
        1.0,
        description="Sampling temperature, also of the learner's log-probs; 0.01 or more, as vLLM has it.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus; below 1 breaks coverage (a warning says so).")
    engine_memory: float | None = Field(
        None,
        gt=0,
        le=65_536,
        description="On a CPU the GiB of an engine's KV cache, None: 1; on a GPU the share of the card's memory that an engine "
        "may take, at most `num_gpus`, None: 0.85 of that.",
    )
    on_update: Literal["continue", "drain", "abort"] = Field(
        "continue",
        description="Unfinished generations at new weights: go on with them, finish on the old "
        "ones first, or start again.",
    )
    straggler_timeouts_s: tuple[float | None, float | None] | None = Field(
        None,
        description="`[sample, group]`, either of which may be null: a sample that is generated for longer ends as truncated; "
        "a group does not wait longer for its last samples, it goes in with those it has. An episode of several turns counts from "
        "its reset. For example `[null, 60]`.",
    )

    @property
    def kv_cache_gib(self) -> float:
        """The KV cache of a CPU engine: `engine_memory`, or `CPU_CACHE_GIB`."""
        return CPU_CACHE_GIB if self.engine_memory is None else self.engine_memory

    @property
    def gpu_memory_share(self) -> float:
        """What of a card's memory a GPU engine may take: `engine_memory`, or `GPU_MEMORY_SHARE` of the part
        of it that is the actor's.
        """
        own = min(1.0, self.num_gpus)
        return GPU_MEMORY_SHARE * own if self.engine_memory is None else self.engine_memory

    @property
    def num_processes(self) -> int:
        """The processes of one actor: its own, and those that a divided engine has for the parts."""
        return 1 if self.tensor_parallel == 1 else 1 + self.tensor_parallel

    @property
    def sample_timeout_s(self) -> float | None:
        """How long a sample may be generated; None: for as long as it takes."""
        return None if self.straggler_timeouts_s is None else self.straggler_timeouts_s[0]

    @property
    def group_timeout_s(self) -> float | None:
        """How long a group waits for its last samples; None: for as long as they take."""
        return None if self.straggler_timeouts_s is None else self.straggler_timeouts_s[1]

    @property
    def fewest(self) -> int:
        """Actors at the start, below which autoscaling does not go."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int | None:
        """Actors that autoscaling may have; None: there is no autoscaling."""
        return None if isinstance(self.count, int) else self.count[1]

    @pydantic.field_validator("count", mode="before")
    @classmethod
    def _count_is_a_number_or_a_range(cls, value: Any) -> Any:
        fewest, most = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
        lowest = 0 if value is fewest else 1
        if type(fewest) is int and type(most) is int and lowest <= fewest <= most <= MAX_PROCESSES:
            return value
        raise ValueError(
            f"actors.count = {shown(value)}: expected a whole number from 0 to {MAX_PROCESSES}, or the fewest and the most "
            "for autoscaling, for example [1, 8]"
        )

    @pydantic.field_validator("straggler_timeouts_s", mode="before")
    @classmethod
    def _timeouts_are_two(cls, value: Any) -> Any:
        if value is None or (isinstance(value, tuple) and len(value) == 2 and all(map(_is_timeout, value))):
            return value
        raise ValueError(
            f"actors.straggler_timeouts_s = {shown(value)}: expected [sample, group], each null or seconds above 0 and at most "
            f"{MAX_TIMEOUT_S:,.0f}, for example [null, 60]"
        )


def _is_timeout(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value <= MAX_TIMEOUT_S)
