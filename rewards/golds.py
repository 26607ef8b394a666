"""Says what a row's `answer` may be: text, a number, or a list that holds one of these."""

from __future__ import annotations

import datetime
import decimal
import math
import numbers
from typing import Any

MAX_BITS = 1000  # Python's conversions between text and larger numbers fail.


def gold_texts(gold: Any) -> tuple[str, ...]:
    """Returns the ways to write a gold answer, stripped, the plainest first: ("72", "72.0") for the number
    72.0.

    Raises ValueError, with the reason, for a value that is not one answer: an object, several answers, true
    or false, no number.
    """
    gold = _unwrapped(gold)
    if isinstance(gold, bytes | bytearray):
        try:
            gold = bytes(gold).decode()
        except UnicodeDecodeError:
            raise ValueError(f"is {_shown(gold)}, bytes that are not UTF-8; write it as text") from None
    if isinstance(gold, str):
        if not gold.strip():
            raise ValueError("is empty")
        return (gold.strip(),)
    if isinstance(gold, bool):
        raise ValueError(
            f"is {str(gold).lower()}, neither text nor a number; write it as text, such as 'yes' or 'True'"
        )
    if isinstance(gold, datetime.date) and not isinstance(gold, datetime.datetime):
        return (gold.isoformat(),)
    if isinstance(gold, numbers.Real | decimal.Decimal):
        return _number_texts(gold)
    if isinstance(gold, list | tuple):
        raise ValueError(
            f"is a list of {len(gold)} ({_shown(gold)}), expected one answer; of a set, write "
            f"the set as text: {{1, 2}}"
        )
    kind = {dict: "an object", type(None): "null"}.get(type(gold), f"a {type(gold).__name__}")
    raise ValueError(f"is {kind} ({_shown(gold)}), expected text or a number")


def _unwrapped(gold: Any) -> Any:
    """Returns arrays and their scalars as Python's own values, and a list of one entry as that entry."""
    if hasattr(gold, "tolist"):
        gold = gold.tolist()
    while isinstance(gold, list | tuple) and len(gold) == 1:
        gold = _unwrapped(gold[0])
    return gold


def _number_texts(number: Any) -> tuple[str, ...]:
    if isinstance(number, int) and number.bit_length() > MAX_BITS:
        raise ValueError(f"is a whole number of {number.bit_length():,} bits; write it as text")
    if not math.isfinite(number):
        raise ValueError(f"is {number}, which is no number")
    written = f"{number:f}" if isinstance(number, decimal.Decimal) else str(number)
    whole = (str(int(number)),) if number == int(number) else ()
    return tuple(dict.fromkeys([*whole, written]))


def _shown(gold: Any) -> str:
    text = repr(gold)
    return text if len(text) <= 60 else text[:57] + "..."
