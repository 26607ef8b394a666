"""The examples of docs/environments.md are the files beside it, and play as it says."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from core.users import pictures
from environments import ToolCall
from environments.pool import EnvironmentPool, Place
from environments.spec import describe
from tests.support import ROOT
from tests.support.environments.chat_server import ChatServer
from tests.support.environments.places import TurningPool

pytestmark = pytest.mark.timed

EXAMPLES = ROOT / "docs" / "examples"
FILES = ("library.py", "higher_lower.py", "agent.py")
PATHS = {"library": "library:Library", "game": "higher_lower:HigherLower", "agent": "agent:agent"}


@pytest.mark.parametrize("name", FILES)
def test_the_page_shows_the_file(name: str) -> None:
    page = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert f"```python\n# docs/examples/{name}\n{text}```" in page


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
