"""Tells what a model's sizes allow, before anything starts: how long a sequence may be, and which token ids
there are.

An engine refuses a length beyond the model's positions minutes later; a token id beyond the embedding ends
the learner in an IndexError, on a GPU in an assertion that names nothing.
"""

from __future__ import annotations

from typing import Any

from actors.prompts import PromptRow, PromptSet
from cluster.preparation.memory import BYTES, GIB
from cluster.preparation.model_checks import rope_parameters
from core.config import Config
from core.config.checks import longest_sequence
from core.errors import ConfigError, DataError

# Names of the same thing in transformers' configs, as vLLM reads them: the smallest counts.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Types of rotary embedding whose max_position_embeddings has the factor in it already.
_SCALED = ("longrope", "su", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def max_positions(found: Any) -> tuple[int, str] | None:
    """Returns the most tokens that a sequence of the model may have, and how that is known; None where
    nothing bounds it.

    `found` is the model's Hugging Face config.
    """
    text = found.get_text_config()
    known = {name: value for name in _POSITIONS if isinstance(value := getattr(text, name, None), int)}
    if not known:
        return None
    name = min(known, key=lambda key: known[key])
    factor = 1.0
    for rope in rope_parameters(found):
        if rope.get("rope_type") not in _SCALED:
            factor = rope.get("factor") or factor
    if factor == 1.0 or "gemma3" in found.model_type:
        return known[name], name
    return int(known[name] * factor), f"{name} = {known[name]} times rope's factor {factor:g}"


def check_length(config: Config, found: Any, prompts: PromptSet) -> None:
    """Raises ConfigError when prompt and completion together may be longer than the model's positions."""
    limit, asked = max_positions(found), config.max_sequence_tokens
    if limit is None or asked <= limit[0]:
        return
    longest = max((len(row.token_ids) for row in prompts.rows), default=0)
    raise ConfigError(
        f"{longest_sequence(config)} are {asked} tokens, but {config.model.path} has positions for {limit[0]} ({limit[1]}). Lower it; the "
        f"longest prompt has {longest} tokens."
    )


def check_cache(config: Config, found: Any) -> None:
    """Raises ConfigError where a CPU engine's cache does not hold one sequence, which vLLM refuses when it
    has loaded the model. `found` is the model's Hugging Face config, of which plain attention is judged
    alone: windows, states, latent attention and keys that all heads share want less.
    """
    actors, text = config.actors, found.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kinds = {*(getattr(text, "layer_types", None) or ("full_attention",))}
    is_plain = kinds == {"full_attention"} and not getattr(text, "sliding_window", None)
    has_fewer_keys = getattr(text, "kv_lora_rank", None) or getattr(text, "multi_query", False)
    if actors.num_gpus or not heads or not is_plain or has_fewer_keys:
        return
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    wanted = 2 * text.num_hidden_layers * width * BYTES[config.model.dtype] * config.max_sequence_tokens
    if wanted > actors.kv_cache_gib * GIB:
        raise ConfigError(
            f"actors.engine_memory = {actors.kv_cache_gib:g} GiB holds no sequence of {config.max_sequence_tokens} tokens "
            f"({longest_sequence(config)}): {wanted / GIB:.3g} GiB. Set actors.engine_memory={1.1 * wanted / GIB:.2g} or more; "
            f"all of actors.slots = {actors.slots} want {actors.slots * wanted / GIB:.2g}."
        )


def check_token_ids(config: Config, found: Any, tokenizer: Any, *prompt_sets: PromptSet) -> None:
    """Raises ConfigError or DataError for a padding, a prompt or an offline completion with a token
    that the embedding does not have.
    """
    size = found.get_text_config().vocab_size
    has = f"the embedding of {config.model.path} has {size} rows (vocab_size)"
    pad = tokenizer.pad_token_id
    if pad is not None and not 0 <= pad < size:
        raise ConfigError(
            f"the tokenizer's pad token {tokenizer.decode([pad])!r} has the id {pad}, but {has}. Name "
            "another pad_token in "
            "tokenizer_config.json, or enlarge the model's embedding (resize_token_embeddings) and save it."
        )
    for part in (part for prompts in prompt_sets for part in prompts.split()):
        beyond = [(row, number) for row in part.rows if (number := _largest(row)) >= size]
        if beyond:
            row, number = beyond[0]
            raise DataError(
                f"{part.source}: {len(beyond)} prompts hold tokens that the model does not know, the first in row "
                f"{row.source_row + 1}: "
                f"{tokenizer.decode([number])!r} has the id {number}, but {has}. The tokenizer is not this "
                "model's, or tokens were added "
                "to it: enlarge the embedding (resize_token_embeddings), or remove them."
            )


def _largest(row: PromptRow) -> int:
    return max((max(row.token_ids, default=0), *(int(sample.tokens.numpy().max()) for sample in row.offline)))
