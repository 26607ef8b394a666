"""Trains a job by the plainest loop of this system's own parts: all samples of a step are generated, then one
step is taken, in one process, with all cores for each half in turn.

    python -m benchmarks.peers.plain_sync CONFIG.yaml ROWS.jsonl

    episodes --asks--> vLLM --generations--> samples --rewards--> packed forward and backward --AdamW--> vLLM

No buffer, no Ray, no ZeRO-3, no metrics, nothing that survives a fault: what is left is what a person would
write in an afternoon with vLLM and PyTorch. One line of ROWS.jsonl is written after each step, until the
process is ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # As in a run of ours.

import msgspec
import torch

from actors.engine import Engine
from actors.episode import Episode
from actors.playing.player import make_player
from actors.prompts import PromptRow, load_prompts
from benchmarks.peers.countdown import counts_down
from buffer.admission import work_item
from core.config import Config
from core.records import Sample
from core.tokenizer import load_tokenizer
from environments.spec import describe
from learner.catalogue import load_config
from learner.objectives import TokenBatch, load_objective
from learner.policy.attention import install_packed_sdpa
from learner.progress import learning_rate
from learner.step.packing import collate, plan_micro_batches, token_logprobs
from learner.step.samples import sequences_of
from rewards.exact_match import exact_match

OVERRIDES = ("objective.importance_weight=none",)
"""Every sample is of the weights that are trained."""


class Trainer:
    """A model, its reference where the objective needs one, and one optimizer step on all samples."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._objective = load_objective(config.objective)
        self.module = _load(config)
        self._reference = _load(config) if "reference" in self._objective.needs else None
        self._optimizer = torch.optim.AdamW(
            self.module.parameters(), betas=(0.9, 0.99), weight_decay=config.learner.weight_decay, fused=True
        )

    def step(self, number: int, samples: list[Sample]) -> None:
        """Takes step `number` on the samples, group after group."""
        config, size = self._config, self._config.actors.group_size
        groups = [place // size for place in range(len(samples))]
        sequences = [sequences_of(sample)[0] for sample in samples]
        lengths = [sequence.num_tokens for sequence in sequences]
        for micro in plan_micro_batches(lengths, groups, config.learner.micro_batch_tokens, "packed"):
            inputs = collate([sequences[place] for place in micro.indices], "packed", 0, "cpu")
            logprobs_T = self._logprobs(self.module, inputs)
            reference_N = logprobs_T.new_zeros(len(micro.indices))
            if self._reference is not None:
                with torch.no_grad():
                    reference_T = self._logprobs(self._reference, inputs)
                reference_N = reference_N.index_add(0, inputs.sequence_T, reference_T)
            rewards = [samples[place].reward or 0.0 for place in micro.indices]
            loss, _ = self._objective.loss(
                TokenBatch(
                    logprobs_T=logprobs_T,
                    behaviour_logprobs_T=logprobs_T.detach(),
                    sequence_T=inputs.sequence_T,
                    rewards_N=torch.tensor(rewards),
                    ref_logprobs_N=reference_N,
                    groups_N=torch.tensor([groups[place] for place in micro.indices]),
                    staleness_N=torch.zeros(len(micro.indices)),
                    num_groups=len(samples) // size,
                )
            )
            loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(number, config.learner, config.run.steps)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.learner.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _logprobs(self, module: Any, inputs: Any) -> torch.Tensor:
        logits = module(**inputs.model_kwargs(), packing=inputs.packing).logits
        return token_logprobs(logits, inputs, self._config.actors.temperature)


class StepSampler:
    """vLLM and the episodes of a step."""

    def __init__(self, config: Config) -> None:
        slots = config.learner.groups_per_step * config.actors.group_size
        actors = config.actors.model_copy(update={"slots": slots, "num_cpus": float(os.cpu_count() or 1)})
        self._engine = Engine(config.model, actors, max_model_len=config.max_sequence_tokens)
        self._player = make_player(config)

    def load(self, version: int, module: Any) -> None:
        """Takes over the weights."""
        self._engine.load_weights(version, [(name, p.data) for name, p in module.named_parameters()])

    def samples(self, prompts: list[tuple[PromptRow, int]]) -> list[Sample]:
        """Returns a sample of each prompt with its seed."""
        episodes = [self._player.begin(row, seed) for row, seed in prompts]
        waiting = dict(enumerate(episodes))
        while waiting or self._engine.num_unfinished:
            self._submit(waiting, prompts)
            for request_id, generation in self._engine.step():
                place, turn = map(int, request_id.split("."))
                episodes[place].act(turn, generation)
                if not episodes[place].is_over:
                    waiting[place] = episodes[place]
        return [self._sample(episode) for episode in episodes]

    def _submit(self, waiting: dict[int, Episode], prompts: list[tuple[PromptRow, int]]) -> None:
        self._player.turn()
        for place, episode in list(waiting.items()):
            for ask in episode.poll():
                self._engine.submit(
                    f"{place}.{ask.turn}",
                    ask.tokens,
                    seed=prompts[place][1] + ask.turn,
                    max_tokens=ask.max_tokens,
                )
                waiting.pop(place, None)
            if episode.is_over:
                waiting.pop(place, None)
        if waiting and not self._engine.num_unfinished:
            time.sleep(0.0005)  # All wait for their environments.

    def _sample(self, episode: Episode) -> Sample:
        sample = episode.sample()
        episode.close()
        if sample is None:
            raise RuntimeError("an episode ended without a word of the policy")
        return sample


def _load(config: Config) -> Any:
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    install_packed_sdpa(module)
    return module


def _with_rewards(samples: list[Sample], prompts: list[tuple[PromptRow, int]], reward: str) -> list[Sample]:
    texts = [sample.text for sample in samples]
    if reward == "countdown":
        values = counts_down([row.text for row, _ in prompts], texts)
    else:
        golds = [row.columns["answer"] for row, _ in prompts]
        values = [float(value or 0) for value in exact_match([], texts, answer=golds)]
    return [
        msgspec.structs.replace(sample, reward=value) for sample, value in zip(samples, values, strict=True)
    ]


def main() -> None:
    """Trains until it is ended."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = load_config(Path(sys.argv[1]), list(OVERRIDES))
    reward = "exact_match" if "exact_match" in config.rewards.functions else "countdown"
    tools = {name: spec.tools for name, spec in describe(config.environment_paths).items()}
    rows = load_prompts(config.data, load_tokenizer(config.model), environments=tools)
    generator, trainer = StepSampler(config), Trainer(config)
    num_groups, size = config.learner.groups_per_step, config.actors.group_size
    num_samples = num_tokens = 0
    with Path(sys.argv[2]).open("a", encoding="utf-8") as file:
        for step in range(config.run.steps):
            items = [
                work_item(number, seed=config.run.seed, num_prompts=len(rows))
                for number in range(step * num_groups, (step + 1) * num_groups)
            ]
            prompts = [(rows[item.prompt_index], item.seed + 97 * n) for item in items for n in range(size)]
            samples = _with_rewards(generator.samples(prompts), prompts, reward)
            trainer.step(step, samples)
            generator.load(step + 1, trainer.module)
            num_samples += len(samples)
            num_tokens += sum(sample.num_sampled for sample in samples)
            row = {
                "step": step + 1,
                "wall_s": time.perf_counter(),
                "samples": num_samples,
                "tokens": num_tokens,
                "reward": sum(sample.reward or 0.0 for sample in samples) / len(samples),
            }
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
