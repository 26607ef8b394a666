"""Episodes in real environments: the processes of the pool and the tokens of a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from actors.episode import Ask, Episode
from actors.playing.played import EpisodeLimits
from actors.playing.player import EnvironmentPlayer, Player, make_player
from actors.prompts import PromptRow
from recipes.arithmetic import make_tokenizer
from tests.support.clocks.waits import until
from tests.support.configs import actor_config
from tests.support.environments.sums import MARKS
from tests.support.playing import DigitSpeech, ScriptedPlaces, turns
from tests.support.said import generated

pytestmark = pytest.mark.timed


def answered(player: Player, episode: Episode) -> list[Ask]:
    """What the episode asks of the engine once its environment has answered."""

    def has_answered() -> bool:
        player.wait(episode.futures, 30.0)
        return episode.is_ready

    until(has_answered)
    return [*episode.poll()]


def test_without_environments_nothing_is_loaded_and_an_episode_is_a_prompt_and_its_answer() -> None:
    player = make_player(actor_config())
    assert not player.has_environments
    assert player.begin(PromptRow(0, "1+1=", (4, 13), {}), seed=1).poll() == (Ask((4, 13)),)


def test_an_environment_without_a_name_is_told_by_its_path() -> None:
    speeches = {"environment": DigitSpeech(), "game": DigitSpeech()}
    paths = {"environment": "mine:Game", "game": "mine:Game"}
    player = EnvironmentPlayer(ScriptedPlaces(turns(9)), speeches, EpisodeLimits(4, 8, 64), paths=paths)
    told = []
    for name in paths:
        episode = player.begin(PromptRow(0, "2", (), {}, environment=name), seed=1)
        episode.end_late({})
        told.append(episode.silence.partition(" had")[0])
    assert told == ["environment mine:Game:", "environment game:"]


def test_an_environment_in_its_process_is_played_in_tokens_and_ends_with_the_player(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARKS, str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    config = actor_config(
        model={"path": str(tiny_models["tied"])}, environments="tests.support.environments.sums:Twice"
    )
    tokenizer = make_tokenizer()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    player = make_player(config)
    assert isinstance(player, EnvironmentPlayer)
    messages = ({"role": "user", "content": "3+4="},)
    prompt = PromptRow(0, "3+4=", (), {"answer": "7"}, messages=messages, environment="environment")
    episode = player.begin(prompt, seed=1)
    (first,) = answered(player, episode)
    assert list(first.tokens)[-4:] == encode("3+4=")
    episode.act(0, generated(9, 1, text="6"))
    (second,) = answered(player, episode)
    assert list(second.tokens) == [*first.tokens, 9, 1, *encode("1+1=")]
    episode.act(1, generated(10, 1, text="7"))
    assert not answered(player, episode)
    sample = episode.sample()
    assert sample is not None
    assert (sample.turns, sample.error, sample.reward, sample.text) == (2, None, None, "7")
    assert sample.transcript == (("assistant", "6"), ("user", "1+1="), ("assistant", "7"))
    assert set(psutil.Process().children(recursive=True)) - before
    episode.close()
    player.close()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=60)
    assert not alive
