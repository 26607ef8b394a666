"""A Python tool: the policy runs programs, sees what they print, and gives its answer.

`environments: environments.python_tool:Python?timeout_s=5&memory_mib=256`, for rows of `prompt`. It gives no
reward of its own: functions such as `math_verify` score what the policy says last.

Each program runs in a process of its own, with the limits and the isolation of core/sandbox, which says
plainly what that is not.
"""

from __future__ import annotations

from typing import Any

from core import sandbox

MAX_SHOWN_CHARS = 2000


class Python:
    """Runs programs. Public attributes, for reward functions: `programs`, and how each `ended`."""

    def __init__(self, timeout_s: float = 5.0, memory_mib: int = 256) -> None:
        self._limits = sandbox.Limits(
            cpu_s=timeout_s,
            wall_s=2 * timeout_s,
            memory_bytes=memory_mib << 20,
            output_bytes=4 * MAX_SHOWN_CHARS,
        )
        self.programs: list[str] = []
        self.ended: list[str] = []

    def reset(self, **row: Any) -> None:
        """Begins with the row's prompt, to which nothing is added."""

    def run_python(self, program: str) -> str:
        """
        Runs a Python program in an empty directory, without network, and returns what it prints.

        Args:
            program: The text of the program. Nothing is kept from one program to the next.

        Returns:
            What it wrote to stdout and stderr, and how it ended if not well.
        """
        self.programs.append(program)
        ended = sandbox.run(program, limits=self._limits)
        self.ended.append(ended.in_words)
        shown = _shortened(ended.stdout + ended.stderr)
        if ended.in_words != "exit code 0":
            shown = f"{shown}\n[it ended by {ended.in_words}]".strip()
        return shown or "[it printed nothing]"


def _shortened(text: str) -> str:
    """Returns the text without its middle where it is long: an error stands at the end."""
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    half = MAX_SHOWN_CHARS // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
