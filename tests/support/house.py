"""Reads this repository's Python files by their syntax: what tests/test_house.py judges, and what `make
tree` prints.

python -m tests.support.house      prints every folder and file with the first sentence of its docstring
"""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support import ROOT

ROOMS = ("core", "environments", "rewards", "buffer", "learner", "actors", "cluster")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """A Python file: its path below the root with `/`, its text, its syntax tree and all nodes of that."""

    path: str
    text: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]

    @property
    def room(self) -> str:
        """The top-level folder that it is in; `launch.py` is its own."""
        return self.path.partition("/")[0]

    @property
    def folder(self) -> str:
        """The folder that it lies in, below the root; empty for the root itself."""
        return self.path.rpartition("/")[0]

    @property
    def stem(self) -> str:
        """The file's name without `.py`."""
        return self.path.rpartition("/")[2].removesuffix(".py")

    @property
    def num_lines(self) -> int:
        """Lines of text."""
        return len(self.text.splitlines())

    @property
    def summary(self) -> str:
        """The first sentence of the docstring, on one line; empty without one."""
        return first_sentence(ast.get_docstring(self.tree) or "")

    def imports(self) -> Iterator[tuple[str, int]]:
        """Yields every module that is imported anywhere in the file, at its head or in a function, with the
        line.

        `from a.b import c` yields both `a.b` and `a.b.c`, as `c` may be a module.
        """
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield str(node.module), node.lineno
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)

    def functions(self) -> Iterator[Function]:
        """Yields every function and method, nested ones too."""
        yield from (node for node in self.nodes if isinstance(node, Function))

    def public(self) -> Iterator[tuple[str, Definition]]:
        """Yields the public functions and classes with their dotted names, and the public methods of public
        classes.
        """
        yield from _public(self.tree.body, "")


def _public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def first_sentence(text: str) -> str:
    """Returns the text's first paragraph up to its first full stop, on one line."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


@functools.cache
def sources() -> tuple[Source, ...]:
    """All Python files that git knows or would take in, in order of their paths."""
    listing = ["git", "ls-files", "-z", "-co", "--exclude-standard", "--", "*.py"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = sorted(path for path in listed.split("\0") if path and (ROOT / path).is_file())
    texts = ((path, (ROOT / path).read_text(encoding="utf-8")) for path in paths)
    parsed = ((path, text, ast.parse(text)) for path, text in texts)
    return tuple(Source(path, text, tree, tuple(ast.walk(tree))) for path, text, tree in parsed)


def production() -> list[Source]:
    """The rooms' files and `launch.py`: what a run executes."""
    return [source for source in sources() if source.room in (*ROOMS, "launch.py")]


def tree() -> str:
    """The tree: a line for each folder and file with what it is, in its own words."""
    lines, shown = [], set()
    for source in sorted(
        sources(), key=lambda source: (source.folder, source.stem != "__init__", source.stem)
    ):
        if source.folder not in shown:
            shown.add(source.folder)
            lines.append(f"\n{source.folder}/" if source.folder else "")
        name = source.path.rpartition("/")[2]
        if name != "__init__.py" or source.summary:
            lines.append(f"  {name:<28} {source.summary}")
    return "\n".join(lines).strip("\n")


if __name__ == "__main__":
    print(tree())
