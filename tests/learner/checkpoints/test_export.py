"""Exported policies: what transformers loads from them is what the checkpoint holds. (Of real ranks:
tests/learner/checkpoints/test_checkpoint_resume.py.)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from learner.checkpoints import checkpoint, export
from recipes.arithmetic import make_llama, make_tokenizer
from tests.support import ROOT
from tests.support.learning.saved import load, save_checkpoint


@pytest.fixture(params=["tied", "untied"])
def trained(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path: Path
) -> tuple[Path, Path, Any]:
    """(run directory, base model's directory, a model that is no longer its base)."""
    model = load(tiny_models[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    save_checkpoint(tmp_path / "run", model, tiny_models[request.param])
    return tmp_path / "run", tiny_models[request.param], model


def test_an_export_is_the_policy_with_all_that_goes_with_it(
    trained: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GenerationConfig

    run_dir, base_dir, model = trained
    out = export.export(run_dir, 5, tmp_path / "out")
    mine, theirs = load(out), model
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(mine(ids).logits, theirs(ids).logits)
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()  # Tied weights once.
    assert mine.config.to_diff_dict() == load(base_dir).config.to_diff_dict()
    assert (
        AutoTokenizer.from_pretrained(out)("1+2=").input_ids
        == AutoTokenizer.from_pretrained(base_dir)("1+2=").input_ids
    )
    assert GenerationConfig.from_pretrained(out).eos_token_id == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_exported_policy_names_every_token_at_which_its_completions_ended(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    base = shutil.copytree(tiny_models["tied"], tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}<pad>{% endfor %}"
    )
    save_checkpoint(tmp_path / "run", load(base), base)
    out = export.export(tmp_path / "run", 5, tmp_path / "out")
    assert GenerationConfig.from_pretrained(base).eos_token_id == 1
    assert GenerationConfig.from_pretrained(out).eos_token_id == [0, 1]


@pytest.mark.parametrize("shard_bytes", [1, 40_000, 10**9])
def test_shards_hold_every_tensor_once_and_keep_to_their_size(
    shard_bytes: int, trained: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    from safetensors import safe_open

    run_dir, _, model = trained
    out = export.export(run_dir, None, tmp_path / "out", shard_bytes=shard_bytes)
    sizes: dict[str, dict[str, int]] = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes[path.name] = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 -- no dict
    names = [name for shard in sizes.values() for name in shard]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert all(sum(shard.values()) <= shard_bytes or len(shard) == 1 for shard in sizes.values())
    assert (len(sizes) == 1) == (shard_bytes == 10**9)
    if len(sizes) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: shard for shard, content in sizes.items() for name in content}
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in load(out).state_dict().items()
    )


def test_an_export_has_the_dtype_of_the_runs_config(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = load(tiny_models["untied"])
    save_checkpoint(tmp_path / "run", model, tiny_models["untied"], dtype="bfloat16")
    exported = load(export.export(tmp_path / "run", None, tmp_path / "out"))
    assert exported.config.dtype == torch.bfloat16
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].bfloat16()), name


def test_what_cannot_be_exported_is_said_and_nothing_is_left(
    trained: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _, _ = trained
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; there are: 5"):
        export.export(run_dir, 6, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no checkpoint that verifies"):
        export.export(tmp_path / "nowhere", None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        export.export(run_dir, 5, run_dir)
    write, written = checkpoint.write_tensors, list[str]()

    def full(path: Path, *arguments: Any) -> Any:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(export, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export.export(run_dir, 5, tmp_path / "out", shard_bytes=40_000)
    assert written
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    path = run_dir / "checkpoints" / "step-000005" / "rank-1.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"rank-1\.safetensors has the sha256"):
        export.export(run_dir, 5, tmp_path / "out")


@pytest.mark.slow
def test_the_command_line_exports_and_explains(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models["tied"])
    save_checkpoint(tmp_path / "run", model, tiny_models["tied"])

    def launched(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "launch.py", "export", *words],
            cwd=ROOT,
            timeout=120,
            capture_output=True,
            text=True,
        )

    done = launched(str(tmp_path / "run"), "--step", "5", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    pairs = zip(load(tmp_path / "out").parameters(), model.parameters(), strict=True)
    assert all(torch.equal(exported, saved) for exported, saved in pairs)
    for words, message in (
        (("--step", "5", "--out", str(tmp_path / "out")), "is not an empty directory"),
        (("--step", "6", "--out", str(tmp_path / "other")), "6"),
        (("--out", "/proc/nothing/out"), "/proc/nothing/out cannot be written"),
    ):
        refused = launched(str(tmp_path / "run"), *words)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


def test_an_export_never_has_more_than_a_few_tensors_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), hidden=512, layers=8)  # 100 MB, its largest tensor 3.
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_checkpoint(tmp_path / "run", model, tmp_path / "base")
    used: list[int] = []
    read = checkpoint.Checkpoint.read

    def measured(self: Any, key: str, *arguments: int) -> torch.Tensor:
        tensor = read(self, key, *arguments)
        status = Path("/proc/self/status").read_text()
        used.append(int(status.partition("RssAnon:")[2].split()[0]) * 1024)
        return tensor

    monkeypatch.setattr(checkpoint.Checkpoint, "read", measured)
    export.export(tmp_path / "run", 5, tmp_path / "out")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert whole > 90e6
    assert max(used) - used[0] < whole / 3  # Pages of the mapped files count as resident, too.
