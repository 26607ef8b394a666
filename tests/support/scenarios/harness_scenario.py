"""What tests/actors/harness/test_episode_engine.py looks at: agents that play with a real engine, in a
process of its own.

    python -m tests.support.scenarios.harness_scenario MODEL_DIR OUT     groups, a line of hex digits each
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from actors.engine import Engine
from actors.groups import Groups, OpenGroup
from actors.playing.player import make_player
from actors.prompts import PromptRow
from actors.scored import group_of
from core.records import Group, WorkItem, encode
from tests.support.configs import make_config

AGENTS = "tests.support.environments.openai_agent"
GROUP_SIZE = 4
SEED = 77


def run(model_dir: Path) -> list[Group]:
    """Plays `solve` twice with the same seed, then `compare`, then `solve` while new weights come."""
    config = make_config(
        {"environments": {"solve": f"{AGENTS}:solve", "compare": f"{AGENTS}:compare"}},
        model={"path": str(model_dir)},
        data={"max_prompt_tokens": 400},
        actors={
            "group_size": GROUP_SIZE,
            "slots": 8,
            "max_new_tokens": 24,
            "max_turns": 4,
            "max_sequence_tokens": 900,
            "engine_memory": 1 / 64,
        },
        learner={"micro_batch_tokens": 1_000},
    )
    engine = Engine(config.model, config.actors, max_model_len=config.max_sequence_tokens)
    groups = Groups(engine, config.actors, player=make_player(config))
    found = []

    def play(ordinal: int, environment: str, each: Callable[[int], None] = lambda step: None) -> None:
        row = PromptRow(ordinal, "", (), {"prompt": "2+3?"}, environment=environment)
        item = WorkItem(ordinal, ordinal, SEED)
        groups.start(OpenGroup(item, row, [None] * GROUP_SIZE, temperature=1.0))
        step = 0
        while len(groups):
            for ended in groups.step():
                found.append(group_of(item, row, ended.members, "actor-0"))
            step += engine.num_unfinished > 0
            each(step)

    def update(step: int) -> None:
        if step in (6, 20) and engine.version < step:
            groups.update(step, load_file(model_dir / "model.safetensors").items())

    for ordinal, environment in enumerate(("solve", "solve", "compare")):
        play(ordinal, environment)
    play(3, "solve", update)
    groups.close()
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text("".join(encode(group).hex() + "\n" for group in run(Path(sys.argv[1]))))
