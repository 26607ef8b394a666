"""Sequence classifiers made on the spot, as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.support.tokenizers_made import byte_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"


def make_classifier(
    directory: Path,
    labels: tuple[str, ...] = ("reward",),
    *,
    pad: bool = True,
    template: str | None = TEMPLATE,
    max_tokens: int = 256,
) -> Path:
    """Writes a random two-layer Llama with a score head; the same at every call."""
    tokenizer = byte_tokenizer("<pad>", "<eos>", template=template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        pad_token_id=0 if pad else None,
        bos_token_id=None,
        eos_token_id=1,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
