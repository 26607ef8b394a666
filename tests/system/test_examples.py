"""The examples of the pages on environments and evaluation are the files beside them, and work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fake_engine import FakeEngine
from cluster.cli import evaluate as module
from core.config import Config
from core.users import pictures
from environments import ToolCall
from environments.pool import EnvironmentPool, Place
from environments.spec import describe
from learner.catalogue import load_config
from tests.support import ROOT
from tests.support.environments.chat_server import ChatServer
from tests.support.environments.places import TurningPool

pytestmark = pytest.mark.timed

EXAMPLES = ROOT / "docs" / "examples"
SHOWN = [
    ("environments.md", "library.py", "python"),
    ("environments.md", "higher_lower.py", "python"),
    ("environments.md", "agent.py", "python"),
    ("evaluation.md", "suites.yaml", "yaml"),
    ("evaluation.md", "closeness.py", "python"),
]
PATHS = {"library": "library:Library", "game": "higher_lower:HigherLower", "agent": "agent:agent"}


@pytest.mark.parametrize(("page", "name", "language"), SHOWN)
def test_the_page_shows_the_file(page: str, name: str, language: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    shown = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"```{language}\n# docs/examples/{name}\n{text}```" in shown


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    """A pool of them, as of a run that is started in their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLES)
        patch.setattr(sys, "dont_write_bytecode", True)
        specs = describe(PATHS)
        assert {name: spec.kind for name, spec in specs.items()} == {
            "library": "tools",
            "game": "turns",
            "agent": "harness",
        }
        with TurningPool(specs.values(), 30.0, 2**30) as pool:
            yield pool


def began(place: Place) -> object:
    return place.reset().result(60).observation


def test_the_library_is_looked_up(pool: EnvironmentPool) -> None:
    place = pool.open("library", {"prompt": "How tall is a llama?", "answer": "1.7 m"}, 0)
    assert began(place) == "\nUse the tools to answer."
    turn = place.act(
        "", (ToolCall("look_up", {"word": "llama"}), ToolCall("look_up", {"word": "lama"}))
    ).result(60)
    assert isinstance(turn.observation, tuple)
    assert [message["content"] for message in turn.observation] == [
        "A llama is 1.7 m tall.",
        "{'error': \"'lama'\"}",
    ]
    place.act("", (ToolCall("give_answer", {"answer": "1.7 m"}),)).result(60)
    turn = place.act("It is 1.7 m tall.").result(60)
    assert (turn.done, turn.reward) == (True, 1.0)
    assert pictures.show(turn.attributes).num_looks == 2


def test_the_game_is_played(pool: EnvironmentPool) -> None:
    place = pool.open("game", {"prompt": "Guess.", "answer": "7"}, 0)
    assert began(place) == ""
    assert [place.act(text).result(60).observation for text in ("4", "9")] == ["higher", "lower"]
    turn = place.act("7").result(60)
    assert (turn.done, turn.reward) == (True, 1.0)


def test_the_agent_asks_three_times(pool: EnvironmentPool) -> None:
    with ChatServer(lambda messages: f"{len(messages)}") as server:
        turn = pool.open("agent", {"question": "5?", "answer": "5"}, 0).run(server.url, "key").result(60)
    assert (turn.done, turn.reward) == (True, 1.0)
    assert [len(messages) for messages in server.asked] == [1, 3, 5]


def test_the_suites_are_what_the_page_says() -> None:
    config = load_config(EXAMPLES / "suites.yaml")
    found = {
        suite.name: (suite.rows, suite.samples, suite.temperature, suite.every) for suite in config.suites
    }
    assert found == {
        "held_out": (100, 4, 1.0, 100),
        "many": (50, 16, 1.0, 100),
        "greedy": (50, 1, 0.0, 50),
        "near": (50, 4, 1.0, 100),
    }


def test_evaluate_runs_the_suites(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(config: Config) -> FakeEngine:
        return FakeEngine(config.actors, num_tokens=(2, 3), version=0)

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "closeness.py").write_bytes((EXAMPLES / "closeness.py").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(module, "_make_engine", make)
    found = module.evaluate(
        str(tiny_models["tied"]),
        config_path=str(EXAMPLES / "suites.yaml"),
        suites=["near", "greedy"],
        out="out",
    )
    near, greedy = ({result.suite: result for result in found.results}[name] for name in ("near", "greedy"))
    assert (near.num_errors, near.num_samples, greedy.num_samples) == (0, 200, 50)
    assert 0.0 < near.solve_rate < 1.0, "between right and wrong"
    assert greedy.solve_rate == greedy.metrics["avg@1"] == greedy.metrics["pass@1"]
