"""What a model computes, compared with itself before anything is trained: packed, alone, as in training, and
by its eager attention.

Models build masks of their own, count positions along a row, draw random numbers, or have attention that
PyTorch's fused one leaves out in part: caps, sinks, windows. transformers' eager attention, of each sequence
alone and without padding, is the model's definition. Windows that sequences can outgrow count as WINDOW
tokens meanwhile, so that a few tokens are enough to see whether they are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError
from learner.step.packing import Layout, TokenSequence, collate, refuse_packing

WINDOW = 4
NUM_TOKENS = 24
TOLERANCE_NATS = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the mean over tokens, by dtype; others round."""
ROUNDED_TOLERANCE_NATS = 0.1


def check_function(
    logprobs: Callable[..., Tensor],
    module: Any,
    layout: Layout,
    device: torch.device | str = "cpu",
    *,
    longest: int = 2**31,
    shares_beginnings: bool = False,
) -> None:
    """Compares the log-probs of a few tokens, computed in several ways; ConfigError says what differs and
    what to set.

    `logprobs(inputs, training=...)` is `TokenLogprobs` in one of its modes. No sequence has more than
    `longest` tokens: wider windows do not matter. With `shares_beginnings` the passes over several sequences
    are made as `collate` makes them then. Collective under ZeRO-3.
    """
    vocabulary = module.config.get_text_config().vocab_size
    tokens = [1 + 7 * position % (vocabulary - 1) for position in range(NUM_TOKENS)]
    first = TokenSequence.of_turn(tokens[:5], tokens[5:11])
    second = TokenSequence.of_turn(tokens[11:15], tokens[15:])
    third = TokenSequence.of_turn(tokens[11:15], tokens[3:11])  # Of the same prompt.
    tolerance = TOLERANCE_NATS.get(next(module.parameters()).dtype, ROUNDED_TOLERANCE_NATS)
    name = type(module).__name__

    def of(*sequences: TokenSequence, training: bool = False) -> Tensor:
        inputs = collate(sequences, layout, 0, device, shares_beginnings=shares_beginnings)
        return logprobs(inputs, training=training)

    alone, together = of(second), of(first, third, second)
    if (found := _difference(of(second, training=True), alone)) > tolerance:
        raise ConfigError(
            f"{name} computes other log-probs in training than in evaluation, by {found:.3g} nats a token: "
            "something in it draws random numbers (dropout that its config turns off?)."
        )
    start = of(TokenSequence.of_turn(tokens[11:15], tokens[15:-3]))
    if (found := _difference(alone[:-3], start)) > tolerance:
        raise ConfigError(
            f"{name} gives tokens other log-probs once others follow, by {found:.3g} nats a token: it looks "
            "ahead, and is no causal "
            "language model as it is configured (is_decoder?). Give another model.path."
        )
    if (found := _difference(together[-len(alone) :], alone)) > tolerance:
        refuse_packing(
            module,
            f"gives a sequence other log-probs behind another one than alone, by {found:.3g} nats a token",
        )
    if module.config._attn_implementation == "eager" or not module._can_set_attn_implementation():
        return
    with _short_windows(module, longest):
        together = of(first, third, second)
        with _eager(module):
            expected = torch.cat([of(first), of(third), of(second)])
    if (found := _difference(together, expected)) > tolerance:
        raise ConfigError(
            f"{name} computes other log-probs than by its eager attention, by {found:.3g} nats a token: "
            "model.attention leaves out part "
            "of what it does (a cap, sinks or a window of its own). Set model.attention=eager."
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Returns the mean size of the difference, nats a token."""
    return float((found - expected).abs().mean())


@contextlib.contextmanager
def _eager(module: Any) -> Iterator[None]:
    """Lets the model attend by transformers' own plain code, for the time of the block."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


@contextlib.contextmanager
def _short_windows(module: Any, longest: int) -> Iterator[None]:
    """Makes sliding windows below `longest` WINDOW tokens wide, in configs, where masks look, and in
    attentions' copies; for the block.
    """
    changed: list[tuple[Any, int]] = []
    try:
        for owner in (*_configs(module), *module.modules()):
            window = getattr(owner, "sliding_window", None)
            if isinstance(window, int) and not isinstance(window, bool) and WINDOW < window < longest:
                changed.append((owner, window))
                owner.sliding_window = WINDOW
        yield
    finally:
        for owner, window in changed:
            owner.sliding_window = window


def _configs(module: Any) -> list[Any]:
    """Returns all Hugging Face configs in use, each once."""
    found = [module.config, module.config.get_text_config()]
    found += [
        part.config for part in module.modules() if hasattr(getattr(part, "config", None), "get_text_config")
    ]
    return list({id(config): config for config in found}.values())
