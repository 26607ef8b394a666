"""`launch.py train CONFIG --dry-run` tells the resolved config, what it asks of the machines, and what a
start would find.

It starts nothing, makes no model, and leaves no file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from actors.prompts import PromptSet
from actors.sources import TRAIN_SPLIT, read_source
from cluster.preparation import placement
from cluster.preparation.cards import check_cards
from cluster.preparation.prepare import (
    Checked,
    check_inputs,
    check_start,
    locate_model,
    model_to_make,
    quiet_libraries,
)
from core.config import Config
from core.config.evaluation import HELD_OUT
from rewards.hosted import models_of

NO_PROMPTS = PromptSet(rows=[], num_bad_rows=0, source="none")


def dry_run(config: Config) -> Iterator[str]:
    """Yields the text part by part, each as soon as it is known. Raises the AgroError that a start would end
    with.
    """
    sys.dont_write_bytecode = True  # Reward functions and recipes are imported.
    quiet_libraries()
    models = models_of(config).values()
    place = placement.available(config.actors, config.learner, models)
    yield placement.dry_run(config, place)
    yield "checks"
    config = locate_model(config)
    yield f"  run            {check_start(config)}"
    if path := model_to_make(config.model):
        yield f"  model          {config.model.make} would make {path}"
        named = [("data.path", name) for name in config.data.sources]
        if config.data.offline_source is not None:
            named.append(("data.offline", config.data.offline_source))
        for key, name in named:
            source = read_source(key, name, TRAIN_SPLIT)
            yield f"  {key:<14} {len(source.rows)} {source.unit}s of {source.name}"
        yield (
            "  not checked    what needs the model: tokenizer, prompts, vocabulary, positions. "
            "Make it by a start, then ask again"
        )
        what = "what was checked"
    else:
        yield from _told(check_inputs(config))
        what = "this"
    # Its warnings are told above.
    placement.check_for(config, placement.bundles(config.actors, config.learner, models), place[1])
    check_cards(config, place[1])
    yield f"a start would find nothing wrong with {what} before its engines load"


def _told(checked: Checked) -> Iterator[str]:
    """Yields what was read, in lines."""
    yield from (_prompts("prompts", part) for part in checked.prompts.split())
    for suite, prompts in checked.eval_prompts.items() or [(HELD_OUT, NO_PROMPTS)]:
        title = "held out" if suite == HELD_OUT else f"suite {suite}"
        yield from (_prompts(title, part) for part in prompts.split())
    yield f"  W&B            {checked.wandb_mode}"
    yield from (f"  {note}" for note in checked.notes)


def _prompts(title: str, prompts: PromptSet) -> str:
    if not prompts.rows:
        return f"  {title:<14} none"
    by_length = sorted(prompts.rows, key=lambda row: len(row.token_ids))
    shortest, median, longest = (len(by_length[index].token_ids) for index in (0, len(by_length) // 2, -1))
    bad = f", {prompts.num_bad_rows} bad rows left out" if prompts.num_bad_rows else ""
    return (
        f"  {title:<14} {len(prompts)} of {prompts.source}{bad}; tokens: {shortest} to {longest}, median "
        f"{median}; "
        f"the longest is row {by_length[-1].source_row + 1}"
    )
