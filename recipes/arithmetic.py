"""The quickstart's task and base model: sums of two numbers, and a Llama of 0.3 M parameters that half knows
them.

    python -m recipes.arithmetic rows  OUT_DIR     writes train.jsonl and test.jsonl (disjoint problems)
    python -m recipes.arithmetic base  OUT_DIR     makes the base model: a normal Hugging Face directory

The base is warmed up on sums, at last on noisy ones: right with probability `P_RIGHT`, else off by a little.
It therefore knows sums, the held-out ones too, and says the right one less than half the time, which is where
reinforcement learning starts. Nothing in the training loop knows about this file; `model.make` in
configs/quickstart.yaml names `make_base`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_OPERAND = 19
NUM_HELD_OUT = 100
HIDDEN, LAYERS = 96, 3
P_RIGHT = 0.5
MAX_ERROR = 9
CLEAN_STEPS, CLEAN_BATCH = 250, 64
"""Right sums come first: a third of the arithmetic that noisy ones alone would take."""
NOISY_STEPS, BATCH = 100, 256
PEAK_LR = 2e-3
LARGE_MODELS_STD = 0.02
"""The deviation of first weights that transformers takes, right for models a hundred times as wide."""
CHARACTERS = "0123456789+="
UNLABELLED = -100
"""The label of a token that no loss is on."""


def problems(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns training rows and held-out rows: every `a+b=` with operands up to MAX_OPERAND once, split at
    random.
    """
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        for a in range(MAX_OPERAND + 1)
        for b in range(MAX_OPERAND + 1)
    ]
    random.Random(seed).shuffle(rows)
    return rows[NUM_HELD_OUT:], rows[:NUM_HELD_OUT]


def write_rows(out_dir: str) -> None:
    """Writes train.jsonl and test.jsonl into `out_dir`."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), problems(), strict=True):
        (Path(out_dir) / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )


def make_tokenizer():
    """Returns a character tokenizer as a `PreTrainedTokenizerFast`: one token a character, `<eos>` ends an
    answer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_llama(
    vocab_size: int,
    *,
    tied: bool = True,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    seed: int = 0,
    positions: int = 128,
    std: float = LARGE_MODELS_STD,
):
    """Returns a LlamaForCausalLM of random weights of deviation `std`, head_dim 32, about 0.35 M parameters
    by default. One that is to learn fast and surely wants hidden ** -0.5 (`untrained_base`).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=std,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def untrained_base(vocab_size: int, seed: int = 0):
    """Returns the Llama that becomes a base. Its first weights are of deviation HIDDEN ** -0.5, so that a
    layer changes what passes through it. With a large model's it knew 0.7 to 0.95 of the sums after the
    warm-up, by the seed and the last bits of the CPU's arithmetic, and training on some of the sums hardly
    taught it the others; with these it knows 0.97 and more.
    """
    return make_llama(vocab_size, seed=seed, std=HIDDEN**-0.5)


def noisy_answer(a: int, b: int, rng: random.Random, p_right: float = P_RIGHT) -> int:
    """Returns a + b with probability `p_right`, else a number off by 1 to MAX_ERROR (never negative)."""
    if rng.random() < p_right:
        return a + b
    error = rng.choice([e for e in range(-MAX_ERROR, MAX_ERROR + 1) if e != 0 and a + b + e >= 0])
    return a + b + error


def make_base(out_dir: str, seed: int = 0) -> None:
    """Makes and warms up the base model in `out_dir`; about twenty seconds on one core. It is written aside,
    then renamed.
    """
    rng, steps = random.Random(seed), itertools.count()
    tokenizer = make_tokenizer()
    model = untrained_base(len(tokenizer), seed)

    def next_batch() -> tuple[Any, Any]:
        if next(steps) < CLEAN_STEPS:
            return _batch(tokenizer, rng, CLEAN_BATCH, p_right=1.0)
        return _batch(tokenizer, rng, BATCH)

    warm_up(model, next_batch, CLEAN_STEPS + NOISY_STEPS, "sums, the last of them noisy")
    save_base(model, tokenizer, out_dir)


def warm_up(
    model: Any,
    next_batch: Callable[[], tuple[Any, Any]],
    num_steps: int,
    what: str,
    peak_lr: float = PEAK_LR,
) -> None:
    """Trains the model on `num_steps` batches of (inputs, labels), and prints how it goes."""
    import torch

    # One thread gives the same base on every machine, and two OpenMP threads crawl beside another program.
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak_lr, total_steps=num_steps, pct_start=0.1
    )
    print(
        f"making the base model: {sum(p.numel() for p in model.parameters()):,} parameters, {num_steps} "
        f"steps on {what}",
        flush=True,
    )
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        inputs, labels = next_batch()
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(
                f"  warm-up {step}/{num_steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s",
                flush=True,
            )


def save_base(model: Any, tokenizer: Any, out_dir: str) -> None:
    """Writes model and tokenizer aside, then gives them their name."""
    aside = Path(f"{out_dir}.making-{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(out_dir, ignore_errors=True)
    aside.rename(out_dir)


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
    """Returns (inputs, labels), both int64 [rows, width], of lists of tokens and labels, padded on the right,
    which a causal model needs no mask for.
    """
    import torch

    width = max(len(tokens) for tokens, _ in rows)
    inputs = [tokens + [0] * (width - len(tokens)) for tokens, _ in rows]
    labels = [wanted + [UNLABELLED] * (width - len(wanted)) for _, wanted in rows]
    return torch.tensor(inputs), torch.tensor(labels)


def make_small_base(out_dir: str) -> None:
    """Makes one of 0.1 M parameters from noisy sums alone, for studies of many runs (benchmarks/). It is made
    as it was when their committed results were measured.
    """
    rng, tokenizer = random.Random(0), make_tokenizer()
    model = make_llama(len(tokenizer), hidden=64, layers=2)
    warm_up(model, lambda: _batch(tokenizer, rng, BATCH, p_right=0.45), 1000, "noisy sums", peak_lr=4e-3)
    save_base(model, tokenizer, out_dir)


def _batch(tokenizer: Any, rng: random.Random, size: int, p_right: float = P_RIGHT) -> tuple[Any, Any]:
    """Returns (inputs, labels) as `padded` does; the loss is on the answers only."""
    ids = tokenizer.get_vocab()
    rows = []
    for _ in range(size):
        a, b = rng.randint(0, MAX_OPERAND), rng.randint(0, MAX_OPERAND)
        prompt = [ids[c] for c in f"{a}+{b}="]
        answer = [*(ids[c] for c in str(noisy_answer(a, b, rng, p_right))), tokenizer.eos_token_id]
        rows.append((prompt + answer, [UNLABELLED] * len(prompt) + answer))
    return padded(rows)


def main() -> None:
    """Runs the command named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("rows", "base"))
    parser.add_argument("out_dir")
    arguments = parser.parse_args()
    {"rows": write_rows, "base": make_base}[arguments.what](arguments.out_dir)


if __name__ == "__main__":
    main()
