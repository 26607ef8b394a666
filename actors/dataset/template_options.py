"""Tells which options of `data.template_options` a chat template does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from core.config.data import GIVEN


def option_notes(tokenizer: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields a warning for each option that the tokenizer's chat template never asks for."""
    if not options:
        return
    known = _variables(tokenizer)
    if known is None:
        yield (
            f"warning: data.template_options = {dict(options)}: whether this tokenizer's template knows them "
            "cannot be told, since it is no Jinja template"
        )
        return
    own = sorted(known - {*GIVEN, "bos_token", "eos_token", "pad_token", "unk_token"})
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, own, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it asks for {', '.join(own) or 'none'}"
            yield f"warning: data.template_options: the chat template knows no {name!r} and ignores it; {hint}"


def _variables(tokenizer: Any) -> set[str] | None:
    """Returns the names that the template asks for and does not set; None where it is no Jinja template."""
    from jinja2 import meta
    from transformers.utils import chat_template_utils

    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = "\n".join(template.values())
    if not isinstance(template, str):
        return None
    try:
        environment = chat_template_utils._compile_jinja_template("").environment
        return set(meta.find_undeclared_variables(environment.parse(template)))
    except Exception:  # noqa: BLE001 -- a broken template is told where it is rendered
        return None
