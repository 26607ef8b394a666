"""Finds the part of a completion that is its answer: text in, text out, in one pass. `rewards.formulas` says
what the part means.

The answer is looked for outside <think>, and within the last <answer> where there is one. It is the first of
these that exists:

1. the last \\boxed{...} that is complete and not empty, with its neighbours (`\\boxed{1} and \\boxed{2}`)
2. the text behind the last `#### ` that is no Markdown heading (the form of GSM8K)
3. the whole text, or its last line, where that is a formula without prose
4. what follows "the answer is", "Answer:" or "答案是"
5. the last formula or number
"""

from __future__ import annotations

import itertools
import re

TAIL_CHARS = 10_000  # An answer outside boxes is looked for in so many of the last characters;
LINE_CHARS = 1_000  # and no longer line is an answer.

_THINKING_TAG = re.compile(
    r"<(/?)(?:think|thinking|thought|reasoning|seed:think)>"
    r"|\[(/?)THINK\]|◁(/?)think▷|<\|(?:begin|(end))_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>|</answer>).)*)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\(boxed|fbox)\s*(-?\d+(?:[.,/]\d+)*|[A-J]\b|\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})")
_BRACE = re.compile(r"\\\\|\\[{}]|\\(?:boxed|fbox)\s*\{|[{}]")
_PLACEHOLDER = re.compile(
    r"(?:\\(?:text|mathrm)\s*\{)?\s*(?:(?:your |the |final )*answer(?: "
    r"here)?|\.{2,}|…|\\[lc]?dots|\?|_+|)\s*\}?",
    re.IGNORECASE,
)
_LEAD = re.compile(r"\\(?:text|mathrm|textbf)\s*\{[^{}]*(?:\b(?:is|are|equals)|[:=])\s*\}")
_LISTED = re.compile(
    r"[\s$,;]*(?:\\\)|\\\]|\\text\s*\{\s*)?(?:,|;|\band\b|\bor\b|和|或)"
    r"[\s$,;}]*(?:\\\(|\\\[)?\s*(?:[A-Za-z]\w?\s*=\s*)?\$?\s*"
)

_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_NUMBERED_HEADING = re.compile(r"\d+[.):]\s+[^\W\d]")
_PHRASE = re.compile(
    r"(?:\b(?:answers?|results?|solutions?|(?:correct|right) (?:option|choice))\b(?![^\n.]{0,30}\bin the "
    r"form\b)"
    r"[^\n.:=]{0,60}?(?:\bis\b|\bare\b|\bequals?\b|:|=|\n)"
    r"|(?:答案|结果|答)[^\n。]{0,10}?(?:是|为|:|：|等于)|故选|应选|选择?)"
    r"(?:\s*(?:therefore|thus|simply|just|equal to|approximately|about|option|choice)\b)?[\s:：*_]*",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\$\$(?P<a>[^$]{1,500})\$\$|(?<!\\)\$(?P<b>(?:\\\$|[^$\n]){1,500}?)(?<!\\)\$"
    r"|\\\((?P<c>(?:(?!\\\().){1,500}?)\\\)|\\\[(?P<d>(?:(?!\\\[).){1,500}?)\\\]",
    re.DOTALL,
)
_DERIVATION = re.compile(r"\\(?:begin|end)\s*\{(?:align(?:ed)?|gather(?:ed)?|split)\*?\}")
_AND = re.compile(r"\s*(?:,?\s*\band\b|,?\s*\bor\b|,|;|和|或)\s*")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:,;](?=\s|$)|\s*$|(?=\s+(?:because|since|as)\b))")
_OPTION_LINE = re.compile(r"([A-J])[.):]\s+\S")
_LETTER = re.compile(r"\(([A-J])\)")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.\\])(?:-\s?(?=[\d.$€£¥₹]))?(?:US)?\s?[$€£¥₹]?\s?"
    r"(?:\d{1,4}[-/]\d{1,2}[-/]\d{1,4}(?![\d])"  # a date
    r"|\d+\s+\d+\s*/\s*\d+"  # a mixed number
    r"|\d+\s*/\s*\d+|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+(?::\d+)+(?:\s*[ap]\.?m\b\.?)?|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
    r"(?:\s?\\?%|\s?percent\b)?"
)

_GAP = re.compile(r"\s{3,}")
_CHARACTERS = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # Full-width forms, as written in Chinese.
    0x2212: "-",
    **dict.fromkeys(
        [*range(0x200B, 0x2010), *range(0x2060, 0x206A), 0xFE0F, 0xFEFF]
    ),  # Invisible characters are dropped.
}
_SIGN = r"[\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\U0001f300-\U0001faff\s]+"  # Arrows, ticks, emoji.
# The number of an entry in a list is an ornament too.
_ORNAMENT = re.compile(rf"^{_SIGN}|{_SIGN}$|^\d{{1,2}}[.)]\s+(?=[-\d$\\])")
_ARGUMENT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}"
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(
    r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+|[\u0400-\u1aff]{2,}"
)  # Greek letters are left out: they are variables.
_FUNCTION = re.compile(
    r"(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|exp|sqrt|pi|and|or|mod|gcd|lcm|max|min"
    r"|inf|infinity|oo|percent",
    re.IGNORECASE,
)
_SHORT_WORD = re.compile(r"a[mnst]|b[ey]|do|go|h[ei]|i[fnst]|m[ey]|no|o[fhknr]|so|to|up|us|we", re.IGNORECASE)
_OPTION = re.compile(r"^(?:option|choice)\s+(?=\(?[A-J]\)?$)", re.IGNORECASE)
_UNIT = re.compile(
    r"(?<=[\d})\]%°])"
    r"(?:\s*(?:km|cm|mm|nm|kg|mg|ml|mL|kJ|kW|Hz|hr|hrs|ft|in|lb|lbs|oz|mi|yd|sq|mph|km/h|m/s|°?[CF])"
    r"|\s+[mgsLlhJNWVAKCF](?![A-Za-z]))"
    r"(?:(?:\^\{?-?\d\}?|[²³])?\.?(?:\s*[/·*]\s*|\s+per\s+|\s+)[A-Za-z]+){0,3}(?:\^\{?-?\d\}?|[²³])?\.?$"
    r"|(?<=[\d})\]%°])\s+[A-Za-z]{3,}(?:(?:\s*[/·]\s*|\s+)[A-Za-z]+(?:\^\{?\d\}?|[²³])?){0,4}\.?$"
)


def final_answer(text: str, *, is_gold: bool = False) -> str | None:
    """Returns the text of the answer, or None when there is none. A gold answer is taken at its word: rule 5
    is not applied to it.
    """
    text = _GAP.sub(lambda gap: "\n\n" if "\n" in gap.group() else "  ", text.translate(_CHARACTERS))
    text = _outside_thinking(text)
    text = _BARE_BOX.sub(r"\\\1{\2}", text)
    if tags := _ANSWER_TAG.findall(text):
        text = tags[-1]
    boxes, rest = _boxes(text)
    if boxes:
        return _within(boxes)
    if _BOX.search(rest):
        return None  # A box that never closes: the completion was cut within its answer.
    rest = rest[-TAIL_CHARS:]
    if (found := _after_hashes(rest)) is not None:
        return found
    lines = [line for line in map(bare, rest.splitlines()) if line]
    if not lines:
        return None
    if len(lines) == 1 and (is_formula(lines[0]) or is_date(lines[0])):
        return lines[0]
    found = _after_phrase(rest)
    if found is None and is_formula(lines[-1]):
        found = lines[-1]
    if found is not None or is_gold:
        return found
    if match := _LETTER.match(lines[-1]) or (_OPTION_LINE.match(lines[0]) if len(lines) == 1 else None):
        return match.group(1)
    found = _last_value(rest)
    return lines[0] if found is None and len(lines) == 1 and len(lines[0].split()) <= 3 else found


def marked_answer(text: str) -> str:
    """Returns what a completion marks as its answer, of whatever form it is: the last <answer>, else the last
    box, else all that is said outside of thinking. Empty where nothing is.
    """
    text = _outside_thinking(text)
    if tags := _ANSWER_TAG.findall(text):
        return str(tags[-1]).strip()
    boxes, _ = _boxes(text)
    return (boxes[-1] if boxes else text).strip()


def bare(text: str) -> str:
    """Returns `text` without the Markdown, delimiters, quotes and punctuation around it."""
    text, before = text.strip(), None
    while before != text and len(text) <= LINE_CHARS:
        before, text = text, text.strip().strip('`"“”').strip()
        text = _ORNAMENT.sub("", text)
        text = re.sub(r"^#{1,6}\s+|^>\s+|^[-*+]\s+(?=\D)", "", text)
        for opened, closed in (
            ("**", "**"),
            ("__", "__"),
            ("$$", "$$"),
            ("$", "$"),
            (r"\(", r"\)"),
            (r"\[", r"\]"),
            ("*", "*"),
        ):
            inside = text[len(opened) : -len(closed)]
            if (
                len(text) > len(opened) + len(closed)
                and text.startswith(opened)
                and text.endswith(closed)
                and opened not in inside
            ):
                text = inside
        text = re.sub(r"(?:(?<!\\)[.,;:]|[。，；：！、])+$", "", text)
        text = re.sub(r"^(?:=|≈|~|\\(?:approx|simeq|sim)(?![A-Za-z])|:|：)\s*|\*\*$", "", text)
    return text


def is_formula(text: str) -> bool:
    """Returns whether `text`, already bare, is mathematics, a number with its unit, or a choice, without a
    word of prose.
    """
    if len(text) > LINE_CHARS:
        return False
    text = _OPTION.sub("", _UNIT.sub("", text))
    words = _WORD.findall(_COMMAND.sub(" ", _ARGUMENT.sub(" ", text)))
    has_content = re.search(r"[A-Za-z0-9∞∅π½⅓¼¾]", text) is not None
    return (
        has_content
        and "$" not in text.replace(r"\$", "").lstrip("$")
        and all(_is_symbolic(word) for word in words)
    )


def _is_symbolic(word: str) -> bool:
    """Returns whether letters are the name of a function or a product of variables: "ab" is, "is" is not."""
    if _FUNCTION.fullmatch(word) or (word.isupper() and len(word) <= 4):  # ABC: the points of a figure.
        return True
    has_vowel = re.search("[aeiou]", word, re.IGNORECASE) is not None
    return word.isascii() and (
        (len(word) == 2 and not _SHORT_WORD.fullmatch(word)) or (len(word) == 3 and not has_vowel)
    )


def without_unit(text: str) -> str:
    """Returns `text` without the unit behind its number."""
    return _UNIT.sub("", text).strip()


_MONTH = r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    rf"\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{4}}-0[1-9]"
    rf"|\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{4}}|\d{{1,2}}/\d{{1,2}}/\d{{2}}"
    rf"|\d{{1,2}}(?::\d\d)?\s*[ap]\.?m\.?"
    rf"|{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}|\d{{1,2}}(?:st|nd|rd|th)?\s+{_MONTH},?\s+\d{{4}}",
    re.IGNORECASE,
)


def is_date(text: str) -> bool:
    """Returns whether `text` is a date or a time of day (2024-05-01, 12:30 pm) rather than a difference or a
    quotient.
    """
    return _DATE.fullmatch(text) is not None


# --- The five rules ---


def _outside_thinking(text: str) -> str:
    outside, begin = [], 0
    is_thinking = False
    for tag in _THINKING_TAG.finditer(text):
        if not any(tag.groups()):
            outside += [] if is_thinking else [text[begin : tag.start()]]
            is_thinking = True
        else:
            outside = outside if is_thinking else []  # A closing tag alone: the prompt has opened it.
            is_thinking, begin = False, tag.end()
    return " ".join(outside if is_thinking else [*outside, text[begin:]])


def _boxes(text: str) -> tuple[list[str], str]:
    """Returns the contents of the last complete box and of those listed with it, and `text` without its empty
    boxes.
    """
    spans: list[tuple[int, int, int]] = []  # begin, content, end: outermost ones, in order
    open_braces: list[tuple[int, int] | None] = []
    for match in _BRACE.finditer(text) if _BOX.search(text) else ():
        token = match.group()
        if token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                while spans and spans[-1][0] > opened[0]:
                    spans.pop()
                spans.append((*opened, match.start()))
        # \{ and \} are characters of a set, not braces; \\ is a new line.
        elif token[0] != "\\" or len(token) > 2:
            open_braces.append((match.start(), match.end()) if len(token) > 1 else None)
    is_empty = [_PLACEHOLDER.fullmatch(text[content:end]) is not None for _, content, end in spans]
    filled = [span for span, empty in zip(spans, is_empty, strict=True) if not empty]
    edges = [
        0,
        *(
            edge
            for span, empty in zip(spans, is_empty, strict=True)
            if empty
            for edge in (span[0], span[2] + 1)
        ),
        len(text),
    ]
    rest = "".join(text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True))
    contents: list[str] = []
    for index in reversed(range(len(filled))):
        if contents and not _LISTED.fullmatch(text, filled[index][2] + 1, filled[index + 1][0]):
            break
        contents.append(text[filled[index][1] : filled[index][2]])
    return list(dict.fromkeys(reversed(contents))), rest


def _within(boxes: list[str]) -> str | None:
    """Returns the answer that the contents of boxes give, or None."""
    if len(boxes) > 1:
        return ", ".join(map(bare, boxes))
    content = boxes[0]
    nested, _ = _boxes(content)
    content = bare(_LEAD.sub("", bare(nested[0] if nested else content)))
    if not content or is_formula(content):
        return content or None
    return _after_phrase(content) or content


def _after_hashes(text: str) -> str | None:
    for line in reversed(_HASHES.findall(text)):
        line = bare(line)
        if line and not _NUMBERED_HEADING.match(line):
            if is_formula(line):
                return line
            if (found := _after_phrase(line)) is not None:
                return found
    return None


def _after_phrase(text: str) -> str | None:
    ends = [match.end() for match in _PHRASE.finditer(text)]
    for end in reversed(ends):
        if (found := _value_at_start(text[end : end + LINE_CHARS].lstrip().partition("\n")[0])) is not None:
            return found
    return None


def _value_at_start(line: str) -> str | None:
    """Returns the first value in the rest of a line; words count only where there are but a few of them."""
    whole = re.sub(r"(?<=\d)!+$", "", bare(line))  # An exclamation: a factorial would stand between dollars.
    if not whole:
        return None
    if is_formula(whole) or is_date(whole):
        return whole
    if match := _CHOICE.match(whole):
        return match.group(1)
    formulas = [
        (match, content)
        for match in _MATH.finditer(line)
        if is_formula(content := bare(next(filter(None, match.groups()))))
    ]
    number, bold = _NUMBER.search(line), _BOLD.search(line)
    if bold and (not number or bold.start() <= number.start()) and (found := _value_at_start(bold.group(1))):
        return found
    if formulas and (not number or formulas[0][0].start() <= number.start()):
        listed = [formulas[0][1]]
        for (before, _), (after, content) in itertools.pairwise(formulas):
            if not _AND.fullmatch(line, before.end(), after.start()):
                break
            listed.append(content)
        return ", ".join(listed)
    if number:
        sentence = bare(re.split(r"(?<=[^\d\s])[.](?:\s|$)|[.]\s+(?=[A-Z])|[。]", line)[0])
        return sentence if is_formula(sentence) else number.group().strip()
    return whole if len(whole.split()) <= 4 else None


def _last_value(text: str) -> str | None:
    """Returns the formula, number or choice that ends last in the text, or None."""
    found, end = None, -1
    for match in _MATH.finditer(text):
        content = bare(_last_line(next(filter(None, match.groups()))))
        if is_formula(content):
            found, end = content, match.end()
    for match in (*_NUMBER.finditer(text), *_LETTER.finditer(text)):
        if match.end() > end:
            found, end = match.group().strip(), match.end()
    return found


def _last_line(formula: str) -> str:
    """Returns the last line of a derivation that goes over several lines; any other formula comes back
    unchanged.
    """
    if not _DERIVATION.search(formula):
        return formula
    lines = [line.strip(" &\n") for line in _DERIVATION.sub("", formula).split(r"\\")]
    return next((line for line in reversed(lines) if line), "").replace("&", "")
