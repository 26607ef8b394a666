"""Runs vLLM by itself: what an actor is measured against."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actors.engine_settings import engine_arguments, set_engine_environment
from actors.prompts import PromptSet
from core.calls import Client, asks
from core.config import Config


class Spent(NamedTuple):
    """What a process has made so far, and what it has spent on it: its own CPU seconds, and a clock's."""

    tokens: float
    samples: float
    cpu_s: float
    wall_s: float

    def since(self, before: Spent) -> Spent:
        """Returns what came after `before`."""
        return Spent(*(mine - other for mine, other in zip(self, before, strict=True)))


class Pause(NamedTuple):
    """How long an engine stood still to load weights, by the clock and in CPU time of its thread."""

    wall_s: float
    cpu_s: float


class BareEngine:
    """`LLM.generate` on the prompts, as many samples of each as an actor draws, by the cheapest settings
    that give tokens and their log-probs: a prompt's samples are one request, without seeds and without text.
    """

    def __init__(self, config: Config, prompts: PromptSet) -> None:
        if config.actors.num_cpus < 1:
            os.nice(4)
        set_engine_environment(config.actors)
        from vllm import LLM, SamplingParams

        arguments = engine_arguments(
            config.model, config.actors, max_model_len=config.max_sequence_tokens, seed=0
        )
        self._llm = LLM(**arguments)
        self._config, self._prompts, self._row = config, prompts, 0
        self._params = SamplingParams(
            n=config.actors.group_size,
            temperature=config.actors.temperature,
            max_tokens=config.actors.max_new_tokens,
            logprobs=0,
            detokenize=False,
        )

    def generate(self, seconds: float) -> Spent:
        """Generates for about `seconds`, batch after batch, each of sixteen rounds of all slots: in the last
        of them slots are empty.
        """
        from vllm.inputs import TokensPrompt

        actors = self._config.actors
        num_prompts = max(1, 16 * actors.slots // actors.group_size)
        tokens, samples, start = 0, 0, Spent(0, 0, time.process_time(), time.perf_counter())
        while time.perf_counter() - start.wall_s < seconds:
            rows = [self._prompts[(self._row + number) % len(self._prompts)] for number in range(num_prompts)]
            self._row += num_prompts
            prompts = [TokensPrompt(prompt_token_ids=list(row.token_ids)) for row in rows]
            for output in self._llm.generate(prompts, self._params, use_tqdm=False):
                samples += len(output.outputs)
                tokens += sum(len(completion.token_ids) for completion in output.outputs)
        return Spent(tokens, samples, time.process_time(), time.perf_counter()).since(start)

    def load(self) -> Pause:
        """Loads the tensors of the model's file as vLLM's own transfer engines load what they receive."""
        from safetensors.torch import load_file

        tensors = list(load_file(Path(self._config.model.path, "model.safetensors")).items())
        config = self._llm.llm_engine.vllm_config.model_config
        return timed_pause(lambda: self._llm.apply_model(lambda model: _reload(model, tensors, config)))


class BareClient(Client):
    """A bare engine in a process of its own."""

    generate = asks(BareEngine.generate)
    load = asks(BareEngine.load)


def timed_pause(load: Any) -> Pause:
    """Calls `load` and returns how long it took."""
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    load()
    return Pause(time.perf_counter() - wall_s, time.thread_time() - cpu_s)


def _reload(model: Any, tensors: list[tuple[str, torch.Tensor]], model_config: Any) -> None:
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    model.load_weights(tensors)
    finalize_layerwise_reload(model, model_config)
