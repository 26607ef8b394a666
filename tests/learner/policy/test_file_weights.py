"""What the learner hands out is what the base's files hold, persistent buffers too. (In vLLM:
tests/system/test_families.py.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from learner.checkpoints import export
from learner.policy.file_weights import Unit, file_units
from learner.policy.lora import persistent_buffers
from tests.support.learning.saved import save_checkpoint
from tests.support.learning.tiny_families import make_family, stir


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options)


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 -- no dict


def shapes_of(units: list[Unit]) -> dict[str, tuple[int, ...]]:
    return {entry.key: entry.shape for unit in units for entry in unit.entries}


@pytest.fixture(params=["mixtral", "qwen3_moe", "deepseek_v3", "gemma4_text", "ernie4_5_moe"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_family(request.param, tmp_path / "base")


def test_names_and_shapes_are_those_of_the_files_before_anything_is_gathered(base: Path) -> None:
    units = file_units(load(base))
    assert shapes_of(units) == shapes(base)
    assert shapes_of(file_units(load(base, device_map="meta"))) == shapes(base)
    for unit in units:
        assert [(name, tuple(tensor.shape)) for name, tensor in unit.tensors()] == [
            (entry.key, entry.shape) for entry in unit.entries
        ]


def test_files_that_have_the_names_of_the_memory_keep_them(tmp_path: Path) -> None:
    base = make_family("qwen3_moe", tmp_path / "base")
    load(base).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in shapes(tmp_path / "fused")
    assert shapes_of(file_units(load(tmp_path / "fused"))) == shapes(tmp_path / "fused")


def test_a_buffer_has_its_own_dtype(tmp_path: Path) -> None:
    base = make_family("deepseek_v3", tmp_path / "base")
    dtypes = {
        entry.key: entry.dtype
        for unit in file_units(load(base, dtype=torch.bfloat16))
        for entry in unit.entries
    }
    assert {name for name, dtype in dtypes.items() if dtype != "bfloat16"} == {
        "model.layers.1.mlp.gate.e_score_correction_bias"
    }
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_comes_back_as_what_was_trained(base: Path, tmp_path: Path, dtype: str) -> None:
    model = load(base)
    stir(model, 0.1)
    save_checkpoint(tmp_path / "run", model, base, dtype=dtype)
    out = export.export(tmp_path / "run", None, tmp_path / "out")
    assert shapes(out) == shapes(base)
    again = load(out)
    buffers = dict(persistent_buffers(again))
    assert buffers.keys() == dict(persistent_buffers(model)).keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(again.state_dict()[name].dtype)), name
    assert {
        again.state_dict()[name].dtype for name in ("model.embed_tokens.weight", "model.norm.weight")
    } == {getattr(torch, dtype)}
    if dtype == "float32":
        ids = torch.tensor([[4, 13, 5, 14, 6]])
        assert torch.equal(again(ids).logits, model(ids).logits)
