"""`math_verify` compares a completion's final answer with the gold answer as mathematics.

    completion --final_answer--> text --formulas, in a process that can be killed--> equal to the gold, or not

A completion that sympy cannot finish harms only itself: the gold answer was read, so the completion is not
correct, and the next completion has a new process within hundredths of a second.
"""

from __future__ import annotations

import functools
from typing import Any

from rewards import formulas
from rewards.bounded import BoundedProcess, UnfinishedError
from rewards.final_answer import final_answer
from rewards.golds import gold_texts

LIMIT_S = 0.3  # CPU time for an answer; ordinary ones take a hundredth.
GOLD_LIMIT_S = 1.0
GROUP_LIMIT_S = 1.2  # For the unfinished ones of a group together; later ones get SHORT_LIMIT_S.
SHORT_LIMIT_S = 0.03

_process = BoundedProcess(formulas.warm_up)


def math_verify(
    prompts: list[str], completions: list[str], *, answer: list[Any], **columns: list[Any]
) -> list[float | None]:
    """Returns 1.0 where the completion's answer equals the row's `answer`, else 0.0; a completion without a
    readable answer gets 0.0.

    Fractions, decimals (6 places), sets, intervals, equations and percentages are compared by value; units
    are ignored. An answer that sympy cannot compare within LIMIT_S is not equal. Raises ValueError when
    `answer` itself cannot be read.
    """
    _unfinished.clear()
    return [
        float(_is_right(_gold(gold), completion))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _gold_problem(gold: Any) -> str | None:
    """Returns why `gold` cannot be compared with, as far as that shows without reading formulas; None when
    nothing shows.
    """
    try:
        _find_gold(gold_texts(gold)[0])
    except ValueError as error:
        return str(error)
    return None


_unfinished: set[str] = set()  # Answers of the group that did not end.


def _gold(gold: Any) -> str:
    """Returns the answer that a row's gold answer holds. Raises ValueError when it holds none."""
    try:
        return _read_gold(gold_texts(gold)[0])
    except ValueError as error:
        raise ValueError(f"the gold answer {error}") from None


@functools.lru_cache(maxsize=1024)
def _read_gold(text: str) -> str:
    found = _find_gold(text)
    if found.isascii() and found.isdigit():
        return found
    try:
        _process.call(GOLD_LIMIT_S, formulas.check_gold, found)
        _process.call(GOLD_LIMIT_S, formulas.equal, found, "0")
    except UnfinishedError:
        raise ValueError(f"{_shown(text)} cannot be computed within {GOLD_LIMIT_S:g} s") from None
    except ValueError as error:
        raise ValueError(f"{_shown(text)} {error}") from None
    return found


def _find_gold(text: str) -> str:
    """Returns the answer in a gold answer before it is read as a formula. Raises ValueError when there is
    none.
    """
    found = final_answer(text, is_gold=True)
    if found is None:
        raise ValueError(f"{_shown(text)} cannot be read as mathematics; for words use exact_match")
    if formulas.is_too_large(found):
        raise ValueError(f"{_shown(text)} is too large to be computed")
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else "..." + text[-57:])


def _is_right(gold: str, completion: str) -> bool:
    found = final_answer(completion)
    if found is None or found in _unfinished:
        return False
    if formulas.is_too_large(found):
        return formulas.plain(gold) == formulas.plain(found)
    try:
        return _equal(gold, found)
    except UnfinishedError:
        _unfinished.add(found)
        return False


@functools.lru_cache(maxsize=1024)  # The samples of a group agree often. What did not end is not kept.
def _equal(gold: str, found: str) -> bool:
    try:
        return bool(_process.call(_limit_s(), formulas.equal, gold, found))
    except UnfinishedError:
        raise
    except Exception:  # noqa: BLE001 - sympy raises anything; the gold was read, so this answer is the cause
        return False


def _vote(completion: str) -> str | None:
    """Returns the completion's answer in its canonical form, as it stands where that does not end in time,
    and None without an answer.
    """
    found = final_answer(completion)
    if found is None or found in _unfinished or formulas.is_too_large(found):
        return None if found is None else formulas.plain(found)
    try:
        return _canonical(found)
    except UnfinishedError:
        _unfinished.add(found)
        return formulas.plain(found)


@functools.lru_cache(maxsize=1024)
def _canonical(found: str) -> str:
    try:
        return str(_process.call(_limit_s(), formulas.canonical, found))
    except UnfinishedError:
        raise
    except Exception:  # noqa: BLE001 - whatever sympy raises: it stands for itself
        return formulas.plain(found)


def _limit_s() -> float:
    return LIMIT_S if len(_unfinished) * LIMIT_S < GROUP_LIMIT_S else SHORT_LIMIT_S


math_verify.answer = _vote  # type: ignore[attr-defined]
math_verify.gold_problem = _gold_problem  # type: ignore[attr-defined]
math_verify.prepare = _process.start  # type: ignore[attr-defined]
