"""Trains a job with TRL's GRPO, in the virtual environment of requirements/peers.txt.

    .cache/peers/venv/bin/python benchmarks/peers/trl_grpo.py JOB.json ROWS.jsonl

JOB.json is what `benchmarks.peers.jobs.told` says of a job. One line of ROWS.jsonl is written after each
optimizer step, until the process is ended. TRL generates with transformers on a CPU, and its settings are
its own but for what the job says, and `gradient_checkpointing`, which would only cost time here.

TRL's asynchronous trainer (trl.experimental.async_grpo) does not run on a CPU: async_grpo_trainer.py:1086
of 1.16.0 sets the attention to "tree_fa3", FlashAttention 3's kernel, and weight_transfer.py:110 sends
weights by NCCL.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.countdown import counts_down
from environments.calculator import Calculator

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<end>", "content": "text"},
    },
}
"""How recipes/products.py writes what an assistant says, for transformers' parser."""
CALCULATOR_TOKENS = 8
"""At most so many tokens come between two turns: a product and the heads of two messages."""


class Tools:
    """The calculator without a reward of its own, which the job does not ask for."""

    __init__, reset = Calculator.__init__, Calculator.reset
    calculate, give_answer = Calculator.calculate, Calculator.give_answer


class Rows(TrainerCallback):
    """Writes a line after each optimizer step: what was generated since the beginning, and the newest mean
    reward.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.samples = self.tokens = 0
        self.reward = 0.0

    def on_step_end(self, arguments: Any, state: Any, control: Any, **rest: Any) -> None:
        """Writes the line."""
        row = {
            "step": state.global_step,
            "wall_s": time.perf_counter(),
            "samples": self.samples,
            "tokens": self.tokens,
            "reward": self.reward,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def said_last(completion: Any) -> str:
    """Returns the text of a completion, or of the last message of one with turns; an assistant's call of a
    tool is no answer.
    """
    if isinstance(completion, str):
        return completion
    last = completion[-1]
    return "" if last.get("tool_calls") or last["role"] != "assistant" else str(last["content"])


def reward_of(name: str, rows: Rows) -> Any:
    """Returns the job's reward function, in TRL's form, which counts for `rows` what it is given."""

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        rows.samples += len(completions)
        texts = [said_last(completion) for completion in completions]
        if name == "countdown":
            values = counts_down(prompts, texts)
        else:
            values = [float(t.strip() == str(a)) for t, a in zip(texts, columns["answer"], strict=True)]
        rows.reward = sum(values) / len(values)
        return values

    return reward


def main() -> None:
    """Trains until it is ended."""
    job, rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Rows(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    turns = job["max_turns"]
    if turns > 1:
        tokenizer.response_template = RESPONSE_TEMPLATE
    samples = job["groups"] * job["group_size"]
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=samples,
        num_generations=job["group_size"],
        max_completion_length=job["max_new_tokens"] * turns + CALCULATOR_TOKENS * (turns - 1),
        max_tool_calling_iterations=turns - 1 if turns > 1 else None,
        learning_rate=job["lr"],
        adam_beta2=0.99,
        lr_scheduler_type=job["schedule"],
        warmup_steps=job["warmup_steps"],
        max_steps=job["steps"],
        temperature=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )

    trainer = GRPOTrainer(
        model=job["model"],
        args=settings,
        train_dataset=Dataset.from_list(job["rows"]),
        reward_funcs=reward_of(job["reward"], rows),
        processing_class=tokenizer,
        environment_factory=Tools if turns > 1 else None,
        callbacks=[rows],
    )
    count_tokens(trainer, rows)
    trainer.train()


def count_tokens(trainer: Any, rows: Rows) -> None:
    """Counts the sampled tokens of each batch, an end token included and what tools said left out."""
    score = trainer._generate_and_score_completions

    def counted(inputs: Any) -> Any:
        made = score(inputs)
        mask = made["completion_mask"]
        rows.tokens += int((mask * made["tool_mask"] if "tool_mask" in made else mask).sum())
        return made

    trainer._generate_and_score_completions = counted


if __name__ == "__main__":
    main()
