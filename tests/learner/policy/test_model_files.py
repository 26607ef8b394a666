"""The files beside a policy's tensors: carried over, mended, and tried before anything starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.preparation.model_checks import check_model, lora_notes
from core.config import ModelConfig
from core.errors import ConfigError
from learner.policy.model_files import check_model_files, mended, write_model_files
from learner.worker import LearnerRank
from tests.support.configs import update_config
from tests.support.learning.tiny_families import make_family


@pytest.fixture
def base(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny model."""
    return Path(shutil.copytree(tiny_models["tied"], tmp_path / "base"))


def written(base: Path, directory: Path, **options: Any) -> Path:
    directory.mkdir()
    write_model_files(directory, ModelConfig(path=str(base), **options))
    return directory


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (
            {"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6},
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20},
            {"do_sample": True, "temperature": 0.6, "top_k": 20},
        ),
        (
            {"do_sample": False, "temperature": 0.9, "repetition_penalty": 1.1},
            {"do_sample": False, "repetition_penalty": 1.1},
        ),
        ({"temperature": None, "top_p": None, "eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
        (
            {"length_penalty": 0.5, "early_stopping": True, "num_beams": 4},
            {"length_penalty": 0.5, "early_stopping": True, "num_beams": 4},
        ),
        ({"length_penalty": 0.5, "early_stopping": True}, {}),
        ({"max_new_tokens": -1, "max_length": 128}, {"max_length": 128}),
        ({"cache_implementation": "nonsense", "temperature": "hot"}, {}),
        ({"num_return_sequences": 4, "temperature": 0.7}, {"num_return_sequences": 4, "temperature": 0.7}),
        (
            {"chat_format": "chatml", "max_window_size": 6144},
            {"chat_format": "chatml", "max_window_size": 6144},
        ),
    ],
)
def test_generation_settings_are_carried_over_as_far_as_they_are_valid(
    settings: dict[str, Any], kept: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    found, left_out = mended(settings)
    assert {name: found.get(name) for name in kept} == kept
    known = {name for name, value in settings.items() if value is not None}
    assert known - found.keys() == {name for name, _, _ in left_out}
    assert all(why for _, _, why in left_out)
    assert not any("If you're using a pretrained model" in why for _, _, why in left_out)
    assert found.keys() - settings.keys() <= {"do_sample"}
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    again = GenerationConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    for name, value in kept.items():
        assert getattr(again, name) == value


def test_everything_that_serves_a_policy_is_beside_it_and_no_weights(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "preprocessor_config.json").write_text('{"size": 3}')
    (base / "tekken.json").write_text('{"vocab": []}')
    (base / "modeling_own.py").write_text("")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "adapter_config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"weights")
    out = written(base, tmp_path / "out", dtype="bfloat16")
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    known = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == known | {
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "preprocessor_config.json",
        "tekken.json",
    }
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "modeling_own.py" in {
        path.name for path in written(base, tmp_path / "trusted", trust_remote_code=True).iterdir()
    }


def test_the_config_says_the_dtype_that_is_written_in_every_part(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype", None)
    config |= {
        "torch_dtype": "float16",
        "of_our_own": [1],
        "text_config": {"torch_dtype": "float16"},
        "vision_config": {"depth": 2},
    }
    (base / "config.json").write_text(json.dumps(config))
    found = json.loads((written(base, tmp_path / "out", dtype="bfloat16") / "config.json").read_text())
    assert found == {
        **{name: value for name, value in config.items() if name != "torch_dtype"},
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
    }


def test_what_was_mended_is_told(base: Path) -> None:
    (base / "generation_config.json").write_text(
        '{"eos_token_id": 1, "temperature": 0.9, "max_new_tokens": 0}'
    )
    (note,) = check_model_files(ModelConfig(path=str(base)))
    assert (
        "generation_config.json: the policy's has no max_new_tokens = 0: `max_new_tokens` must be greater "
        "than 0" in note
    )
    (base / "generation_config.json").unlink()
    assert check_model_files(ModelConfig(path=str(base))) == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "generation_config.json",
            b'{"temperature": 0.9,}',
            r"generation_config\.json is no JSON: .*Mend "
            r"it",
        ),
        ("generation_config.json", b"\xff\xfe{}", r"generation_config\.json is no JSON"),
        ("generation_config.json", b"[1]", r"generation_config\.json holds list, not an object"),
        ("config.json", b"", r"config\.json is no JSON"),
        ("tokenizer.json", b"{}", r"no tokenizer to be had: tokenizer\.json is not understood by tokenizers"),
    ],
)
def test_broken_files_are_one_line_before_anything_starts(
    base: Path, name: str, content: bytes, message: str
) -> None:
    (base / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        check_model_files(ModelConfig(path=str(base)))
    assert "\n" not in str(caught.value)


def test_a_part_of_a_model_is_not_trained_alone(base: Path) -> None:
    """transformers would train the language model of what vLLM serves whole."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForConditionalGeneration"]})
    )
    with pytest.raises(
        ConfigError,
        match=r"is a LlamaForConditionalGeneration, of which .* the language "
        r"model alone",
    ):
        check_model(update_config(str(base)))


def test_fused_experts_without_adapters_are_told(tmp_path: Path) -> None:
    base = make_family("mixtral", tmp_path / "base")
    config = update_config(str(base), lora_rank=2)
    (note,) = lora_notes(config.model, config.learner)
    assert re.search(r"the experts of MixtralForCausalLM, \d\d% of its parameters, get no adapters", note)
    config = update_config(str(base))
    assert lora_notes(config.model, config.learner) == ()


def test_a_head_of_its_own_where_vllm_takes_the_embedding_is_refused(tmp_path: Path) -> None:
    base = make_family("cohere untied", tmp_path / "base")
    with pytest.raises(
        ConfigError,
        match=r"\(cohere\) has an LM head of its own .*for which vLLM takes the "
        r"embedding",
    ):
        check_model(update_config(str(base)))


def test_a_base_whose_files_are_gone_at_the_end_costs_no_run_that_has_checkpoints(tmp_path: Path) -> None:
    class Policy:
        def save_pretrained(self, directory: str, bucket_bytes: int) -> None:
            write_model_files(tmp_path, ModelConfig(path=str(base)))

    (base := tmp_path / "gone").mkdir()
    told: list[str] = []
    rank: Any = object.__new__(LearnerRank)
    rank._policy, rank._calls = Policy(), SimpleNamespace(tell=told.append)
    rank._config = update_config("none")
    assert rank._config.checkpoint.every
    assert rank._write_policy("policy") is False
    assert re.search(
        "the policy was not written to policy: .*gone.*; `launch.py export` makes it of a checkpoint", told[0]
    )
    rank._config = rank._config.model_copy(
        update={"checkpoint": rank._config.checkpoint.model_copy(update={"every": 0})}
    )
    with pytest.raises(ConfigError, match="gone"):
        rank._write_policy("policy")
