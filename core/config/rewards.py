"""The section `rewards` of a config: the reward functions, and the processes that run them."""

from __future__ import annotations

from pydantic import Field

from core.config.section import MAX_TIMEOUT_S, Section


class RewardsConfig(Section):
    """Reward functions, run in killable worker processes."""

    functions: dict[str, float] = Field(
        ...,
        min_length=1,
        description="Functions and their weights; the reward is the weighted sum. A name is built in (`exact_match`, "
        "`math_verify`) or `module:function`; `'module:function?messages'` gets prompts and completions as lists of messages, "
        "as one does whose annotation of `completions` says so, and not as text.",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="A group not scored within this is killed and marked `error`.",
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
