"""Samples of random lengths on a tiny Llama, with their log-probs and gradients by one plain pass each."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from learner.step.packing import (
    TokenSequence,
)

VOCABULARY = 29


TEMPERATURE = 0.8


def tiny_llama(dtype=torch.float64, attention="sdpa", tied=False):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    # Llama's own norm computes in float32, which would hide differences below 1e-8.
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, torch.nn.RMSNorm(24, eps=config.rms_norm_eps, dtype=dtype))
    return model.train()


@dataclasses.dataclass
class Rollouts:
    """Sequences of one optimizer step with what the objective needs, in any order; groups of 1 to 6."""

    sequences: list
    groups: list
    rewards: torch.Tensor
    references: torch.Tensor
    staleness: torch.Tensor
    behaviours: list

    def permuted(self, order):
        pick = [*order]
        return Rollouts(
            [self.sequences[i] for i in pick],
            [self.groups[i] for i in pick],
            self.rewards[pick],
            self.references[pick],
            self.staleness[pick],
            [self.behaviours[i] for i in pick],
        )


def make_rollouts():
    random = torch.Generator().manual_seed(4)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(VOCABULARY, (size,), generator=random).tolist()

    sequences, groups = [], []
    for group, size in ((11, 6), (-3, 4), (5, 3), (8, 2), (2, 1)):
        prompt = ids(1, 9)
        sequences += [TokenSequence.of_turn(prompt, ids(1, 14)) for _ in range(size)]
        groups += [group] * size
    prompt = sequences[7].tokens[~sequences[7].is_sampled].tolist()
    sequences[7] = TokenSequence.of_turn(prompt, [])  # generated nothing
    num = len(sequences)
    return Rollouts(
        sequences,
        groups,
        torch.rand(num, generator=random, dtype=torch.float64),
        -10 * torch.rand(num, generator=random, dtype=torch.float64),
        torch.randint(0, 2, (num,), generator=random).double(),
        [
            -3 * torch.rand(int(sequence.is_sampled.sum()), generator=random, dtype=torch.float64)
            for sequence in sequences
        ],
    )


def plain_logprobs(model, sequence):
    """Log-probs of the sampled tokens from one unpadded pass, by log_softmax over everything."""
    ids = torch.from_numpy(sequence.tokens)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE
    places = torch.from_numpy(sequence.is_sampled).nonzero()[:, 0]
    return logits.log_softmax(-1)[places - 1, ids[0, places]]


def with_other_prompt(sequence):
    """The sequence with other tokens wherever none was sampled."""
    others = np.where(sequence.is_sampled, sequence.tokens, (sequence.tokens + 1) % VOCABULARY)
    return TokenSequence(others, sequence.is_sampled)


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def assert_same_gradient(found, exact):
    assert exact.norm() > 0.01
    assert ((found - exact).norm() / exact.norm()).item() < 1e-12
