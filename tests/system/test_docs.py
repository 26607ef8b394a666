"""What the documentation names is there: files, functions, links."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from cluster.deaths import KINDS, as_markdown
from core.config import Config
from learner.catalogue import OBJECTIVES
from tests.support import ROOT
from tests.support.pages import PAGES, examples

NAMED = re.compile(r"`((?:[\w-]+/)+\w+\.py|launch\.py):([\w.]+)`")
FILE = re.compile(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|md|txt|jsonl|csv|png|html))`")
LINK = re.compile(r"\]\(([^)#\s]*)(#[\w-]+)?\)")
OF_A_RUN = ("logs/", "policy/", "checkpoints/", "RUN_DIR/", "bad-batches/")


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes, `Class.method`s and module-level names that the file defines."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (ast.FunctionDef, ast.AsyncFunctionDef)
            found |= {f"{node.name}.{entry.name}" for entry in node.body if isinstance(entry, methods)}
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def prose(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_that_a_page_names_exists(page: Path) -> None:
    named = NAMED.findall(prose(page))
    missing = [
        f"{file}:{name}"
        for file, name in named
        if not (ROOT / file).is_file() or name not in names_in(ROOT / file)
    ]
    assert missing == []


def test_the_tables_of_deaths_are_those_that_the_run_goes_by() -> None:
    assert as_markdown() in (ROOT / "docs" / "deaths.md").read_text(encoding="utf-8")


def test_readme_tells_of_every_kind_of_process_that_dies() -> None:
    table = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("| what dies |")[2].partition("\n\n")[0]
    )
    assert [kind.name for kind in KINDS if kind.name not in table] == []


def test_the_walk_names_a_function_at_every_step() -> None:
    assert len(NAMED.findall(prose(ROOT / "docs" / "walk.md"))) >= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = [name for name in FILE.findall(prose(page)) if not name.startswith(OF_A_RUN)]
    missing = [name for name in named if not (ROOT / name).exists() and name not in examples()]
    assert missing == []


def fields() -> set[str]:
    """Every `section.key` of a config, those of all objectives among them."""
    found = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    }
    return found | {f"objective.{key}" for knobs in OBJECTIVES.values() for key in knobs.model_fields}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_field_that_a_page_names_exists(page: Path) -> None:
    sections = "|".join(name for name in Config.model_fields if name != "environments")
    named = re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+)(?=[=`: ,;)]|$)", prose(page), re.MULTILINE)
    files = {"run.lock", "rewards.judge"}
    assert sorted({name for name in named if name not in fields()} - files) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        if target.startswith("http"):
            continue
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{page.name} links to {target}{anchor}"
