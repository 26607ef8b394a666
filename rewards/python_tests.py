"""The reward `python_tests` runs the tests of the row on the program in the completion, in a sandbox.

    completion --extract_program--> the last ```python block --core.sandbox--> which tests it passed

A row's `tests` are one of (also as JSON text, as many data sets store them):

    "assert f(1) == 2"                                                     code, passed as a whole
    ["assert f(1) == 2", "assert f(2) == 3"]                               asserts, each a test (MBPP)
    {"inputs": ["1\\n"], "outputs": ["2\\n"]}                                stdin and stdout (APPS, TACO)
    {"inputs": [[1]], "outputs": [2], "fn_name": "f"}                      calls (APPS)
    [{"input": "1\\n", "output": "2\\n"}]                                    pairs (LiveCodeBench and others)

A column `entry_point` with code that defines `check(candidate)` is HumanEval's form. A completion without a
program, or whose program does not run, has passed no test: 0.0. What the sandbox cannot start is an error.

Tests that call the program share its process. They are told by what the harness reports, never by the exit
code, so that `sys.exit(0)` passes nothing; a program that looks for the harness in its own process can find
it. core/sandbox/__init__.py says what the sandbox is not.
"""

from __future__ import annotations

import ast
import concurrent.futures
import decimal
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from core import sandbox
from core.errors import RewardError
from core.sandbox import Limits

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")
_MAX_AT_ONCE = 4

_HARNESS = """
import json, os, sys
def main(write, given):
    nonce, space = given["nonce"], {"__name__": "solution"}
    exec(compile(given["program"], "solution.py", "exec"), space)
    for number, (kind, text, wanted) in enumerate(given["tests"]):
        passed = False
        try:
            if kind == "code":
                exec(compile(text, "tests.py", "exec"), space)
                passed = True
            else:
                found = space["Solution"]() if kind not in space and "Solution" in space else None
                function = space[kind] if found is None else getattr(found, kind)
                passed = plain(function(*text)) == wanted
        except BaseException as error:
            print(f"test {number + 1}: {type(error).__name__}: {error}", file=sys.stderr)
        write(3, f"{nonce} {number} {int(passed)}\\n".encode())
def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return value
main(os.write, json.loads(sys.stdin.read()))
"""


class ProgramTest(NamedTuple):
    """One test of a program.

    kind    "stdin": `given` on stdin must print `wanted`; "code": `given` must run behind the program; else
            the name of a function that must return `wanted` for the arguments `given`
    """

    kind: str
    given: Any
    wanted: Any = None


class PythonTests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The share of its row's tests that a completion's program passes: `python_tests?timeout_s=5`.

    cpu_s       (`timeout_s`) seconds on the CPU for one run of the program: all calls together, or one stdin.
                After a run that took too long no other is begun, and what is left has not passed
    memory_mib  memory that one run may use
    score       "fraction", or "all": 1.0 where all tests pass, else 0.0

    A group may take four such runs on the clock, or `rewards.timeout_s` where that is longer.
    """

    cpu_s: float = msgspec.field(name="timeout_s", default=5.0)
    memory_mib: int = 512
    score: Literal["fraction", "all"] = "fraction"

    def __post_init__(self) -> None:
        if not 0 < self.cpu_s <= 3600 or not 16 <= self.memory_mib <= 2**20:
            raise ValueError(
                f"timeout_s={self.cpu_s:g} and memory_mib={self.memory_mib}: expected up to 3600 s, and from 16 MiB on"
            )

    @property
    def _limits(self) -> Limits:
        return Limits(cpu_s=self.cpu_s, memory_bytes=self.memory_mib << 20)

    @property
    def timeout_s(self) -> float:
        """Returns what a call may take at least: eight completions are run four at a time, and one that loops
        in its calls and on stdin takes two runs.
        """
        return 4 * self._limits.clock_s

    def __call__(
        self, completions: list[str], tests: list[Any], entry_point: list[Any] | None = None
    ) -> list[float | None]:
        """Returns a number from 0 to 1 for each completion. Raises ValueError for tests that cannot be read,
        OSError where no process can be started.
        """
        limits = self._limits
        names = entry_point or [None] * len(completions)
        read = [read_tests(of_row, name) for of_row, name in zip(tests, names, strict=True)]
        at_once = max(1, min(_MAX_AT_ONCE, len(completions), os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            shares = list(pool.map(_share_passed, completions, read, [limits] * len(read)))
        return [float(share == 1.0) if self.score == "all" else share for share in shares]

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """Returns why a row's tests cannot be run, or None when they can."""
        try:
            read_tests(row["tests"], row.get("entry_point"))
        except ValueError as error:
            return f"its {error}"
        return None

    def prepare(self) -> None:
        """Finds out ahead whether programs can be started here. Raises RewardError when they cannot."""
        try:
            sandbox.isolation()
        except OSError as error:
            raise RewardError(f"reward function 'python_tests': {error}") from None

    def start_note(self) -> str:
        """Returns what to tell at the start: what the kernel keeps from the programs."""
        return f"python_tests runs generated programs in processes with limits, {sandbox.isolation()}"


def extract_program(completion: str) -> str | None:
    """Returns the last block that is marked as Python, else the last that is marked as nothing; None where
    there is neither, as where the completion was cut within its only block.
    """
    blocks = [(match[1].lower(), match[2]) for match in _BLOCK.finditer(completion)]
    marked = [text for language, text in blocks if language in _PYTHON[:-1]]
    unmarked = [text for language, text in blocks if not language]
    return next(reversed(marked or unmarked), None)


def read_tests(tests: Any, entry_point: Any = None) -> list[ProgramTest]:
    """Returns the tests of a row. Raises ValueError, with what is wrong, where they cannot be read or there
    are none.
    """
    if hasattr(tests, "tolist"):
        tests = tests.tolist()
    if isinstance(tests, str):
        if not tests.strip():
            raise ValueError("tests are empty")
        if (stored := _from_json(tests)) is None:
            return [_code(tests, entry_point)]
        tests = stored
    if isinstance(tests, Mapping):
        return _pairs(tests)
    if not isinstance(tests, Sequence) or not tests:
        kind = "an empty list" if tests == [] else f"a {type(tests).__name__}"
        raise ValueError(f"tests are {kind}, expected code, asserts, or inputs and outputs")
    return [_listed(number, test, entry_point) for number, test in enumerate(tests)]


def _from_json(text: str) -> Any:
    if text.lstrip()[0] not in "[{":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _code(text: str, entry_point: Any) -> ProgramTest:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests are no Python: {error}") from None
    if entry_point is not None:
        if not str(entry_point).isidentifier():
            raise ValueError(f"tests have entry_point = {entry_point!r}, expected the name of a function")
        text += f"\ncheck({entry_point})\n"
    return ProgramTest("code", text)


def _pairs(tests: Mapping[str, Any]) -> list[ProgramTest]:
    if "inputs" not in tests or "outputs" not in tests:
        if "input" in tests and "output" in tests:
            return [_listed(0, tests, None)]
        raise ValueError(
            f"tests have {', '.join(map(repr, tests)) or 'nothing'}, expected inputs and outputs"
        )
    inputs, outputs = list(tests["inputs"]), list(tests["outputs"])
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(
            f"tests have {len(inputs)} inputs and {len(outputs)} outputs, expected as many, not 0"
        )
    function = tests.get("fn_name") or tests.get("func_name")
    return [_pair(function, given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]


def _listed(number: int, test: Any, entry_point: Any) -> ProgramTest:
    if isinstance(test, str):
        return _code(test, entry_point)
    if isinstance(test, Mapping) and "input" in test and "output" in test:
        function = (
            test.get("fn_name") or test.get("func_name") or (test.get("metadata") or {}).get("func_name")
        )
        return _pair(function, test["input"], test["output"])
    raise ValueError(
        f"tests have as number {number + 1} {str(test)[:60]!r}, expected an assert or a pair of input and output"
    )


def _pair(function: Any, given: Any, wanted: Any) -> ProgramTest:
    if function is None:
        return ProgramTest("stdin", _lines(given), _lines(wanted))
    if isinstance(given, str):  # LiveCodeBench: an argument a line, each as JSON.
        try:
            given = [json.loads(line) for line in given.splitlines() if line.strip()]
            wanted = json.loads(wanted)
        except (TypeError, ValueError):
            raise ValueError(f"tests call {function} with {given[:60]!r}, expected JSON") from None
    return ProgramTest(str(function), list(given), wanted)


def _lines(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _share_passed(completion: str, tests: list[ProgramTest], limits: Limits) -> float:
    program = extract_program(completion)
    if program is None:
        return 0.0
    calls = [test for test in tests if test.kind != "stdin"]
    passed = _count_calls(program, calls, limits) if calls else 0
    for test in tests:
        if test.kind == "stdin":
            ended = sandbox.run(program, test.given, limits)
            passed += ended.how == "exit" and ended.code == 0 and _prints(ended.stdout, test.wanted)
            if ended.how in ("cpu time", "wall time"):
                break
    return passed / len(tests)


def _count_calls(program: str, tests: list[ProgramTest], limits: Limits) -> int:
    nonce = secrets.token_hex(8)
    given = json.dumps({"nonce": nonce, "program": program, "tests": tests})
    report = sandbox.run(_HARNESS, given, limits).report.decode(errors="replace").splitlines()
    return sum(f"{nonce} {number} 1" in report for number in range(len(tests)))


def _prints(printed: str, wanted: str) -> bool:
    """Returns whether two outputs say the same: the same words, whatever is between them, and numbers equal
    as numbers (3.0 and 3.00).
    """
    found, expected = printed.split(), wanted.split()
    return len(found) == len(expected) and all(map(_equal, found, expected))


def _equal(word: str, other: str) -> bool:
    if word == other:
        return True
    try:
        return decimal.Decimal(word) == decimal.Decimal(other)
    except decimal.InvalidOperation:
        return False
