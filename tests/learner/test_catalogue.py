"""Objectives as files: one that cannot be used is told of in a line, with what is wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import learner.objectives
from core.config.files import ConfigFiles
from core.errors import ConfigError
from learner import catalogue
from tests.support.configs import make_config

KNOBS = "from core.config import ObjectiveConfig\nclass Config(ObjectiveConfig):\n    name: str = 'mine'\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def build(config:\n", "importing learner.objectives.mine raised SyntaxError: "),
        ("import nobody_has_it\n", "needs a package that is not installed: No module named 'nobody_has_it'"),
        ("raise ValueError('not today')\n", "raised ValueError: not today"),
        ("class Confg: ...\n", "has no 'Config'; did you mean 'Confg'?"),
        ("class Config: ...\n", "is no class of knobs; derive it from ObjectiveConfig"),
        (KNOBS, "has no 'build'"),
    ],
)
def test_an_objective_that_cannot_be_used_is_told_of_in_a_line(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_config().model_dump(mode="json")
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(learner.objectives, "__path__", [str(tmp_path)])
    monkeypatch.setattr(catalogue, "_FOLDER", tmp_path)
    monkeypatch.delitem(sys.modules, "learner.objectives.mine", raising=False)
    with pytest.raises(ConfigError) as caught:
        ConfigFiles(catalogue._Objectives()).parse({**tree, "objective": {"name": "mine"}})
    sys.modules.pop("learner.objectives.mine", None)
    _, line = str(caught.value).splitlines()
    assert line.startswith("  - objective.name = 'mine': ")
    assert told in line
