"""`math_verify`: a completion's last \\boxed{} or final answer, compared with the gold answer as mathematics (sympy).

The comparison is math-verify's. Here is only which part of a text is the answer:

    1. the last complete \\boxed{...}                 (a box that never closes was cut: no answer)
    2. else the rest of the last line with `#### `    (the form of GSM8K)
    3. else a text of one line without words or $ is an expression as a whole
    4. else what math-verify finds: "the final answer is ...", then the last formula or number
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import parse, verify

# Without timeouts math-verify warns once a process. Its timeouts use signals, which only a main thread may; the pool kills instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_HASHES = re.compile(r"####[ \t]*(.*)")
_NAME_ARGUMENT = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MATH_DELIMITER = re.compile(r"\$|\\\(|\\\[")
_THOUSANDS_GAP = re.compile(r"(?<=\d)(?:\\,|\\ |\{,\}| )(?=\d{3}(?!\d))")
_SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d+)(?![\w.])")
_TRAILING_UNIT = re.compile(r"(?<=[\d}])\s+[A-Za-z]{3,}(?:\s+[A-Za-z]+)*\.?$")


def math_verify(prompts: list[str], completions: list[str], *, answer: list[Any], **columns: list[Any]) -> list[float | None]:
    """1.0 where the completion's answer equals the row's `answer`; else 0.0, also for a completion without a readable answer.

    Fractions, decimals (6 places), sets, intervals, equations and percentages are compared by value; units are ignored.
    An expression that sympy cannot compare is not equal. Raises ValueError when `answer` cannot be read as mathematics.
    """
    return [float(_equal(str(gold), completion)) for completion, gold in zip(completions, answer, strict=True)]


def _final_answer(completion: str) -> str | None:
    """The text of the completion's answer; None when there is none to read."""
    expressions = _parse_answer(completion)
    return str(expressions[-1]) if expressions else None


math_verify.answer = _final_answer  # type: ignore[attr-defined]


def _equal(gold: str, completion: str) -> bool:
    # Parsed first: a gold answer that cannot be read is an error even for an empty completion.
    gold_expressions = _parse_gold(gold)
    expressions = _parse_answer(completion)
    return bool(expressions) and verify(gold_expressions, expressions, timeout_seconds=None)


@functools.lru_cache(maxsize=64)
def _parse_gold(gold: str) -> list[Any]:
    expressions = _parse_answer(gold)
    if not expressions:
        shown = gold if len(gold) <= 60 else "..." + gold[-57:]
        raise ValueError(f"the gold answer {shown!r} cannot be read as mathematics; for words use exact_match")
    return expressions


@functools.lru_cache(maxsize=256)  # A completion is read for its reward and again for its vote.
def _parse_answer(text: str) -> list[Any]:
    """What math-verify reads in the answer part of `text`: a sympy expression and its source; empty when there is none."""
    if r"\boxed{" in text:
        content = _last_boxed(text)
        return [] if content is None else _parse_formula(content)
    hashes = _HASHES.findall(text)
    if hashes:
        return _parse_formula(hashes[-1])
    line = text.strip()
    if not ("\n" in line or _MATH_DELIMITER.search(line) or _WORD.search(_NAME_ARGUMENT.sub("", line))):
        return _parse_formula(line)
    return parse(text, parsing_timeout=None)


def _parse_formula(formula: str) -> list[Any]:
    """A formula without delimiters. In a box, math-verify reads all of it as LaTeX; outside it would search it for a number."""
    formula = _TRAILING_UNIT.sub("", formula.strip().strip("$").strip())
    formula = _SCIENTIFIC.sub(r"\\times 10^{\1}", _THOUSANDS_GAP.sub("", formula))
    return parse(rf"\boxed{{{formula}}}", parsing_timeout=None) if formula else []


def _last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...}, braces balanced; the outer one of nested boxes; None if none closes."""
    content, start = None, text.find(r"\boxed{")
    while start != -1:
        begin = start + len(r"\boxed{")
        end = _closing_brace(text, begin)
        if end is not None:
            content = text[begin:end]
        start = text.find(r"\boxed{", begin if end is None else end)
    return content


def _closing_brace(text: str, begin: int) -> int | None:
    depth = 1
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)  # \{ and \} are characters of a set, not braces
        if depth == 0:
            return match.start()
    return None
