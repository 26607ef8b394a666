"""The section `data` of a config: where prompts come from, and how rows become prompts."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from core.config.section import MAX_TOKENS, Section, shown
from core.text import option_of


class DataConfig(Section):
    """Prompts: local jsonl or parquet (file or directory) or a hub id, read by `datasets`."""

    path: str | None = Field(
        None,
        min_length=1,
        description="Training prompts: a jsonl/parquet file, a directory with `<split>.jsonl`/`.parquet`, a "
        "hub id (`id:subset`), or "
        "`reasoning_gym:FAMILY?size=1000` (generated on the spot). `PATH?split=validation` takes another split than "
        "`train`. Needed unless all samples come from `offline`.",
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
    system_prompt: str | None = Field(
        None, description="System message put before every prompt (chat template only)."
    )
    max_prompt_tokens: int = Field(
        512, ge=1, le=MAX_TOKENS, description="Longer prompts are bad rows: reported, never cut."
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="`skip` leaves bad rows out and counts them."
    )
    offline: str | None = Field(
        None,
        min_length=1,
        description="Generations of anybody to train on: jsonl/parquet with prompt, completion and, if "
        "given, reward and group. `PATH?share=0.25` takes that share of each group from it and generates the rest; without "
        "it no sample is generated.",
    )

    @property
    def offline_share(self) -> float:
        """Share of each group that comes from `offline`, above 0; 1: no sample is generated."""
        _, share = option_of(self.offline or "", "share")
        return 1.0 if share is None else float(share)

    @property
    def offline_source(self) -> str | None:
        """The log that `offline` names, without `?share=...`; None: there is none."""
        return None if self.offline is None else option_of(self.offline, "share")[0]

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
