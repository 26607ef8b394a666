"""The section `data` of a config: where prompts come from, and how rows become prompts."""

from __future__ import annotations

import math
import re
from collections import Counter
from fractions import Fraction
from typing import Any, Literal

import pydantic
from pydantic import Field

from core.config.section import MAX_TOKENS, Section, shown
from core.config.text import strange_character
from core.text import option_of

_SHARES_EXAMPLE = "for example {train.jsonl: 0.7, 'reasoning_gym:chain_sum': 0.3}"
MAX_PERIOD = 10_000
"""Of the pattern in which sources take turns: prompts after which each has had its share exactly."""

GIVEN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict")
"""What every chat template is given by itself, or the function that renders it: no options."""
OF_TOKENIZER = (
    "conversation",
    "chat_template",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)
"""What else the tokenizer's `apply_chat_template` takes for itself, which no template sees."""


class DataConfig(Section):
    """Prompts: local jsonl or parquet (file or directory) or a hub id, read by `datasets`."""

    path: str | dict[str, float] | None = Field(
        None,
        description="Training prompts: a jsonl/parquet file, a directory with `<split>.jsonl`/`.parquet`, a "
        "hub id (`id:subset`), or "
        "`reasoning_gym:FAMILY?size=1000` (generated on the spot). `PATH?split=validation` takes another split than "
        "`train`. Several with their shares: `{PATH: 0.7, OTHER: 0.3}`. Needed unless all samples come from `offline`.",
    )
    eval_path: str | None = Field(
        None,
        min_length=1,
        description="Held-out prompts, like `path`, of which the split is `test` unless `?split=` says otherwise; None: those "
        "of the same `path`.",
    )
    eval_rows: int = Field(
        128, ge=0, description="Held-out rows evaluated, the first so many; 0 switches evaluation off."
    )
    chat_template: bool = Field(
        True, description="Render prompts with the tokenizer's chat template; off: the text as it is."
    )
    template_options: dict[str, Any] = Field(
        {},
        description="What the chat template is asked for besides messages and tools, for example `{enable_thinking: false}`. "
        "An option that it does not know is told at the start.",
    )
    columns: dict[str, str] = Field(
        {},
        description="Where the rows keep what has another name there: `{answer: reward_model.ground_truth, prompt: "
        "extra.question}`; dots go into objects and, by number, lists. Rewards and environments get it under its name here.",
    )
    system_prompt: str | None = Field(
        None, description="System message put before every prompt (chat template only)."
    )
    max_prompt_tokens: int = Field(
        512, ge=1, le=MAX_TOKENS, description="Longer prompts are bad rows: reported, never cut."
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="`skip` leaves bad rows out and counts them."
    )
    curriculum: int | str | None = Field(
        None,
        description="Prompts solved in all of their last so many visits rest, for a growing number of epochs: `2`. A visit is "
        "solved when all samples have the highest reward so far, or at least that of `2?reward=0.9`. None: no prompt rests.",
    )
    offline: str | None = Field(
        None,
        min_length=1,
        description="Generations of anybody to train on: jsonl/parquet with prompt, completion and, if "
        "given, reward and group. `PATH?share=0.25` takes that share of each group from it and generates the rest; without "
        "it no sample is generated.",
    )

    @property
    def sources(self) -> dict[str, int]:
        """The sources of `path` and their shares in whole numbers, by name: how a file orders them means
        nothing.
        """
        if not isinstance(self.path, dict):
            return {} if self.path is None else {self.path: 1}
        shares = {name: Fraction(repr(share)) for name, share in sorted(self.path.items())}
        scale = math.lcm(*(share.denominator for share in shares.values()))
        whole = {name: int(share * scale) for name, share in shares.items()}
        return {name: share // math.gcd(*whole.values()) for name, share in whole.items()}

    @property
    def source_labels(self) -> tuple[str, ...]:
        """A short name of each of `sources`, for metrics: `chain_sum`, `train`, `train-2`."""
        seen: Counter[str] = Counter()
        labels = []
        for name in self.sources:
            last = re.split(r"[/:]", name.partition("?")[0].rstrip("/"))[-1]
            label = re.sub(r"\.(jsonl|parquet)$", "", last)
            seen[label] += 1
            labels.append(label if seen[label] == 1 else f"{label}-{seen[label]}")
        return tuple(labels)

    @property
    def curriculum_visits(self) -> int | None:
        """Solved visits after which a prompt rests; None: never."""
        return None if self.curriculum is None else int(option_of(str(self.curriculum), "reward")[0])

    @property
    def curriculum_reward(self) -> float | None:
        """The reward from which on a sample is solved; None: the highest so far."""
        _, reward = option_of(str(self.curriculum), "reward")
        return None if reward is None else float(reward)

    @property
    def offline_share(self) -> float:
        """Share of each group that comes from `offline`, above 0; 1: no sample is generated."""
        _, share = option_of(self.offline or "", "share")
        return 1.0 if share is None else float(share)

    @property
    def offline_source(self) -> str | None:
        """The log that `offline` names, without `?share=...`; None: there is none."""
        return None if self.offline is None else option_of(self.offline, "share")[0]

    @pydantic.field_validator("path", mode="before")
    @classmethod
    def _path_is_there(cls, value: Any) -> Any:
        if isinstance(value, dict):
            _check_shares(value)
        elif value == "" or not isinstance(value, str | None):
            raise ValueError(
                f"data.path = {shown(value)}: expected a path or a hub id that is not empty, or several of them "
                f"with their shares, {_SHARES_EXAMPLE}"
            )
        return value

    @pydantic.field_validator("template_options", mode="after")
    @classmethod
    def _options_are_the_templates(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            why = "" if name.isidentifier() else "is no name of an option"
            if name in GIVEN:
                why = "is given to every template by itself"
            if name in OF_TOKENIZER:
                why = "is an argument of the tokenizer's apply_chat_template, which no template sees"
            if why:
                raise ValueError(
                    f"data.template_options: {shown(name)} {why}; expected names of the template's own, for example "
                    "{enable_thinking: false}"
                )
        return value

    @pydantic.field_validator("columns", mode="after")
    @classmethod
    def _columns_are_paths(cls, value: dict[str, str]) -> dict[str, str]:
        for name, path in value.items():
            if not name or not all(path.split(".")):
                raise ValueError(
                    f"data.columns: {shown(name)}: {shown(path)} is no path of keys with dots between them, for "
                    "example {answer: reward_model.ground_truth}"
                )
        return value

    @pydantic.field_validator("curriculum", mode="before")
    @classmethod
    def _visits_are_counted(cls, value: Any) -> Any:
        visits, reward = option_of(str(value), "reward")
        is_known = not isinstance(value, bool) and bool(re.fullmatch(r"[1-9]\d{0,3}", visits))
        try:
            is_known = is_known and (reward is None or math.isfinite(float(reward)))
        except ValueError:
            is_known = False
        if value is not None and not is_known:
            raise ValueError(
                f"data.curriculum = {shown(value)}: expected a number of visits from 1 to 9999, with a finite reward if that is "
                "known, for example 2 or 2?reward=0.9"
            )
        return value if value is None or reward is not None else int(visits)

    @pydantic.field_validator("offline", mode="after")
    @classmethod
    def _share_is_one(cls, value: str | None) -> str | None:
        source, share = option_of(value or "", "share")
        try:
            is_share = share is None or (source != "" and 0 < float(share) <= 1)
        except ValueError:
            is_share = False
        if not is_share:
            raise ValueError(
                f"data.offline = {shown(value)}: expected a log and a share above 0 and at most 1, for example log.jsonl?share=0.25"
            )
        return value


def _check_shares(value: dict[Any, Any]) -> None:
    """Raises ValueError unless every source has a name and a share above 0, and the shares are round ones."""
    if not value:
        raise ValueError(f"data.path = {{}}: expected paths and their shares, {_SHARES_EXAMPLE}")
    for name, share in value.items():
        if not isinstance(name, str) or not name or (strange := strange_character(name, is_prose=False)):
            raise ValueError(
                f"data.path: {shown(name)} is no path{f': {strange}' if name else ''}; {_SHARES_EXAMPLE}"
            )
        if type(share) not in (int, float) or not 0 < share <= MAX_PERIOD:
            raise ValueError(
                f"data.path: the share of {name} is {shown(share)}, expected a number above 0, {_SHARES_EXAMPLE}"
            )
    shares = [Fraction(repr(share)) for share in value.values()]
    scale = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * scale) for share in shares]
    if (period := sum(whole) // math.gcd(*whole)) > MAX_PERIOD:
        raise ValueError(
            f"data.path: the shares {', '.join(map(str, value.values()))} come out exactly only after {period:,} "
            f"prompts; round them, so that it is at most {MAX_PERIOD:,}"
        )
