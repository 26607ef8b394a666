"""A tokenizer made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    *special: str, eos: str | None = "<eos>", template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per byte, after `special` in this order."""
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer(
    *special: str, bos: str | None = None, eos: str | None = "<eos>", template: str | None = None
) -> PreTrainedTokenizerFast:
    """Bytes, and pairs of them that are one token wherever they meet: line ends, spaces, brackets, letters.

    As large tokenizers do, it makes other tokens of two texts joined than of each.
    """
    line, space = "\u010a", "\u0120"  # As byte-level tokenizers write them.
    pairs = [
        *(
            (line, line),
            (line + line, line),
            (space, space),
            (">", line),
            ("]", space),
            ("}", "}"),
            ("}", line),
        ),
        *(("A", "N"), ("AN", "S"), (line, "A"), (line, "T"), ("t", "o"), ("to", "o"), (".", line)),
    ]
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(one + two for one, two in pairs)]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def sentence_tokenizer(
    *special: str, bos: str | None = None, eos: str | None = "<eos>", template: str | None = None
) -> PreTrainedTokenizerFast:
    """Characters as sentencepiece has them: a space is `\u2581`, and a text alone begins with one."""
    letters = [chr(code) for code in range(33, 127)]
    symbols = [*special, "<unk>", "\u2581", "\n", *letters, *(f"\u2581{letter}" for letter in letters)]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    pairs = [("\u2581", letter) for letter in letters]
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    core.add_special_tokens([*special, "<unk>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer
