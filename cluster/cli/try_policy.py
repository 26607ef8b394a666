"""Tries a trained policy by itself: `launch.py chat`, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.prompts import render_rows
from actors.sources import Source, report_bad_rows
from core.config import MAX_TOKENS, DataConfig, ModelConfig
from core.errors import ConfigError
from core.tokenizer import Detokenizer, end_token_ids, has_chat_template, load_tokenizer
from learner.catalogue import load_config


def chat(directory: str, prompt: str, max_new_tokens: int = 256) -> str:
    """Returns the policy's greedy answer to `prompt`, through the chat template if the tokenizer has one.

    Raises ConfigError when there is no policy or no tokenizer, or no room for an answer, and DataError when
    the template or the tokenizer does not take the prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_policy(directory)
    source = ModelConfig(path=directory)
    tokenizer = load_tokenizer(source)
    end_ids = end_token_ids(source, tokenizer)
    config_path = Path(directory).resolve().parent / "config.yaml"
    run = load_config(config_path, []) if config_path.is_file() else None
    prompt_ids = _prompt_ids(tokenizer, prompt, run.data if run else None)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    limit = min(
        max_new_tokens, getattr(model.config, "max_position_embeddings", max_new_tokens) - len(prompt_ids)
    )
    if limit < 1:
        raise ConfigError(
            f"the prompt is {len(prompt_ids)} tokens long: {directory} has no position left for an answer"
        )
    inputs = torch.tensor([prompt_ids])
    answer = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=list(end_ids) or None,
        pad_token_id=end_ids[0] if end_ids and tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    skips = run is not None and run.rewards.skip_special_tokens
    return Detokenizer(tokenizer, end_ids, skip_special_tokens=skips).text(
        answer[0, len(prompt_ids) :].tolist()
    )


def _prompt_ids(tokenizer: Any, prompt: str, run: DataConfig | None) -> tuple[int, ...]:
    """Returns the prompt's tokens, rendered and tokenised as those of its run are, with its system prompt and
    template options; without a run through the chat template if there is one.
    """
    run = run or DataConfig()
    uses_template = run.chat_template and has_chat_template(tokenizer)
    data = DataConfig(
        chat_template=uses_template,
        system_prompt=run.system_prompt if uses_template else None,
        template_options=run.template_options,
        max_prompt_tokens=MAX_TOKENS,
    )
    source = Source("the command line", "prompt", {0: {"prompt": prompt}})
    rows, bad, _ = render_rows(source, data, tokenizer)
    report_bad_rows(source, bad, len(rows), "stop")
    return rows[0].token_ids


def check_policy(directory: str) -> None:
    """Raises ConfigError when there is no model in `directory`."""
    if not (Path(directory) / "config.json").is_file():
        raise ConfigError(
            f"{directory} is no Hugging Face model directory (no config.json); a run writes "
            "one to RUN_DIR/policy"
        )
