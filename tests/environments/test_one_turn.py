"""The environment of a prompt and its answer."""

from environments import Turn
from environments.one_turn import OneTurn


def test_it_shows_the_prompt_and_is_over_with_the_first_answer() -> None:
    environment = OneTurn()
    assert environment.reset(prompt="1+1=", answer="2") == "1+1="
    assert environment.step("2") == Turn(observation="", done=True, reward=None), (
        "the reward functions score it"
    )
