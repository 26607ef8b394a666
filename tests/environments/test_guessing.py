"""The guessing game: fewer guesses are worth more."""

from __future__ import annotations

from environments import Turn
from environments.guessing import Guessing


def test_a_game_is_won_in_some_turns() -> None:
    game = Guessing(max_guesses=4)
    assert game.reset(answer="40", prompt="Guess.") is None
    assert game.step("Is it 50?") == Turn("Lower.", done=False)
    assert game.step("25") == Turn("Higher.", done=False)
    assert game.step("Not 25, so 40") == Turn("Right.", done=True, reward=0.5)
    assert game.guesses == [50, 25, 40]


def test_a_game_is_lost_after_its_guesses() -> None:
    game = Guessing(max_guesses=2)
    assert "from 1 to 100. You have 2 guesses" in str(game.reset(answer=7))
    assert game.step("I do not know") == Turn("That is no number.", done=False)
    assert game.step("8") == Turn("No. It was 7.", done=True, reward=0.0)
