"""Every command and example that README and its companions show, from what a clone holds and nothing beside
it: run here, or by the test that is named.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from buffer.order import Entry, Order
from buffer.sampling import GroupMeta, View
from launch import parser
from tests.support import ROOT
from tests.support.clone import BY_TEST, PYTHON, make_clone, run
from tests.support.pages import commands, examples

BY_DRY_RUN = [
    f"{PYTHON} train configs/quickstart.yaml",
    f"{PYTHON} train configs/quickstart_tools.yaml",
    f"{PYTHON} train configs/smollm2_sums.yaml",
    "launch.py train",
]
BY_MAKE = re.compile(r"make [a-z0-9-]+")


def namespace(name: str) -> dict[str, Any]:
    """What the example file called `name` defines, whatever its folder."""
    (text,) = (text for path, text in examples().items() if path.rpartition("/")[2] == name)
    found: dict[str, Any] = {}
    exec(compile(text, name, "exec"), found)
    return found


def dry_runs() -> list[str]:
    return [command for command in commands() if command.startswith(tuple(BY_DRY_RUN))]


def subcommands() -> list[str]:
    """The words that may follow launch.py; a sentence may name one without its arguments."""
    (actions,) = (action for action in parser()._actions if isinstance(action.choices, dict))
    assert actions.choices is not None
    return list(actions.choices)


def targets() -> list[str]:
    return [command for command in commands() if BY_MAKE.fullmatch(command)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows of this tree, in a folder with nothing beside it, and an environment as `make setup`
    leaves it.
    """
    folder = tmp_path_factory.mktemp("empty") / "clone"
    make_clone(folder)
    rows = [
        {"prompt": "1+1=", "answer": "2", "completion": text, "reward": float(text == "2")}
        for text in ("2", "3")
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_no_command_is_unaccounted_for() -> None:
    known = {*dry_runs(), *targets(), *BY_TEST, *(f"launch.py {name}" for name in subcommands())}
    assert len(commands()) > 20
    assert [command for command in commands() if command not in known] == []
    assert [command for command in BY_TEST if command not in commands()] == []


def test_the_tests_that_run_the_others_exist() -> None:
    for named in set(BY_TEST.values()):
        file, *path = named.split("::")
        (path_of_file,) = (ROOT / "tests").rglob(file)
        nodes: list[ast.stmt] = ast.parse(path_of_file.read_text(encoding="utf-8")).body
        for name in path:
            (found,) = [
                node
                for node in nodes
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
            ]
            nodes = found.body


@pytest.fixture
def written(clone: Path) -> Iterator[Path]:
    """The clone, with the files in it that the pages tell their reader to write."""
    files = {clone / name: text for name, text in examples().items()}
    for file, text in files.items():
        assert not file.exists()
        file.write_text(text)
    yield clone
    for file in files:
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("command", dry_runs())
def test_a_start_finds_everything_it_needs_in_a_clone(written: Path, command: str) -> None:
    if "smollm2" in command and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed: make setup")
    out = run(written, command.removesuffix(" --dry-run") + " --dry-run")
    assert "learner" in out
    assert not (written / "runs").exists()


@pytest.mark.parametrize("command", targets())
def test_a_target_of_make_names_what_there_is(clone: Path, command: str) -> None:
    recipe = run(clone, f"{command} --dry-run --old-file .venv/.ready PYTHON={sys.executable}")
    lines = [line for line in recipe.splitlines() if not line.startswith("touch")]
    assert lines
    for line in lines:
        for module in re.findall(r" -m (benchmarks[\w.]+)", line):
            path = clone / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        for config in re.findall(r"launch\.py train (\S+)", line):
            assert any(config in dry_run for dry_run in dry_runs())


def test_the_reward_of_readme_scores() -> None:
    closeness = namespace("closeness.py")["closeness"]
    assert closeness(completions=["12", "10", "no"], answer=["12"] * 3, max_terms=[2] * 3) == [
        1.0,
        1 / 3,
        0.0,
    ]


def test_the_sampler_of_the_pages_takes_the_least_used() -> None:
    groups = {number: GroupMeta(number, 0, 10, uses=uses) for number, uses in enumerate([2, 0, 1, 0])}
    order = Order(Entry(0, number, number) for number in groups)
    view = View(order, groups, None, Counter())  # type: ignore[arg-type]
    assert namespace("least_used.py")["least_used"](view, 3, 0, None) == [1, 3, 2]


def test_the_objective_of_readme_raises_the_best_samples() -> None:
    from learner.objectives import TokenBatch

    objective = namespace("best_of_n.py")["build"](None)
    batch = TokenBatch(
        logprobs_T=torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True),
        behaviour_logprobs_T=torch.zeros(4, dtype=torch.float64),
        sequence_T=torch.tensor([0, 0, 1, 1]),
        rewards_N=torch.tensor([1.0, 0.0], dtype=torch.float64),
        ref_logprobs_N=torch.zeros(2, dtype=torch.float64),
        groups_N=torch.tensor([7, 7]),
        staleness_N=torch.zeros(2, dtype=torch.float64),
        num_groups=1,
    )
    loss, diagnostics = objective.loss(batch)
    loss.backward()
    assert loss.item() == 1.0  # Two tokens of -1 nat, one of two samples.
    assert batch.logprobs_T.grad is not None
    assert batch.logprobs_T.grad.tolist() == [-0.5, -0.5, 0.0, 0.0]
    assert diagnostics["advantage"].tolist() == [1.0, 0.0]


def test_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_programs_of_the_environment_exist() -> None:
    for name in ("vllm", "ray", "wandb"):
        assert (Path(sys.prefix) / "bin" / name).is_file()


@pytest.mark.slow
def test_doctor_runs_in_a_clone(clone: Path) -> None:
    done = subprocess.run(
        [".venv/bin/python", "launch.py", "doctor"], cwd=clone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr  # What it says of this machine is its affair.
    assert "HOME" in done.stdout
    assert done.stderr == ""
    assert run(clone, ".venv/bin/python launch.py --help").startswith("usage: launch.py")
    assert run(clone, ".venv/bin/python launch.py config-reference") == (
        clone / "docs" / "config.md"
    ).read_text(encoding="utf-8")


def test_nothing_refers_to_a_folder_that_a_clone_lacks(clone: Path) -> None:
    outside = re.compile(r"""(?:^|[\s"'=(`])(?:\.\./[\w./-]+|/(?:work|root|home)/[\w./-]+)""", re.MULTILINE)
    places = (
        "README.md",
        "Makefile",
        "launch.py",
        "configs",
        "recipes",
        "docs",
        "actors",
        "buffer",
        "cluster",
        "learner",
        "rewards",
        "benchmarks",
    )
    files = [
        file
        for place in places
        for file in ([clone / place] if (clone / place).is_file() else (clone / place).rglob("*"))
    ]
    texts = [file for file in files if file.suffix in (".md", ".yaml", ".py", "") and file.is_file()]
    found = [
        (str(file.relative_to(clone)), match[0].strip())
        for file in texts
        for match in outside.finditer(file.read_text("utf-8"))
    ]
    assert len(texts) > 100
    assert found == []
