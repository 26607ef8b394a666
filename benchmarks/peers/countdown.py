"""The job with a heavy tail of lengths: a model that counts down from the number in its prompt.

    python -m benchmarks.peers.countdown rows     writes benchmarks/peers/countdown.jsonl

The answer to `5` is `4 3 2 1 0` and its end, so that the prompt says how long an answer is, whoever
generates it. The numbers of the prompts are log-normal: half of the answers have up to 15 tokens, one in
twenty more than 70, the longest 128. Nothing is warmed up: with a token a number, counting down depends on
the last token alone, and that is written into the head of a Llama of random weights. It slips now and then,
so that rewards differ.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

ROWS_PATH = Path(__file__).with_name("countdown.jsonl")
LARGEST = 127
NUM_ROWS = 400
MEDIAN, DEVIATION = 12, 1.0
"""Of the numbers in the prompts: the median, and the deviation of the logarithm."""
HIDDEN, LAYERS = 288, 8
SLIP_GAP = 11.0
"""By how many nats the next number stands above what a random one gets: about one token in 500 slips."""


def rows(seed: int = 0) -> list[dict[str, str]]:
    """Returns the prompts, numbers from 0 to LARGEST."""
    rng = random.Random(seed)
    numbers = (round(rng.lognormvariate(math.log(MEDIAN), DEVIATION)) for _ in range(NUM_ROWS))
    return [{"prompt": str(min(LARGEST, number))} for number in numbers]


def counts_down(prompts: list[str], completions: list[str]) -> list[float]:
    """Returns 1 for each completion that says all numbers below its prompt's, in order, and nothing else."""
    return [
        float(said.split() == [str(number) for number in reversed(range(int(prompt)))])
        for prompt, said in zip(prompts, completions, strict=True)
    ]


def make_tokenizer() -> Any:
    """Returns a tokenizer with one token a number; `<eos>` ends an answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<eos>", "<unk>", *map(str, range(LARGEST + 1))]
    tokenizer = Tokenizer(
        models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_base(out_dir: str) -> None:
    """Makes the model of 8 M parameters in `out_dir`, in a moment."""
    import torch

    from recipes.arithmetic import make_llama, save_base

    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), tied=False, hidden=HIDDEN, layers=LAYERS, positions=256)
    embeddings, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    embeddings.copy_(torch.where(torch.rand(embeddings.shape) < 0.5, -1.0, 1.0))
    ids = tokenizer.get_vocab()
    head.zero_()
    for number in range(LARGEST + 1):
        after = ids[str(number - 1)] if number else ids["<eos>"]
        head[after] = embeddings[ids[str(number)]] * SLIP_GAP / HIDDEN
    save_base(model, tokenizer, out_dir)


def main() -> None:
    """Writes the rows."""
    if sys.argv[1:] != ["rows"]:
        sys.exit("usage: python -m benchmarks.peers.countdown rows")
    ROWS_PATH.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
