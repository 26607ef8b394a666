"""The Python tool: what programs print is shown, what they do wrong is told."""

from __future__ import annotations

import pytest

from environments.python_tool import MAX_SHOWN_CHARS, Python


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("print(6 * 7)", "42"),
        ("x = 1", "[it printed nothing]"),
        ("print(x)", "NameError: name 'x' is not defined"),
        ("import sys; sys.exit(3)", "[it ended by exit code 3]"),
        ("while True: pass", "[it ended by too much"),
        ("x = bytearray(2**29)", "[it ended by"),
    ],
)
def test_what_a_program_does_is_shown(program: str, shown: str) -> None:
    tool = Python(timeout_s=1.0, memory_mib=128)
    assert shown in tool.run_python(program)
    assert tool.programs == [program]
    assert len(tool.ended) == 1


def test_of_much_the_middle_is_left_out() -> None:
    shown = Python().run_python("print('a' * 3000, 'b')")
    assert len(shown) < MAX_SHOWN_CHARS + 50
    assert "characters left out]" in shown
    assert shown.endswith("b\n")
