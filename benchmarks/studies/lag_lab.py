"""One training run in one process, at an enforced lag: the staleness study's instrument.

    rows --> groups by the current policy --> LaggedReplay (sampler oldest) --> Updater --> step

The buffer's index, the objectives, the packing, the update and its metrics are the system's own; only the
engine (a plain sampler instead of vLLM), ZeRO-3 (AdamW with its settings) and Ray are left out, so that
hundreds of runs fit into an hour. A policy is published every step, so a sample that `LaggedReplay` hands out
at lag L was generated exactly L steps ago (from step L on; before, the base policy's samples, which nothing
older exists than: at lag L the first L + 1 steps). Every run generates one batch a step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.lagged_replay import LaggedReplay
from buffer.admission import work_item
from buffer.replay import meta_of
from core.config import Config
from core.errors import ConfigError
from core.records import Batch, Group, Sample, VersionSpan
from learner.objectives import load_objective
from learner.progress import learning_rate
from learner.step.frozen import frozen_names
from learner.step.packing import ModelInputs, token_logprobs
from learner.step.share import Share
from learner.step.update import Updater

Score = Callable[[Sequence[int], dict[str, Any]], float]


class PlainPolicy:
    """A Hugging Face model with AdamW and nothing else, with the methods that the learner's update asks of a
    policy.
    """

    shares_beginnings = False  # transformers' own masks keep the sequences apart.

    def __init__(self, config: Config, *, trained: bool) -> None:
        from transformers import AutoModelForCausalLM

        self.module: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        self.module.requires_grad_(trained)
        self._grad_clip = config.learner.grad_clip
        if trained:
            self._optimizer = torch.optim.AdamW(
                self.module.parameters(),
                lr=config.learner.lr,
                betas=(0.9, 0.99),
                eps=1e-8,
                weight_decay=config.learner.weight_decay,
            )

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor:
        """Returns [T] the log-probs of the sampled tokens, nats."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and next(self.module.parameters()).requires_grad):
            return token_logprobs(self.module(**inputs.model_kwargs()).logits, inputs, temperature)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient."""
        del last
        loss.backward()

    def step(self, lr: float) -> float:
        """Takes one optimizer step at learning rate `lr`; returns the gradient's norm."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._grad_clip))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def own_weights(self, bucket_bytes: int) -> Iterable[tuple[str, Tensor]]:
        """Yields the weights as they are."""
        del bucket_bytes
        return ((name, parameter.data) for name, parameter in self.module.named_parameters())

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights."""
        parameters = dict(self.module.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)


@dataclass(frozen=True)
class Task:
    """Prompts as token ids with whatever `score(completion ids, row)` needs; with `eos_id` None completions
    have full length.
    """

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    score: Score
    eos_id: int | None


@torch.no_grad()
def sample(
    module: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    eos_id: int | None,
    generator: torch.Generator,
) -> list[tuple[list[int], list[float]]]:
    """Returns (completion ids, their log-probs) for each prompt; prompts are padded on the left, one forward
    pass with cache a token.
    """
    from transformers import DynamicCache

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + [*prompt] for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache, alive = DynamicCache(), torch.ones(len(prompts), dtype=torch.bool)
    tokens, logprobs, lived = [], [], []
    position = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(max_new_tokens):
        out = module(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        distribution = (out.logits[:, -1] / temperature).log_softmax(-1)
        chosen = torch.multinomial(distribution.exp(), 1, generator=generator)
        tokens.append(chosen[:, 0])
        logprobs.append(distribution.gather(1, chosen)[:, 0])
        lived.append(alive)
        alive = alive & (chosen[:, 0] != eos_id) if eos_id is not None else alive
        if not alive.any():
            break
        ids, position = chosen, position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)
    lengths = torch.stack(lived, 1).sum(1).tolist()
    columns = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), lengths, strict=True)
    return [(row[:length], values[:length]) for row, values, length in columns]


class LagRun:
    """One run of `config` (its learner and objective sections are the method) on `task`, at a lag of `lag`
    learner steps.

    `engine_noise`: standard deviation, nats a token, of noise on the behaviour log-probs. `fresh_groups`: so
    many groups of each batch are of the current policy, whatever the lag of the others. Raises ConfigError
    for an objective that needs samples of the current policy where none is ever fresh.
    """

    def __init__(
        self, config: Config, task: Task, lag: int, *, engine_noise: float = 0.0, fresh_groups: int = 0
    ) -> None:
        self._config, self._task, self._noise = config, task, engine_noise
        self._num_fresh, self._num_lagged = fresh_groups, config.learner.groups_per_step - fresh_groups
        torch.manual_seed(config.run.seed)
        self._generator = torch.Generator().manual_seed(config.run.seed)
        objective = load_objective(config.objective)
        if "freshness" in objective.needs and lag and not fresh_groups:
            raise ConfigError(
                f"lag = {lag}: none is ever fresh, and {config.objective.name} needs samples of the current policy. "
                "Set objective.on_policy_coef=0."
            )
        self.policy = PlainPolicy(config, trained=True)
        frozen = {name: PlainPolicy(config, trained=False) for name in frozen_names(objective)}
        self._updater = Updater(config, self.policy, objective, frozen, pad_id=0, device=torch.device("cpu"))
        self._replay = LaggedReplay(config.buffer, config.run.seed, lag)
        self._groups: dict[int, Group] = {}
        self._frontier = 0

    def run(self, eval_every: int) -> list[dict[str, float]]:
        """Runs all steps; returns one row per `eval_every` steps: step, held-out reward, and the step's
        metrics.
        """
        rows = [{"step": 0.0, "held_out": self.evaluate()}]
        config = self._config
        for step in range(config.run.steps):
            # Before anything is old enough, more groups of the base policy: a batch a step from the first
            # step on.
            batch = self._batch(step)
            metrics = self._updater.update(
                Share.of(batch), learning_rate(step, config.learner, config.run.steps)
            ).metrics()
            if (step + 1) % eval_every == 0:
                rows.append({"step": step + 1.0, "held_out": self.evaluate(), **metrics})
        return rows

    def _batch(self, step: int) -> Batch:
        lag = self._replay.lag
        # What is generated from here on would be trained on by nobody.
        is_last = step + lag >= self._config.run.steps
        if step == 0:
            self._generate(0, min(lag + 1, self._config.run.steps))
        elif not is_last:
            self._generate(step, 1)
        chosen = self._replay.take(self._num_lagged, step, is_full=is_last)
        self._replay.pop_evicted()
        assert chosen, f"no batch at step {step}"
        fresh = self._groups_by(step, self._num_fresh)
        return Batch(step, (*(self._groups.pop(group_id) for group_id in chosen), *fresh))

    def _generate(self, version: int, num_batches: int) -> None:
        for _ in range(num_batches):
            for group in self._groups_by(version, self._num_lagged):
                self._groups[group.group_id] = group
                self._replay.insert(meta_of(group))

    def _groups_by(self, version: int, num_groups: int) -> list[Group]:
        """Returns the next groups of the prompt stream, generated by the current policy."""
        if not num_groups:
            return []
        seed, size = self._config.run.seed, self._config.actors.group_size
        items = [
            work_item(self._frontier + number, seed=seed, num_prompts=len(self._task.train))
            for number in range(num_groups)
        ]
        self._frontier += num_groups
        rows = [self._task.train[item.prompt_index] for item in items]
        made = iter(self._sample([row["ids"] for row in rows for _ in range(size)]))
        return [
            Group(
                group_id=item.ordinal,
                prompt_index=item.prompt_index,
                source_row=item.prompt_index,
                prompt="",
                samples=tuple(self._sample_of(next(made), row, version) for _ in range(size)),
            )
            for item, row in zip(items, rows, strict=True)
        ]

    def _sample(
        self, prompts: list[Sequence[int]], temperature: float | None = None
    ) -> list[tuple[list[int], list[float]]]:
        actors = self._config.actors
        return sample(
            self.policy.module,
            prompts,
            actors.max_new_tokens,
            temperature or actors.temperature,
            self._task.eos_id,
            self._generator,
        )

    def _sample_of(self, made: tuple[list[int], list[float]], row: dict[str, Any], version: int) -> Sample:
        tokens, logprobs = made
        if self._noise:  # As of an engine whose kernels differ from the learner's.
            logprobs = (
                torch.tensor(logprobs) + self._noise * torch.randn(len(logprobs), generator=self._generator)
            ).tolist()
        return Sample.one_turn(
            row["ids"],
            tokens,
            logprobs,
            version_spans=(VersionSpan(version, 0, len(tokens)),),
            finish_reason="stop",
            text="",
            reward=self._task.score(tokens, row),
        )

    def evaluate(self) -> float:
        """Returns the mean reward of `eval.samples` completions of each held-out prompt, at the training
        temperature.
        """
        rows = [row for row in self._task.test for _ in range(self._config.eval.samples)]
        made = self._sample([row["ids"] for row in rows])
        return sum(self._task.score(tokens, row) for (tokens, _), row in zip(made, rows, strict=True)) / len(
            rows
        )


def arithmetic_task(model_dir: str, rows_dir: str) -> Task:
    """Returns the quickstart's sums as a task: reward 1 for exactly the right answer, ended."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def rows(name: str) -> list[dict[str, Any]]:
        lines = (Path(rows_dir) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [
            {
                "ids": tokenizer(row["prompt"])["input_ids"],
                "answer": [*tokenizer(row["answer"])["input_ids"], 1],
            }
            for row in found
        ]

    return Task(
        rows("train"),
        rows("test"),
        lambda tokens, row: float([*tokens] == row["answer"]),
        tokenizer.eos_token_id,
    )


def timed(run: LagRun, eval_every: int) -> tuple[list[dict[str, float]], float]:
    """Returns what `run.run(eval_every)` returns, and the seconds it took."""
    start_s = time.perf_counter()
    return run.run(eval_every), time.perf_counter() - start_s
