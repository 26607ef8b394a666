"""Tasks of two turns for the tiny model that says digits, slow enough to be met in each phase."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PACE_S = 0.15
MARKS = "SUMS_MARKS"
"""The environment variable that names the directory of marks."""


@contextlib.contextmanager
def marked(phase: str) -> Iterator[None]:
    """Leaves a file with the process's id in its name for as long as it is in that phase."""
    mark = Path(os.environ[MARKS], f"{phase}-{os.getpid()}")
    mark.touch()
    time.sleep(PACE_S)
    yield
    mark.unlink(missing_ok=True)


class Twice:
    """Asks something else after the first answer; reward functions score the second."""

    def __init__(self):
        self.num_said = 0

    def reset(self, **row):
        with marked("reset"):
            return ""

    def step(self, text):
        with marked("act"):
            self.num_said += 1
            return "1+1=", None, self.num_said == 2


def scored(completions, **rest):
    """The share of digits in what was said last."""
    with marked("scored"):
        return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]
