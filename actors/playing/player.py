"""Begins the episodes of an actor: prompts and their answers, or what the config's `environments` are.

Without environments this costs nothing: no tokenizer is loaded, no process started.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, cast

from actors.dialogue import Dialogue
from actors.episode import Episode
from actors.playing.played import EpisodeLimits, Played, PlayedEpisode, Speech
from actors.prompts import PromptRow
from core.config import Config
from core.config.environments import all_paths
from core.text import shown_name
from core.tokenizer import end_token_ids, load_tokenizer
from environments.pool import EnvironmentPool
from environments.spec import describe

if TYPE_CHECKING:
    from actors.harness.episode import Harnesses, Led


class Player:
    """Begins episodes of one turn."""

    has_environments = False

    def begin(self, prompt: PromptRow, seed: int) -> Episode:
        """Returns a new episode of `prompt`; `seed` is what its environment draws from."""
        del seed
        return Episode(prompt.token_ids)

    def turn(self) -> None:
        """Sends to environments what they are asked, and takes what they have answered."""

    def wait(self, futures: Iterable[Future[Any]], timeout_s: float) -> None:
        """Waits until one of `futures` is done, or an environment has said something; at most for so long."""
        if awaited := list(futures):
            concurrent.futures.wait(awaited, timeout_s, concurrent.futures.FIRST_COMPLETED)
        else:
            time.sleep(timeout_s)

    def close(self) -> None:
        """Ends all environments."""


class Places(Protocol):
    """The places where environments are played; `environments.pool.EnvironmentPool` says more of them."""

    def open(self, name: str, row: Mapping[str, Any], seed: int) -> Played:
        """Returns a place for an episode."""
        ...

    def turn(self) -> None:
        """Sends what they are asked, and takes what they have answered."""
        ...

    def wait(self, futures: Iterable[Future[Any]], timeout_s: float) -> None:
        """Waits for one of `futures`, and gives turns meanwhile."""
        ...

    def close(self) -> None:
        """Ends all of them."""


class EnvironmentPlayer(Player):
    """Begins episodes of several turns in `places`; `speeches` says by the environment's name how its
    conversations are written, and `harnesses` begins those that a harness leads. `paths` by name are
    shown of environments to which the user gave no name.
    """

    has_environments = True

    def __init__(
        self,
        places: Places,
        speeches: Mapping[str, Speech],
        limits: EpisodeLimits,
        harnesses: Harnesses | None = None,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        self._places, self._speeches, self._limits = places, speeches, limits
        self._harnesses, self._paths = harnesses, paths or {}

    def begin(self, prompt: PromptRow, seed: int) -> Episode:
        """Returns a new episode of `prompt` in its environment, which is being reset."""
        name = prompt.environment
        if name is None:
            return super().begin(prompt, seed)
        shown = shown_name(name, self._paths.get(name, name))
        place = self._places.open(name, prompt.columns, seed)
        if self._harnesses is not None and name in self._harnesses.names:
            return self._harnesses.begin(shown, cast("Led", place))
        return PlayedEpisode(shown, place, self._speeches[name], prompt.messages or (), self._limits)

    def turn(self) -> None:
        """Sends to environments what they are asked, and takes what they have answered."""
        self._places.turn()

    def wait(self, futures: Iterable[Future[Any]], timeout_s: float) -> None:
        """Waits until one of `futures` is done, or an environment has said something; at most for so long."""
        self._places.wait(futures, timeout_s)

    def close(self) -> None:
        """Ends all environments."""
        self._places.close()
        if self._harnesses is not None:
            self._harnesses.close()


def make_player(config: Config) -> Player:
    """Returns what begins the episodes of a run and its suites. Raises ConfigError, in one line, when an
    environment cannot be loaded.
    """
    paths = all_paths(config)
    if not paths:
        return Player()
    actors, data = config.actors, config.data
    specs = describe(paths)
    tokenizer = load_tokenizer(config.model)
    end_ids = end_token_ids(config.model, tokenizer)
    speeches = {
        name: Dialogue(tokenizer, spec.tools, data.template_options, data.chat_template, end_ids=end_ids)
        for name, spec in specs.items()
    }
    limits = EpisodeLimits(actors.max_turns, actors.max_new_tokens, config.max_sequence_tokens)
    harnesses = None
    if names := [name for name, spec in specs.items() if spec.kind == "harness"]:
        from actors.harness.episode import Harnesses  # Brings an HTTP server, which no other run needs.
        from actors.harness.recording import Dialogues

        dialogues = Dialogues(tokenizer, data.template_options, data.chat_template, end_ids=end_ids)
        harnesses = Harnesses(names, dialogues, limits, actors.endpoint_host)
    places = EnvironmentPool(specs.values(), actors.turn_timeout_s, round(config.rewards.memory_gib * 2**30))
    return EnvironmentPlayer(places, speeches, limits, harnesses, paths)
