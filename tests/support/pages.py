"""The pages of documentation, as tests read them: which there are, which commands and files they show."""

from __future__ import annotations

import re

from tests.support import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A block of a page, its language and its text. What is typed in a shell is in blocks of `sh`."""
WITH_COMMANDS = (
    *("README.md", "CONTRIBUTING.md"),
    *("docs/running.md", "docs/cluster.md", "docs/deaths.md", "docs/extending.md", "docs/scoring.md"),
)
PROGRAMS = (
    *("make ", "launch.py ", ".venv/", "python ", "python3 ", "ray ", "wandb ", "vllm "),
    *("pip ", "uv ", "export ", "git ", "docker "),
)
"""What a command within a sentence begins with."""


def commands() -> list[str]:
    """Returns the commands in the pages' `sh` blocks, without comments, and those within their sentences."""
    found: list[str] = []
    for text in _texts():
        lines = [line for kind, block in BLOCK.findall(text) if kind == "sh" for line in block.splitlines()]
        found += [re.split(r"\s+#", line)[0].strip() for line in lines if line.strip()]
        within = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        found += [words for words in within if words.startswith(PROGRAMS)]
    return list(dict.fromkeys(found))


def examples() -> dict[str, str]:
    """Returns, by name, the complete Python files that the pages show: blocks that begin with a comment that
    names the file.
    """
    blocks = [block for text in _texts() for kind, block in BLOCK.findall(text) if kind == "python"]
    named = {match[1]: block for block in blocks if (match := re.match(r"# ([\w/]+\.py)", block))}
    assert len(named) >= 3
    return named


def _texts() -> list[str]:
    return [(ROOT / name).read_text(encoding="utf-8") for name in WITH_COMMANDS]
