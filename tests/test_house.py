"""The house's rules, read from the syntax of its files: who imports whom, how large things are, what
docstrings and names say.

A rule yields a line for each place that breaks it. What breaks one for a reason stands in EXCEPTIONS, with
the reason.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import pytest

from tests.support.house import ROOMS, ROOT, Definition, Function, Source, production, sources

BELOW: dict[str, set[str]] = {
    "core": set(),
    "environments": {"core"},
    "rewards": {"core"},
    "buffer": {"core"},
    "learner": {"buffer", "rewards", "environments", "core"},
    "actors": {"buffer", "rewards", "environments", "core"},
    "cluster": {"actors", "learner", "buffer", "rewards", "environments", "core"},
    "launch.py": set(ROOMS),
    "recipes": {"core"},
    "benchmarks": {*ROOMS, "recipes"},
}
"""By room, the other rooms that it may import."""

IMPORTERS: dict[str, tuple[str, ...]] = {
    "vllm": (
        "actors/engine.py",
        "actors/engine_cpu.py",
        "actors/engine_worker.py",
        "core/weights/transports/ipc.py",
        "core/weights/transports/nccl.py",
        "core/weights/transports/passes.py",
    ),
    "deepspeed": ("learner/policy/zero.py",),
    "ray": ("core/calls.py", "core/processes.py", "core/weights/", "actors/", "learner/", "cluster/"),
    "torch": ("core/model_shape.py", "core/weights/", "actors/", "learner/", "cluster/"),
}
"""By library, the files and folders of the rooms that may import it."""

MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 20, 500, 60, 110

NO_SUBJECT = {
    "Of",
    "As",
    "By",
    "In",
    "On",
    "At",
    "To",
    "For",
    "From",
    "With",
    "Also",
    "Its",
    "Their",
    "And",
    "Or",
    "But",
    "Not",
    "When",
    "Until",
    "Unless",
    "Where",
    "Whether",
    "While",
    "If",
    "That",
    "So",
    "Else",
    "Than",
}
"""First words after which no subject can come soon: who reads such a docstring has to guess what it is
about.
"""

EXAMPLES = {"learner/objectives/best_of_n.py"}
"""Files that do not exist: the pages tell how they would be written."""

MUTATORS = {
    "append",
    "appendleft",
    "add",
    "clear",
    "discard",
    "extend",
    "insert",
    "pop",
    "popleft",
    "popitem",
    "remove",
    "setdefault",
    "update",
    "write",
}
"""Methods of the standard containers that change them."""

EXCEPTIONS: dict[str, set[str]] = {
    "files_are_short": {
        "tests/support/rewards/math_answers.py"
    },  # A table of answers, a line for each; no code.
}
"""By rule, the places that may break it: `path` or `path name`."""

Rule = Callable[[], Iterator[str]]
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    RULES.append(check)
    return check


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_house(check: Rule) -> None:
    known = EXCEPTIONS.get(check.__name__, set())
    found = {line: line.partition(": ")[0] for line in check()}
    broken = [line for line, place in found.items() if place not in known]
    assert not broken, f"{check.__doc__}\n" + "\n".join(broken)
    assert known <= set(found.values()), "EXCEPTIONS names what breaks no rule any more"


# --- imports
# ---------------------------------------------------------------------------------------------------------


@rule
def arrows_go_down_only() -> Iterator[str]:
    """launch -> cluster -> {actors, learner} -> {buffer, rewards, environments} -> core; actors and learner
    never each other.
    """
    rooms = {*BELOW, "tests"} - {"launch.py"} | {"launch"}
    for source in sources():
        if source.room in BELOW:
            own = source.room.removesuffix(".py")
            others = {(name.partition(".")[0], line) for name, line in source.imports()} - {(own, 0)}
            for other, line in sorted(others):
                if other in rooms - {own} and other not in BELOW[source.room]:
                    yield f"{source.path}: line {line} imports {other}"


@rule
def libraries_have_their_places() -> Iterator[str]:
    """vllm, deepspeed, ray and torch are imported only where IMPORTERS says."""
    for source in production():
        for library, line in sorted({(name.partition(".")[0], line) for name, line in source.imports()}):
            if library in IMPORTERS and not source.path.startswith(IMPORTERS[library]):
                yield f"{source.path}: line {line} imports {library}"


@rule
def nobody_imports_a_test() -> Iterator[str]:
    """A test imports helpers from tests/support/, never another test; benchmarks and rooms import nothing
    of tests/.
    """
    for source in sources():
        for name, line in source.imports():
            if re.match(r"tests(\.\w+)*\.test_\w+", name) or (
                name.split(".")[0] == "tests" and source.room != "tests"
            ):
                yield f"{source.path}: line {line} imports {name}"


# --- sizes ------------------------------------------------------------------------------------------------
# -----------


@rule
def folders_are_small() -> Iterator[str]:
    """At most 20 Python files in a folder, besides `__init__.py`."""
    for folder, count in Counter(source.folder for source in sources() if source.stem != "__init__").items():
        if count > MAX_FILES:
            yield f"{folder}: {count} files"


@rule
def files_are_short() -> Iterator[str]:
    """At most 500 lines in a file."""
    for source in sources():
        if source.num_lines > MAX_LINES:
            yield f"{source.path}: {source.num_lines} lines"


@rule
def lines_are_short() -> Iterator[str]:
    """At most 110 columns in a line of code, prose or comment; a drawing, a table or a string that is data
    may be wider.
    """
    for source in sources():
        lines = source.text.splitlines()
        wide = {number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS}
        for number in sorted(wide - _lines_of_data(source) if wide else ()):
            if not re.search(r" {3,}\S|\|.*\||-->|\S {2,}\S", lines[number - 1].strip()):
                yield f"{source.path}: line {number} has {len(lines[number - 1])} columns"


def _lines_of_data(source: Source) -> set[int]:
    """The lines on which a string lies that is no docstring."""
    docstrings = {
        id(node.value)
        for node in source.nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    strings = [
        node
        for node in source.nodes
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    spans = [(node.lineno, node.end_lineno or 0) for node in strings if id(node) not in docstrings]
    return {number for first, last in spans for number in range(first, last + 1)}


@rule
def functions_are_short() -> Iterator[str]:
    """At most 60 lines in a function."""
    for source in sources():
        for function in source.functions():
            if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES:
                yield f"{source.path} {function.name}: {length} lines"


@rule
def statements_choose_once() -> Iterator[str]:
    """At most one ternary in a statement."""
    for source in sources():
        for statement in (node for node in source.nodes if isinstance(node, ast.stmt)):
            if (count := sum(isinstance(node, ast.IfExp) for node in _own_nodes(statement))) > 1:
                yield f"{source.path}: line {statement.lineno} has {count} ternaries"


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yields the statement's nodes without those of the statements inside it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        inner = ast.iter_child_nodes(node)
        waiting += [
            child for child in inner if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)
        ]


# --- docstrings and names
# --------------------------------------------------------------------------------------------


@rule
def docstrings_are_sentences() -> Iterator[str]:
    """Files, public functions, classes and methods say what they are: a capital letter or a name in
    backticks first, a sentence's end.
    """
    for source in sources():
        if source.room in ("tests", "docs"):  # An example has comments, and its page around it.
            continue
        if source.text.strip() and (problem := _problem_of(source.summary)):
            yield f"{source.path}: {problem}"
        for name, node in source.public():
            if not _says_nothing_new(node) and (problem := _problem_of(ast.get_docstring(node) or "")):
                yield f"{source.path} {name}: {problem}"


def _problem_of(docstring: str) -> str:
    first = " ".join(docstring.partition("\n\n")[0].split())
    if not first:
        return "no docstring"
    if not re.match(r"[A-Z`\"]", first) and not re.match(
        r"(vLLM|torch|git|pip|numpy|sqlite|msgpack)\b", first
    ):
        return f"begins small: {first[:60]!r}"
    if first[-1] not in ".:?!`)":
        return f"has no end: {first[-60:]!r}"
    if first.split()[0].strip(",:;") in NO_SUBJECT:
        return f"has no subject: {first[:60]!r}"
    return ""


def _says_nothing_new(node: Definition) -> bool:
    """A method of a Protocol or an override, whose base says it; `main`, whose file does; a function of one
    `return` or `raise`.
    """
    if node.name == "main":
        return True
    names = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
    return bool(names & {"override", "overload"})


@rule
def one_class_has_one_name() -> Iterator[str]:
    """No two classes of one name in the rooms and the benchmarks, and none with a builtin's."""
    places = defaultdict(list)
    for source in sources():
        if source.room != "tests":
            for node in source.nodes:
                # An objective's `Config` goes by its module's name: `agro.Config`.
                is_of_objective = (
                    source.folder == "learner/objectives" and getattr(node, "name", "") == "Config"
                )
                if isinstance(node, ast.ClassDef) and not is_of_objective:
                    places[node.name].append(source.path)
    for name, paths in sorted(places.items()):
        if len(paths) > 1:
            yield f"{paths[-1]} {name}: also in {', '.join(paths[:-1])}"
        if hasattr(builtins, name):
            yield f"{paths[0]} {name}: is a builtin"


@rule
def names_hide_no_effect() -> Iterator[str]:
    """What is read like a value changes nothing: properties, and functions whose names begin with is_,
    has_, num_ or may_.
    """
    for source in production():
        for function in source.functions():
            if _reads_like_a_value(function) and (line := _line_of_change(function)):
                yield f"{source.path} {function.name}: line {line} changes the object"


def _reads_like_a_value(function: Function) -> bool:
    names = {node.id for node in function.decorator_list if isinstance(node, ast.Name)}
    return "property" in names or function.name.lstrip("_").startswith(("is_", "has_", "num_", "may_"))


def _line_of_change(function: Function) -> int:
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
        ):
            targets = [node.func.value]
        if any(_is_of_self(target) for target in targets):
            return node.lineno
    return 0


def _is_of_self(target: ast.expr) -> bool:
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
        if isinstance(target, ast.Name) and target.id == "self":
            return True
    return False


@rule
def one_word_names_one_thing() -> Iterator[str]:
    """A moment is `deadline_s`, a duration `timeout_s`; who takes answers is `poll`, who advances is
    `tick`.
    """
    for source in sources():
        for name in sorted(set(re.findall(r"\b(\w*until_s|_?limit_s|def look\(self)", source.text))):
            # A reward function's limit is one of CPU time: no duration on the clock.
            if not source.path.startswith(("rewards/", "tests/test_house.py")):
                yield f"{source.path} {name}: another word for it"


@rule
def broad_excepts_say_why() -> Iterator[str]:
    """Every `except Exception` has its reason on the same line; those that raise again need none."""
    for source in sources():
        lines = source.text.splitlines()
        for node in source.nodes:
            if isinstance(node, ast.ExceptHandler) and _is_broad(node):
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if not raises and not re.search(r"#.*(--|noqa: BLE001 - )\s*\S+ \S+", lines[node.lineno - 1]):
                    yield f"{source.path}: line {node.lineno} catches everything without a reason"


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
        if handler.type
        else {"BaseException"}
    )
    return bool(caught & {"Exception", "BaseException"})


# --- one place for staleness
# -----------------------------------------------------------------------------------------


@rule
def staleness_is_computed_in_one_file() -> Iterator[str]:
    """Only core/staleness.py takes a version from a step, or compares anything with `max_staleness`."""
    for source in production():
        if source.path == "core/staleness.py":
            continue
        for node in source.nodes:
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                left, right = _words_of(node.left), _words_of(node.right)
                if right & {"version", "versions"} and left & {"step", "version", "versions"}:
                    yield f"{source.path}: line {node.lineno} subtracts a version"
            if isinstance(node, ast.Compare | ast.BinOp) and "max_staleness" in _names_in(node):
                yield f"{source.path}: line {node.lineno} computes with max_staleness"


def _names_in(node: ast.AST) -> set[str]:
    """The names in an expression, of variables and of attributes."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names | {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def _words_of(node: ast.AST) -> set[str]:
    """The parts of the names in an expression: `batch.oldest_version` has batch, oldest and version."""
    return {word for name in _names_in(node) for word in name.split("_")}


# --- tests and documents
# ---------------------------------------------------------------------------------------------


@rule
def names_of_tests_follow_the_files() -> Iterator[str]:
    """tests/<room>/test_<file>.py or test_<file>_<aspect>.py; whole runs in tests/system/; this file stands
    alone.
    """
    stems: dict[str, set[str]] = defaultdict(set)
    for source in sources():
        stems[source.room] |= {source.stem, source.folder.rpartition("/")[2]}
    for source in sources():
        if source.room != "tests" or not source.stem.startswith("test_"):
            continue
        parts = source.path.split("/")
        room = parts[1] if len(parts) > 2 else ""
        if room not in ("", "system") and not _is_named_after(source, stems[room]):
            yield f"{source.path}: no file of {room}/ is called so"
        if not room and source.path != "tests/test_house.py":
            yield f"{source.path}: in no room"


def _is_named_after(source: Source, stems: set[str]) -> bool:
    name = source.stem.removeprefix("test_")
    return any(
        name == stem or name.startswith(f"{stem}_") for stem in (each.strip("_") for each in stems) if stem
    )


@rule
def documents_name_files_that_exist() -> Iterator[str]:
    """Every path of a Python file in README, CONTRIBUTING, docs/ and docstrings is there;
    docs/architecture.md names every room.
    """
    paths = {source.path for source in sources()}
    folders = "|".join((*ROOMS, "benchmarks", "recipes", "tests"))
    texts = [
        (path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in ROOT.glob("docs/*.md")
    ]
    texts += [
        (name, (ROOT / name).read_text(encoding="utf-8"))
        for name in ("README.md", "CONTRIBUTING.md")
        if (ROOT / name).exists()
    ]
    for name, text in texts + [
        (source.path, source.text) for source in sources() if source.path != "tests/test_house.py"
    ]:
        for found in sorted(set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/]+\.py", text))):
            if found not in paths and found not in EXAMPLES:
                yield f"{name} {found}: does not exist"
    architecture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for room in ROOMS:
        if f"{room}/" not in architecture:
            yield f"docs/architecture.md: does not name {room}/"
