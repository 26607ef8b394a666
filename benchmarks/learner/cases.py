"""Makes what benchmarks/learner/ trains: random models, and batches with GSM8K's lengths at 4 characters a
token.
"""

from __future__ import annotations

import random
import socket
from typing import Any, NamedTuple

NUM_LENGTHS = 7473
QUESTION, ANSWER = (4.005, 0.379, 11, 247), (4.165, 0.484, 13, 307)
"""Tokens of GSM8K's questions and answers at 4 characters each: mean and deviation of the logarithm,
least, most.
"""
TEMPERATURE = 1.0


class Shape(NamedTuple):
    """Describes a model of random weights, and the batch it is trained on."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    groups: int
    budget_tokens: int
    rounds: int  # Steps timed, of which the median counts.
    short: bool = False  # Sums like the quickstart's instead of word problems.


SHAPES = (
    Shape("tiny model, sums", 96, 3, 15, groups=32, budget_tokens=8192, rounds=12, short=True),
    Shape("tiny model, GSM8K lengths", 96, 3, 15, groups=8, budget_tokens=8192, rounds=8),
    Shape("8M model, GSM8K lengths", 256, 10, 512, groups=8, budget_tokens=8192, rounds=6),
    Shape("23M model, GSM8K lengths", 512, 6, 8192, groups=8, budget_tokens=8192, rounds=5),
)
"""Micro-batches are of the default size; word problems are eight groups a step, whatever the model."""
GROUP_SIZE = 8
LAYOUT_SHAPE = Shape("5M model", 256, 4, 2048, groups=6, budget_tokens=0, rounds=3)


def gsm8k_lengths() -> list[tuple[int, int]]:
    """Returns (prompt, completion) tokens of as many rows as GSM8K's training set has, drawn with its
    distribution of lengths.
    """
    rng = random.Random(0)

    def draw(mean: float, deviation: float, least: int, most: int) -> int:
        return min(most, max(least, round(rng.lognormvariate(mean, deviation))))

    return [(draw(*QUESTION), draw(*ANSWER)) for _ in range(NUM_LENGTHS)]


def make_batch(shape: Shape, seed: int = 0, lengths: list[tuple[int, int]] | None = None) -> Any:
    """Returns a Batch of random tokens; the lengths of a group's completions are those of as many answers (of
    `lengths`: GSM8K's).
    """
    from core.records import Batch, Group, Sample, VersionSpan

    rng = random.Random(seed)
    lengths = lengths or ([(5, 2), (5, 3), (5, 3), (5, 4)] if shape.short else gsm8k_lengths())

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, shape.vocabulary) for _ in range(count))

    def sample(prompt: tuple[int, ...]) -> Any:
        count = rng.choice(lengths)[1]
        return Sample.one_turn(
            prompt,
            ids(count),
            (-2.0,) * count,
            version_spans=(VersionSpan(0, 0, count),),
            finish_reason="stop",
            text="",
            reward=float(rng.random() < 0.5),
            ref_logprob=-2.0 * count,
        )

    def group(number: int) -> Any:
        prompt = ids(rng.choice(lengths)[0])
        samples = tuple(sample(prompt) for _ in range(GROUP_SIZE))
        return Group(group_id=number, prompt_index=number, source_row=number, prompt="", samples=samples)

    groups = (group(number) for number in range(shape.groups))
    return Batch(0, tuple(groups))


def make_model(shape: Shape) -> Any:
    """Returns a Llama of random weights."""
    from recipes.arithmetic import make_llama

    model = make_llama(shape.vocabulary, hidden=shape.hidden, layers=shape.layers)
    model.config.use_cache = False
    return model


def load_model(config: Any, device: str) -> Any:
    """Returns the model saved for this config, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    return module.to(device)


def config_of(shape: Shape, model_dir: str, device: str) -> Any:
    """Returns a run's config for this shape."""
    from learner.catalogue import parse_config

    return parse_config(
        {
            "model": {"path": model_dir},
            "data": {"path": "unused", "max_prompt_tokens": 300},
            "rewards": {"functions": {"exact_match": 1.0}},
            "actors": {"max_new_tokens": 500, "temperature": TEMPERATURE},
            "learner": {
                "groups_per_step": shape.groups,
                "layout": "packed",
                "micro_batch_tokens": shape.budget_tokens,
                "num_gpus": float(device != "cpu"),
            },
            "objective": {"importance_weight": "none"},
        }
    )


def free_port() -> int:
    """Returns a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
