"""Says what an answer means: texts are compared as mathematics by math-verify (sympy), and each has one
canonical way to be written.

`rewards.notation` rewrites formulas as LaTeX that math-verify reads as they were meant. What math-verify
cannot compare is compared here: dates, ratios, choices, words, and equations whose sides are not equal. No
call here is bounded in time; `rewards.bounded` does that.
"""

from __future__ import annotations

import datetime
import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import sympy
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from rewards.final_answer import bare, is_date
from rewards.notation import SPACING, as_latex, scaled

# Without timeouts math-verify warns once a process. Its timeouts use signals, which only a main thread may.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_CHOICE = re.compile(r"\(?\s*([A-Ja-j])\s*\)?[.:)]?")
_CHOICE_AND_VALUE = re.compile(r"(?:\(([A-J])\)|([A-J])[).:])\s*((?!and\b|or\b|[,;&])(?!.*\([A-J]\))\S.*)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|bf|rm)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[Nn][Oo]|[^\W\d_][^\W\d_'’.-]{2,}(?:[\s-]+[^\W\d_'’.]+)*")
_FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|inf|infinity|theta)", re.IGNORECASE)
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_TIME = re.compile(r"(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?")
_BASED = re.compile(r"([0-9][0-9A-Fa-f]*)_\{?(\d{1,2})\}?")
_TOWER = re.compile(
    r"\d\s*(?:\^|\*\*)[\s{(]*(?:\\left\s*\()?\s*(\d{1,9})\s*(?:\^|\*\*)[\s{(]*(?:\\left\s*\()?\s*(\d{1,9})"
)
_HUGE = re.compile(r"\d\s*\^\s*\{?\s*\d{8}|(?<!\d)\d{5,}\s*!|\\[dt]?binom\s*\{?\s*\d{6}|\d{4000}")
_EQUALS = re.compile(r"(?<![\\<>!:=])=(?!=)")
_INNER_EQUALS = re.compile(r"(?<=[_^])\{[^{}]*=[^{}]*\}")  # \sum_{k=1}
_APPROX = re.compile(r"\\(?:approx|simeq|sim)(?![A-Za-z])|\\doteq")
_LABEL = re.compile(
    r"(?:\\(?:text|vec|overrightarrow)\s*\{[^{}]*\}"
    r"|\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\s*\(\s*[A-Za-z0-9,\s]+\s*\))?"
    r"|\\angle\s*[A-Z]+|[A-Za-z][A-Za-z\s]*)"
)


def equal(gold: str, answer: str) -> bool:
    """Returns whether `answer` says what `gold` says.

    Fractions, decimals (6 places), sets, intervals and percentages are compared by value. Units are ignored.
    Words, dates and choices are compared as they are written. All sides of an equation must be equal. Raises
    ValueError when `gold` cannot be read.
    """
    check_gold(gold)
    if plain(gold) == plain(answer):
        return True
    in_digits = scaled(gold), scaled(answer)
    if in_digits != (gold, answer) and equal(*in_digits):
        return True
    if choice := _choice(gold):
        return choice == (_choice(answer) or _choice_before_value(answer)[0])
    value = _choice_before_value(answer)[1]
    if value is not None:
        return equal(gold, value)
    if (written := _as_written(gold)) is not None:
        return written == _as_written(answer) or _proportional(gold, answer)
    if _as_written(answer) is not None:
        return False
    return _equal_values(as_latex(gold), as_latex(answer))


def check_gold(gold: str) -> None:
    """Raises ValueError when `gold` is neither a choice nor words nor a formula that can be read."""
    if (
        _choice(gold)
        or _as_written(gold) is not None
        or any(_read(side) is not None for side in _sides(as_latex(gold)))
    ):
        return
    raise ValueError("cannot be read as mathematics; for words use exact_match")


def canonical(answer: str) -> str:
    """Returns the one way to write what `answer` says, the same text for equal answers. A text that cannot be
    read stays as it is.
    """
    if choice := _choice(answer) or _choice_before_value(answer)[0]:
        return choice
    if (written := _as_written(answer)) is not None:
        return written
    formula = as_latex(scaled(answer))
    sides = _sides(formula)
    if _BASED.fullmatch(formula) or not _agree(sides):
        return plain(answer)
    is_equation = len(sides) == 2 and any(getattr(_read(side), "free_symbols", None) for side in sides)
    expression = _read(formula if is_equation else sides[-1])
    return plain(answer) if expression is None else _written(expression)


def is_too_large(text: str) -> bool:
    """Returns whether a text shows that its numbers have millions of digits. Growth that does not show is
    ended by its time limit.
    """
    powers = ((int(base), int(exponent)) for base, exponent in _TOWER.findall(text))
    return _HUGE.search(text) is not None or any(
        exponent * math.log10(max(base, 1)) > 7 for base, exponent in powers
    )


def plain(text: str) -> str:
    """Returns the text without what never matters: spaces, delimiters, the kind of fraction, the case of
    words.
    """
    text = re.sub(r"\\[dtc]frac", r"\\frac", SPACING.sub("", bare(text)))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", _TEXT.sub(lambda match: match.group(1).strip().lower(), text))


def warm_up() -> None:
    """Reads and compares a few formulas, so that the parser's tables and sympy's caches exist before the
    first real call.
    """
    for gold, answer in (
        (r"\frac{1}{3}+\sqrt{2}", "x^2-1=3"),
        ("(1,2]", r"\{1, 2\}"),
        ("2x+1", r"3.5\pi"),
        ("1.5", r"50\%"),
        (r"\sum_{k=1}^{3} k", r"\int_0^1 x dx"),
    ):
        equal(gold, answer)
        canonical(answer)


# --- Words, dates, ratios, choices ---


def _choice(text: str) -> str | None:
    match = _CHOICE.fullmatch(re.sub(r"^(?:option|choice)\s+", "", _untexted(text), flags=re.IGNORECASE))
    # A small letter is a choice only in parentheses: else it is a variable.
    return match.group(1).upper() if match and (match.group(1).isupper() or "(" in match.group()) else None


def _choice_before_value(text: str) -> tuple[str | None, str | None]:
    """Returns the choice and the value in a text such as "(B) 72": B and 72."""
    match = _CHOICE_AND_VALUE.fullmatch(_untexted(text))
    return (match.group(1) or match.group(2), match.group(3)) if match else (None, None)


def _as_written(text: str) -> str | None:
    """Returns words, a date or a ratio in one way of writing, and None for a formula."""
    text = _untexted(text)
    if is_date(text):
        return _date(text)
    if _TIME.fullmatch(text) or (_RATIO.fullmatch(text) and text.count(":") > 1):
        return re.sub(r"\s", "", text)
    if _WORDS.fullmatch(text) and not _FUNCTION.fullmatch(text):
        return " ".join(text.lower().replace("-", " ").split())
    return None


def _untexted(text: str) -> str:
    return bare(_TEXT.sub(r"\1", bare(text)))


def _date(text: str) -> str:
    """Returns a date in ISO form where the order of day and month is beyond doubt."""
    words = re.sub(r"(?<=\d)(?:st|nd|rd|th)|[.,](?=\s)", "", text)
    words = re.sub(r"\b([A-Za-z]{3})[a-z]*\b", r"\1", words)
    for form in ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%b %d %Y", "%d %b %Y"):
        try:
            return datetime.datetime.strptime(words, form).date().isoformat()
        except ValueError:
            continue
    if re.search("[apAP]", words):  # It is a time of day.
        return re.sub(r"[\s.]", "", text.lower())
    return "-".join(part.lstrip("0") for part in re.split(r"[-/.]", words))


def _proportional(gold: str, answer: str) -> bool:
    """Returns whether both texts are ratios (not times of day) of the same proportion."""
    texts = [re.sub(r"\s", "", _untexted(text)) for text in (gold, answer)]
    if not all(map(_RATIO.fullmatch, texts)) or any(map(_TIME.fullmatch, texts)):
        return False
    first, second = ([int(part) for part in text.split(":")] for text in texts)
    return len(first) == len(second) and all(
        a * second[0] == b * first[0] for a, b in zip(first, second, strict=True)
    )


# --- Formulas ---


@functools.lru_cache(maxsize=512)
def _read(formula: str) -> Any:
    """Returns the sympy expression of a formula, or None where there is none."""
    if not formula:
        return None
    if r"\lor" in formula:
        relations = [_read(part.strip()) for part in formula.split(r"\lor")]
        is_one_variable = (
            len(set().union(*(getattr(relation, "free_symbols", ()) for relation in relations))) == 1
        )
        is_known = is_one_variable and all(isinstance(relation, Relational | And) for relation in relations)
        return sympy.Union(*(relation.as_set() for relation in relations)) if is_known else None
    # In a box, math-verify reads all of it as LaTeX. It must not look for a part that it can read where it
    # cannot read the whole.
    boxed, latex = rf"\boxed{{{formula}}}", [LatexExtractionConfig()]
    found = parse(
        boxed, latex, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None
    )
    return found[0] if found and not isinstance(found[0], str) else None


def _sides(formula: str) -> list[str]:
    """Returns the sides of an equation without a name at either end; a single side for no equation, for
    several, or for a curve.
    """
    if re.search(r"[,;]|\\text\s*\{\s*(?:and|or)|\\[lg]e|[<>]", formula):
        return [formula]
    masked = _INNER_EQUALS.sub(lambda match: match.group().replace("=", "\0"), _APPROX.split(formula)[0])
    sides = [bare(side.replace("\0", "=")) for side in _EQUALS.split(masked)]
    while len(sides) > 1 and (_LABEL.fullmatch(sides[0]) or not sides[0]):
        sides = sides[1:]
    if len(sides) > 1 and re.fullmatch(r"[A-Za-z]", sides[-1]):
        sides = sides[:-1]
    return sides


def _agree(sides: list[str]) -> bool:
    """Returns whether all sides that are numbers are the same number."""
    numbers = [
        expression
        for side in sides
        if (expression := _read(side)) is not None and not getattr(expression, "free_symbols", True)
    ]
    return all(verify(numbers[0], other, timeout_seconds=None) for other in numbers[1:])


def _equal_values(gold: str, answer: str) -> bool:
    if (bases := (_BASED.fullmatch(gold), _BASED.fullmatch(answer))) and bases[0] and bases[1]:
        return _in_base(*bases[0].groups()) == _in_base(*bases[1].groups())
    if gold.endswith(r"\%") != answer.endswith(r"\%") and _verified(
        gold.removesuffix(r"\%"), answer.removesuffix(r"\%")
    ):
        return True  # The question asked for percent, and one side left the sign out.
    gold_sides, sides = _sides(gold), _sides(answer)
    if not _agree(sides):
        return False
    if _EQUALS.search(gold) and _EQUALS.search(answer):
        if _verified(gold, answer):
            return True
        names = {_name(gold), _name(answer)}
        if len(names) == 2 and None not in names:
            return False  # x = 1 is not y = 1.
    if len(gold_sides) > 1 and getattr(_read(gold_sides[0]), "free_symbols", None):
        return False  # x^2 + y^2 = 4 is not 4.
    if _verified(gold_sides[-1], sides[-1]):
        return True
    about = [bare(part) for part in _APPROX.split(answer)]
    return len(about) == 2 and _is_rounded(*about) and _verified(gold_sides[-1], about[1])


def _in_base(digits: str, base: str) -> int | str:
    try:
        return int(digits, int(base))
    except ValueError:
        return f"{digits}_{base}"


def _name(formula: str) -> str | None:
    """Returns the name that a formula assigns to: x in "x = 5"."""
    match = re.fullmatch(r"\s*([A-Za-z])\s*=[^=]*", formula)
    return match.group(1) if match else None


def _is_rounded(exact: str, rounded: str) -> bool:
    """Returns whether one number stands for the other because they differ by less than 1 %."""
    first, second = _read(_sides(exact)[-1]), _read(rounded)
    if (
        first is None
        or second is None
        or getattr(first, "free_symbols", True)
        or getattr(second, "free_symbols", True)
    ):
        return False
    exact_value, value = complex(first.evalf()), complex(second.evalf())
    return abs(exact_value - value) <= 0.01 * abs(exact_value)


def _verified(gold: str, answer: str) -> bool:
    expected, found = _read(gold), _read(answer)
    if expected is None or found is None:
        return False
    return bool(verify(expected, found, timeout_seconds=None, allow_set_relation_comp=True))


# --- One way of writing ---


def _written(expression: Any) -> str:
    if isinstance(expression, FiniteSet | sympy.FiniteSet):
        return _members(expression.args)
    if isinstance(expression, sympy.Tuple):
        return f"({', '.join(map(_written, expression.args))})"
    if isinstance(expression, sympy.Union):
        return " or ".join(sorted(map(_written, expression.args)))
    if isinstance(expression, sympy.Interval):
        opened, closed = "[("[bool(expression.left_open)], "])"[bool(expression.right_open)]
        return f"{opened}{_written(expression.start)}, {_written(expression.end)}{closed}"
    if isinstance(expression, sympy.MatrixBase):
        return f"[{'; '.join(', '.join(map(_written, row)) for row in expression.tolist())}]"
    if isinstance(expression, Relational | And):
        return _relation(expression)
    return str(expression) if isinstance(expression, sympy.Set) else _scalar(expression)


def _members(members: Sequence[Any]) -> str:
    """Returns a set of values; where several names are given values, the names come along: {x = 1, y = 2}."""
    equations = [member for member in members if isinstance(member, sympy.Eq)]
    names = {equation.lhs for equation in equations}
    with_name = len(names) > 1
    named = {
        f"{member.lhs} = {_written(member)}" if with_name and member in equations else _written(member)
        for member in members
    }
    written = sorted(named)
    return written[0] if len(written) == 1 else f"{{{', '.join(written)}}}"


def _relation(relation: Any) -> str:
    """Returns an assignment as its value, an inequality in one variable as an interval, any other relation as
    one with 0.
    """
    if isinstance(relation, sympy.Eq) and relation.lhs.is_Symbol:
        return _written(relation.rhs)
    if not isinstance(relation, sympy.Eq) and len(relation.free_symbols) == 1:
        return _written(relation.as_set())
    if isinstance(relation, And):
        return " and ".join(sorted(map(_written, relation.args)))
    if relation.rel_op in (">", ">="):
        relation = relation.reversed
    difference = relation.lhs - relation.rhs
    ways = [_scalar(difference)] + [_scalar(-difference)] * (relation.rel_op in ("==", "!="))
    return f"{min(ways)} {relation.rel_op} 0"


def _scalar(expression: Any) -> str:
    expression = sympy.nsimplify(
        expression.doit().replace(
            lambda part: isinstance(part, sympy.UnevaluatedExpr), lambda part: part.args[0]
        ),
        rational=True,
    )
    if expression.is_number:
        return _number(expression)
    expression = sympy.simplify(sympy.expand(sympy.cancel(sympy.together(expression))))
    return str(sympy.expand(expression)) if not expression.is_number else _number(expression)


def _number(number: Any) -> str:
    """Writes a number with six decimals, as numbers are compared; a number nearer to 0 gets 12 digits."""
    if number.is_Integer or not number.is_finite:
        return str(number)
    value = complex(number.evalf(30, chop=True))
    parts = [
        f"{part:.12g}" if 0 < abs(part) < 1e-3 else f"{part:.6f}".rstrip("0").rstrip(".")
        for part in (value.real, value.imag)
    ]
    return parts[0] if not value.imag else f"{parts[0]} + {parts[1]}*I"
