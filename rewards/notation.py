"""Rewrites an answer as LaTeX that math-verify reads the way a person meant it.

math-verify would read wrongly: units and currencies, thousands separators, mixed numbers, scales ("1.5
million"), percent written in words, equations on several lines, and lists in words. What is rewritten has the
same value.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from rewards.final_answer import bare, without_unit

SPACING = re.compile(r"\\[!]|\\(?:displaystyle|textstyle|limits|left|right)(?![A-Za-z])\.?")
"""Commands that change only how a formula looks."""

_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–—﹣", "-"),
        **dict.fromkeys("·⋅∙", r" \cdot "),
        **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u3000", " "),
        "×": r" \times ",
        "÷": "/",
        "∕": "/",
        "⁄": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "θ": r"\theta ",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}",
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_GAP = re.compile(r"(?<!\\)\\[;:,> ]|~|\\q?quad(?![A-Za-z])")
_STYLE = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:underline|mathbf|boldsymbol|bm|bf)(?![A-Za-z])")
_CONNECTED = re.compile(
    r"\s*,?\s*(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*,?\s*(and|or)\s*\}|(?<=\s)(and|or)(?=\s))\s*"
)
_INEQUALITY = re.compile(r"[<>]|\\[lg]e(?:q|qslant)?(?![A-Za-z])")
_ABOUT = re.compile(
    r"(?:\\text\s*\{\s*(?:approximately|approx\.?|about|around|roughly|nearly)\s*\}"
    r"|(?:approximately|about|around|roughly|nearly)\s)\s*",
    re.IGNORECASE,
)
_PERCENT_OF = re.compile(r"(\\frac\{[^{}]*\}\{[^{}]*\})\s*\\%")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{(?:align(?:ed)?|cases|gather(?:ed)?|split|equation)\*?\}")
_NEXT_LINE = re.compile(r"\s*\\\\\s*(?:&?\s*(=))?\s*&?")
_OUTWARD = re.compile(r"([\]\[(])([^\[\]()]+)[,;]([^\[\]()]+)([\])\[])")
_WHERE = re.compile(
    r"\s*,?\s*(?:\\text\s*\{\s*(?:where|for|with)\s*\})?\s*[a-z]\s*\\in\s*\\mathbb\s*\{?[ZNQR]\}?\s*$"
)
_SCALE = re.compile(
    r"(?<=\d)\s*(?:\\text\s*\{\s*)?\b(thousand|million|billion|trillion)\b(?:\s*\})?", re.IGNORECASE
)
_EXPONENTS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}|'|\\,|\\ | )\d{3})+(?![\d])(?!\s*/)")
_IN_BRACKETS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\{,\}|\\,|\\ | )\d{3})+(?![\d])(?!\s*/)")
_CURRENCY = re.compile(
    r"(?:\b(?:US|A|C|HK|NZ|R)|\\text\{(?:US)?)?\s*\\?\$\}?|[€£¥₹₩₽¢₪₫฿₴₺]"
    r"|\b(?:USD|EUR|GBP|CNY|JPY|INR)\b|\bRs\b\.?"
)
_PERCENT = re.compile(r"\s*(?:\\text\s*\{\s*)?\b(?:percent(?:age)?|per cent|pct)\b\s*\}?|(?<!\\)%")
_SCIENTIFIC = re.compile(r"(?<=\d)[eE]([+-]?\d+)(?![\w.])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)")
_MIXED = re.compile(r"(?<![\d.}^_])(-?)\s*(\d+)(?:\s+|\s+and\s+)(\d+)\s*/\s*(\d+)(?!\d)")
_MIXED_LATEX = re.compile(
    r"(?<![\d.}^_])(-?)\s*(\d+)\s*(?:\\text\s*\{\s*and\s*\}|and)?\s*\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}"
)
_LATEX_UNIT = re.compile(
    r"(?<=[\d})\]])\s*\\[dtc]?frac\s*\{\\(?:text|mathrm)\{[^{}]*\}\}\s*\{\\(?:text|mathrm)\{[^{}]*\}\}\s*$|"
    r"(?<=[\d})\]])\s*(?:\^\{?\\circ\}?)?\s*\\(?:text|mathrm|mbox|textrm|rm)"
    r"\s*\{(?!\s*(?:and|or|if)\b)[^{}]*\}(?:\^\{?-?\d\}?)?"
    r"(?:\s*/?\s*\\(?:text|mathrm)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?)*\s*$"
)
_DEGREES = re.compile(r"\s*\^\{?\s*\\circ\s*\}?\s*(?:[CFK]\b|\\text\s*\{[CFK]\}|\\mathrm\s*\{[CFK]\})?")
_ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{?\s*\\circ\s*\}?")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TEXT_OF_NUMBER = re.compile(r"\\text\s*\{([^{}]*\d[^{}]*)\}")
_MEMBER = re.compile(r"^\s*[A-Za-z]\s*\\in\s*(?!\\mathbb)")
_UPRIGHT = re.compile(r"\\(?:mathrm|operatorname|text)\s*\{\s*([ei])\s*\}")


@functools.lru_cache(maxsize=512)
def as_latex(text: str) -> str:
    """Returns LaTeX that math-verify reads the way the text was meant."""
    text = bare(_on_one_line(_STYLE.sub("", bare(text))))
    if about := _ABOUT.match(text):
        text = text[about.end() :]
    text = without_unit(_PERCENT.sub(r"\\%", text))
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match.group(1) or match.group(2)}}}", text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match.group().translate(_SUPERSCRIPTS)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS))
    text = SPACING.sub("", text)
    has_brackets = re.search(r"[(\[{]\s*[^(\[{}\])]*,", text.replace("{,}", "")) is not None
    text = (_IN_BRACKETS if has_brackets else _THOUSANDS).sub(
        lambda match: re.sub(r"\D", "", match.group()), text
    )
    text = (
        re.sub(r"\\[()]", "", text.replace("==", "="))
        .replace(r"\lbrace", r"\{")
        .replace(r"\rbrace", r"\}")
        .replace(r"\varnothing", r"\emptyset")
        .replace(r"\langle", "(")
        .replace(r"\rangle", ")")
        .replace(r"\degree", r"^\circ")
    )
    text = re.sub(r"\\lg(?![A-Za-z])", r"\\log_{10}", _UPRIGHT.sub(r"\1", _TEXT_OF_NUMBER.sub(r"\1", text)))
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times ", text)
    text = _CURRENCY.sub("", _GAP.sub(" ", text))
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = without_unit(_LATEX_UNIT.sub("", _DEGREES.sub("", text)))
    text = _REPEATING.sub(_repeating, _SCIENTIFIC.sub(r"\\times 10^{\1}", text))
    text = _MIXED_LATEX.sub(_mixed, _MIXED.sub(_mixed, _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)))
    text = _PERCENT_OF.sub(r"\\frac{\1}{100}", text)
    text = bare(_MEMBER.sub("", _WHERE.sub("", bare(_connected(text)))))
    return _OUTWARD.sub(_inward, text) if _OUTWARD.fullmatch(text) else text


def _on_one_line(text: str) -> str:
    """Joins equations that stand below each other into a list, or into one equation that goes on."""
    if not _ENVIRONMENT.search(text):
        return re.sub(r"\s*\\\\\s*$", "", text)
    inside = re.sub(r"\s*\\\\\s*$", "", _ENVIRONMENT.sub("", text).strip())
    return _NEXT_LINE.sub(lambda match: " = " if match.group(1) else ", ", inside).replace("&", "")


def _connected(text: str) -> str:
    """Turns answers listed in words into a list; alternative inequalities stay alternatives."""
    parts = _CONNECTED.split(text)[::3]
    words = {match.group(1) or match.group(2) for match in _CONNECTED.finditer(text)}
    return (r" \lor " if words == {"or"} and all(map(_INEQUALITY.search, parts)) else ", ").join(parts)


def _inward(match: re.Match[str]) -> str:
    """Writes an open interval in the French form, ]1, 2[, as (1, 2)."""
    opened, first, second, closed = match.groups()
    if opened != "]" and closed != "[":
        return match.group()
    return f"{opened.replace(']', '(')}{first}, {second}{closed.replace('[', ')')}"


def scaled(text: str) -> str:
    """Writes a scaled number, such as 1.5 million, in digits."""
    return _SCALE.sub(lambda match: rf" \times 10^{{{_EXPONENTS[match.group(1).lower()]}}}", text)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    scale = 10 ** len(fixed)
    period = scale * (10 ** len(repeated) - 1)
    return rf"\frac{{{int((whole or '0') + fixed) * (period // scale) + int(repeated)}}}{{{period}}}"


def _mixed(match: re.Match[str]) -> str:
    sign, whole, above, below = match.groups()
    is_mixed = int(above) < int(below)  # 2 3/2 is none.
    return rf"{sign}\frac{{{int(whole) * int(below) + int(above)}}}{{{below}}}" if is_mixed else match.group()
