"""The section `rewards` of a config: the reward functions, and the processes that run them."""

from __future__ import annotations

from pydantic import Field

from core.config.section import MAX_NUMBER, MAX_PROCESSES, MAX_TIMEOUT_S, Section

ENVIRONMENT = "environment"
"""Names the environment's own reward among the reward functions."""


class RewardsConfig(Section):
    """Reward functions, run in killable worker processes."""

    functions: dict[str, float] = Field(
        {},
        description="Functions and their weights; the reward is the weighted sum. A name is built in "
        "(`exact_match`, `math_verify`, `reasoning_gym`, `overlong`, `python_tests`, ...; some take "
        "parameters, `'python_tests?timeout_s=5'`), or `reward_model:PATH`, a hosted classifier, or "
        "`module:function`, or `environment`, the environment's own reward (alone where none is named and "
        "there are `environments`). `'module:function?messages'` gets prompts and completions as lists of "
        "messages, as one does whose annotation of `completions` says so, and not as text.",
    )
    workers: int = Field(
        4,
        ge=1,
        le=MAX_PROCESSES,
        description="Processes in each actor that score; all but the first start when work waits.",
    )
    concurrency: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Completions that the `async def` functions of one worker may be scoring at once.",
    )
    max_pending: int = Field(
        64,
        ge=1,
        le=MAX_NUMBER,
        description="Groups awaiting their rewards in an actor; at so many it starts no others "
        "(`wait_rewards_s`).",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="Limit of one call of a function. Where a call does not end, its completions are asked about one by "
        "one: those without an answer are marked `error`, the others are scored without them.",
    )
    memory_gib: float = Field(
        4.0,
        gt=0,
        le=65_536,
        description="Memory that a worker and its children may use, not reserve, GiB; "
        "beyond it they are killed.",
    )
    max_error_fraction: float = Field(
        0.2, ge=0, le=1, description="The run stops when more than this share of samples fails."
    )
    skip_special_tokens: bool = Field(
        False,
        description="Leave special tokens, such as `<think>` in some models, out of the text; the end "
        "token always is.",
    )
