"""The base model of the quickstart with a tool: it half knows how to have a calculator find a product.

    python -m recipes.products OUT_DIR     makes the base model: a normal Hugging Face directory

The task is reasoning-gym's: products of two-digit numbers. A Llama of 0.3 M parameters cannot multiply 37 by
42, but it can ask a calculator and read off what it says. The base is warmed up on conversations in which
somebody guesses the product, or calls the tool, sometimes with a slip in a number, and reads the result,
sometimes with a slip again. What is left to reinforcement learning is to find that guesses never pay, and
slips do not. Nothing in the training loop knows about this file; `model.make` in
configs/quickstart_tools.yaml names `make_base`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import string
from typing import Any

from recipes.arithmetic import UNLABELLED, padded, save_base, untrained_base, warm_up

SMALLEST, LARGEST = 10, 99
QUESTION = ("Solve the following multiplication: ", " * ", ". Give only the result as your final answer.")
"""What stands before, between and behind the two numbers of reasoning-gym's products."""
CALL = ('<tool_call>{"name": "', '", "arguments": {"expression": "', '"}}</tool_call>')
"""What stands before, between and behind the tool's name and the expression."""
TOOLS = ("calculate", "give_answer")
"""Those of environments/calculator.py; the first is the one that is needed."""
P_ASKS, P_RIGHT_CALL, P_RIGHT_READING = 0.65, 0.9, 0.85
WARM_UP_STEPS, CLEAN_STEPS, BATCH = 350, 250, 64
"""Of the warm-up the first steps are without slips: to copy is learned sooner from what is right."""
ROLES = ("tools", "user", "assistant", "tool")
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | map(attribute='function.name') | join(' ') }}<end>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template of one token a role; a tool is called in the form of Hermes and Qwen."""


def make_tokenizer() -> Any:
    """Returns a tokenizer with one token for each printable character, for each fixed part of a question and
    of a call, and for the head of each role's message; `<end>` ends a message.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<unk>", *(f"<{role}>" for role in ROLES)]
    pieces = sorted((*QUESTION, *CALL, *TOOLS), key=len, reverse=True)
    symbols = dict.fromkeys([*special, *pieces, *string.printable])
    tokenizer = Tokenizer(
        models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, pieces), r"[\s\S]"])), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def conversation(a: int, b: int, rng: random.Random, *, slips: bool = True) -> list[dict[str, Any]]:
    """Returns messages of somebody who half knows how to find a product; without `slips` all calls and
    readings are right.
    """
    question = {"role": "user", "content": f"{QUESTION[0]}{a}{QUESTION[1]}{b}{QUESTION[2]}"}
    if rng.random() >= P_ASKS:
        return [question, {"role": "assistant", "content": str(rng.randint(SMALLEST**2, LARGEST**2))}]
    numbers = [a, b]
    if slips and rng.random() >= P_RIGHT_CALL:
        numbers[rng.randrange(2)] = rng.randint(SMALLEST, LARGEST)
    expression = QUESTION[1].join(map(str, numbers))
    call = {"function": {"name": TOOLS[0], "arguments": {"expression": expression}}}
    result = str(numbers[0] * numbers[1])
    reading = result if not slips or rng.random() < P_RIGHT_READING else _with_a_slip(result, rng)
    return [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": reading},
    ]


def _with_a_slip(digits: str, rng: random.Random) -> str:
    """Returns the digits with one of them another one."""
    place = rng.randrange(len(digits))
    return digits[:place] + rng.choice(string.digits.replace(digits[place], "")) + digits[place + 1 :]


def make_base(out_dir: str, seed: int = 0) -> None:
    """Makes and warms up the base model in `out_dir`; about a minute on one core. It is written aside, then
    renamed.
    """
    rng, tokenizer = random.Random(seed), make_tokenizer()
    model = untrained_base(len(tokenizer), seed)
    steps = itertools.count()
    warm_up(
        model,
        lambda: _batch(tokenizer, rng, slips=next(steps) >= CLEAN_STEPS),
        WARM_UP_STEPS,
        "conversations with a calculator",
    )
    save_base(model, tokenizer, out_dir)


def _batch(tokenizer: Any, rng: random.Random, *, slips: bool) -> tuple[Any, Any]:
    """Returns (inputs, labels) of conversations; the loss is on what the assistant says, its end included."""
    ids = tokenizer.get_vocab()
    tools = [{"type": "function", "function": {"name": name}} for name in TOOLS]
    rows = []
    for _ in range(BATCH):
        a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
        messages = conversation(a, b, rng, slips=slips)
        tokens = tokenizer(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))["input_ids"]
        labels, speaks = [], False
        for token in tokens:
            labels.append(token if speaks else UNLABELLED)
            speaks = (speaks and token != ids["<end>"]) or token == ids["<assistant>"]
        rows.append((tokens, labels))
    return padded(rows)


def main() -> None:
    """Makes the base in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir")
    make_base(parser.parse_args().out_dir)


if __name__ == "__main__":
    main()
