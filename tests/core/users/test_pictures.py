"""Pictures of attributes: what pickles is there, what does not says why, methods never are."""

from __future__ import annotations

import threading

import pytest

from core.users import pictures


class Game:
    """A game with attributes of all kinds."""

    level = 3

    def __init__(self) -> None:
        self.score = 0.5
        self.history = ["a", {"b": 1}]
        self.lock = threading.Lock()
        self.film = b"x" * (pictures.MAX_BYTES + 1)
        self._secret = 1

    @property
    def doubled(self) -> float:
        return 2 * self.score

    @property
    def broken(self) -> float:
        raise KeyError("no such thing")

    def play(self) -> None:
        self.score += 1


def test_public_attributes_are_shown_as_they_were():
    game = Game()
    shown = pictures.show(pictures.take(game))
    game.play()
    assert (shown.score, shown.history, shown.level, shown.doubled) == (0.5, ["a", {"b": 1}], 3, 1.0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lock", "cannot pickle"),
        ("broken", "KeyError"),
        ("film", "all together may take"),
        ("play", "no methods; keep what it needs in an attribute"),
        ("scores", "doubled, history, level, score"),
    ],
)
def test_what_is_not_there_says_why(name, why):
    with pytest.raises(AttributeError, match=why):
        getattr(pictures.show(pictures.take(Game())), name)


def test_it_is_read_only_and_has_nothing_of_an_episode_that_failed():
    with pytest.raises(AttributeError, match="cannot be set"):
        pictures.show(pictures.take(Game())).score = 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = pictures.show(None).score
    assert not hasattr(pictures.show(None), "_secret")
