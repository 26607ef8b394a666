"""The base of all sections of a config, and the limits of what they hold."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from core.config import text as config_text

PROSE = frozenset({"system_prompt"})
"""Fields of free text: they may hold line breaks, and a ` #` in a file is taken for text before it is
taken for a comment.
"""
MAX_NUMBER = 1 << 32
"""Of every setting, unless its field says less: what is above is a slip of the hand, and some library
takes 32 bits.
"""
MAX_TOKENS = 2**27
"""Of a sequence, or a forward pass: ten times the longest context of any model."""
MAX_PROCESSES = 10_000
"""Of one kind: more than any cluster runs of one job."""
LEAST_SHARE = 1e-4
"""Of a CPU or a GPU: Ray counts in these, and refuses less."""
MAX_TIMEOUT_S = 2e6
"""23 days: what sockets and event loops take, whose limit is 2^31 ms."""


def shown(value: Any) -> str:
    """Returns `repr` of at most 80 characters, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, numbers not guessed from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _value_is_usual(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Text without characters that nobody sees, numbers within reason."""
        found = ""
        if isinstance(value, str):
            found = config_text.strange_character(value, is_prose=info.field_name in PROSE)
        elif isinstance(value, int | float) and not abs(value) < MAX_NUMBER:
            found = f"expected a number below {MAX_NUMBER:,}"
        if found:
            raise PydanticCustomError("unusual", "{found}", {"found": found})
        return value
