"""What stands behind a path of `environments` is described without running it, or refused in one line."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from core.errors import ConfigError
from environments.spec import EnvironmentSpec, describe

MODULE = '''
import functools, os, sys, time
from environments import Turn


class Tools:
    """TRL's convention: reset, get_reward and _hidden are no tools."""

    def __init__(self, size: int = 3):
        self.size = size

    def reset(self, goal, **row): ...

    def add(self, a: int, b: list[float], kind: str = "x") -> int:
        """
        Adds.

        Args:
            a: One.
            b: Others.
            kind: Of what kind (choices: ["x", "y"])
        """

    @classmethod
    def look(cls) -> str:
        """Looks."""

    def get_reward(self): ...
    def close(self): ...
    def _hidden(self): ...


class Text:
    def reset(self, prompt, seed=0): ...
    def step(self, text): ...
    def render(self): ...


class AnnotatedText(Text):
    async def step(self, text: str) -> Turn:
        """Args: none."""


class StepTool:
    def reset(self): ...

    def step(self, action: str) -> str:
        """Steps.

        Args:
            action: What to do.
        """


class OnlyReward:
    def reset(self, **row): ...
    def get_reward(self): return 1.0


async def agent(client, question, seed, *, temperature=1.0): ...
def plain_agent(base_url, api_key, **row): ...
def factory(): return Tools(4)
partial = functools.partial(Tools, size=5)
slow_agent = functools.partial(agent, temperature=0.5)


class NoReset:
    def step(self, text): ...

class Nothing:
    def reset(self): ...

class Untyped:
    def reset(self): ...
    def guess(self, number):
        """Guesses.

        Args:
            number: One.
        """

class Undocumented:
    def reset(self): ...
    def guess(self, number: int): ...

def needy(size): ...
def broken(): raise RuntimeError("no room")
number = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "leaves.py").write_text("import os; os._exit(3)")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_said_what_each_is(module: Path) -> None:
    names = {
        "tools": "Tools?size=4",
        "text": "Text",
        "annotated": "AnnotatedText",
        "step_tool": "StepTool",
        "only_reward": "OnlyReward",
        "agent": "agent?temperature=0.5",
        "slow_agent": "slow_agent",
        "plain_agent": "plain_agent",
        "factory": "factory",
        "partial": "partial",
    }
    specs = describe({name: f"mine:{path}" for name, path in names.items()})
    assert {
        name: (spec.kind, spec.is_async, spec.has_reward, spec.columns) for name, spec in specs.items()
    } == {
        "tools": ("tools", False, True, ("goal",)),
        "text": ("turns", False, True, ("prompt",)),
        "annotated": ("turns", True, True, ("prompt",)),
        "step_tool": ("tools", False, False, ()),
        "only_reward": ("tools", False, True, ()),
        "agent": ("harness", True, True, ("question",)),
        "slow_agent": ("harness", True, True, ("question",)),
        "plain_agent": ("harness", False, True, ()),
        "factory": ("tools", False, True, ("goal",)),
        "partial": ("tools", False, True, ("goal",)),
    }
    functions = [tool["function"] for tool in specs["tools"].tools]
    assert [function["name"] for function in functions] == ["add", "look"]
    assert functions[0]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "One."},
            "b": {"type": "array", "items": {"type": "number"}, "description": "Others."},
            "kind": {"type": "string", "enum": ["x", "y"], "description": "Of what kind"},
        },
        "required": ["a", "b"],
    }
    assert specs["factory"].tools == specs["partial"].tools == specs["tools"].tools
    assert [tool["function"]["name"] for tool in specs["step_tool"].tools] == ["step"]
    assert isinstance(specs["text"], EnvironmentSpec)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("mine:Tool", ["module mine has no 'Tool'", "did you mean 'Tools'"]),
        ("mines:Tools", ["no module named 'mines'", "working directory"]),
        ("leaves:Tools", ["the process that imported it died: it exited with code 3"]),
        ("mine:NoReset", ["NoReset has no reset(**row)"]),
        ("mine:Nothing", ["no step(text), no public method", "get_reward"]),
        ("mine:Untyped", ["its method 'guess' is no tool", "type hint", "begins with _"]),
        ("mine:Undocumented", ["its method 'guess' is no tool", "docstring"]),
        ("mine:number", ["it is int, expected a class or a function"]),
        ("mine:needy", ["a function is a harness if it is async", "this one needs size"]),
        ("mine:broken", ["making one raised RuntimeError: no room"]),
        ("mine:Tools?length=3", ["'length'", "it takes size"]),
        ("mine:Tools?size", ["'size' behind the ? is no argument", "name=value"]),
    ],
)
def test_what_is_none_is_told_in_one_line(module: Path, path: str, told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({"game": path})
    message = str(caught.value)
    assert message.startswith(f"environments.game = {path}: ")
    assert "\n" not in message
    assert all(part in message for part in told), message
