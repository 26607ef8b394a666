"""Before anything starts: a start and a dry run find the same faults, say the numbers, and leave
nothing on the disk.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.cli.dry_run import dry_run
from cluster.preparation import run_dir
from cluster.preparation.model_limits import check_cache, max_positions
from cluster.preparation.model_weights import check_weights
from cluster.preparation.prepare import check_start, ensure_model, locate_model, prepare
from core.config import Config, ModelConfig
from core.errors import AgroError, ConfigError, PlacementError
from learner.catalogue import parse_text
from tests.support import ROOT
from tests.support.configs import quickstart


@pytest.fixture
def here(tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, data, and models with one thing changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)  # dry_run sets it.
    monkeypatch.setattr(sys, "path", [*sys.path])  # What is imported from here is found without being told.
    shutil.copytree(ROOT / "configs" / "arithmetic", "data")
    for name in ("model", "pad-beyond", "token-beyond", "no-config", "rope-that-grows"):
        shutil.copytree(tiny_models["tied"], name)
    add_tokens("pad-beyond", pad_token="<pad-15>")
    add_tokens("token-beyond", additional_special_tokens=["7+"])
    Path("no-config/config.json").unlink()
    grows = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
    }
    Path("rope-that-grows/config.json").write_text(
        json.dumps(json.loads(Path("model/config.json").read_text()) | grows)
    )
    Path("tokens.jsonl").write_text(json.dumps({"prompt": "7+2=", "answer": "9"}) + "\n")
    Path("user_rewards.py").write_text(
        "def zero(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )
    return tmp_path


def add_tokens(directory: str, **tokens: Any) -> None:
    """Give the tokenizer a token that the model's embedding has no row for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(directory)


def config_of(*changes: str) -> Config:
    return quickstart("model.path=./model", "data.path=./data", *changes)


FAULTS = [
    (["rewards.functions={exact_math: 1}"], ["'exact_math' is not known", "'exact_match'"]),
    (["rewards.functions={user_rewards:zer: 1}"], ["user_rewards has no 'zer'", "'zero'"]),
    (["data.path=./dat"], ["data.path = ./dat", "no such file"]),
    (["data.path=./data?split=dev"], ["no split 'dev'"]),
    (["data.max_prompt_tokens=5"], ["rows are bad", "data.max_prompt_tokens is 5"]),
    (
        ["data.max_prompt_tokens=500", "actors.max_new_tokens=13"],
        ["are 513 tokens", "512 (max_position_embeddings)", "6 tokens"],
    ),
    (["model.path=./modle"], ["model.path = ./modle", "there is no", "did you mean model?"]),
    (["model.path=data/train.jsonl"], ["is a file"]),
    (["model.path=someone/model"], ["model.path = someone/model", "As a hub id", "hub cannot be asked"]),
    (
        ["model.path=models/x", "model.make=recipes.arithmetic:make_base"],
        ["reads as a hub id", "model.path=./models/x"],
    ),
    (
        ["model.path=~nobody-of-this-name/x"],
        ["model.path = ~nobody-of-this-name/x", "there is no user 'nobody-of-this-name'"],
    ),
    (["model.path=./" + "x" * 300], ["there is no"]),
    (["model.path=./no-config"], ["model.path"]),
    (
        ["model.path=./rope-that-grows"],
        ["rope_type = dynamic", "max_position_embeddings = 8", "Keep it at 8 or below"],
    ),
    (
        ["model.path=./pad-beyond"],
        ["pad token '<pad-15>' has the id 15", "15 rows (vocab_size)", "pad_token"],
    ),
    (["model.path=./token-beyond"], ["prompts hold tokens", "'7+' has the id 15", "has 15 rows"]),
    (
        ["model.path=./token-beyond", "data.path=tokens.jsonl", "data.eval_rows=0"],
        ["1 prompts hold tokens", "row 1:"],
    ),
    (
        ["data.curriculum=2", "buffer.num_shards=3", "data.path=tokens.jsonl", "data.eval_rows=0"],
        ["num_shards = 3 needs at least as many prompts", "one has 1"],
    ),
    (["run.dir=/"], ["run.dir = / holds other things than a run"]),
    (["run.dir=."], ["holds other things than a run"]),
    (["actors.count=2000"], ["this machine has", "actors.count = 2000", "GiB before any model is loaded"]),
    (["learner.ranks=9000"], ["learner.ranks = 9000"]),
    (["actors.engine_memory=5000"], ["actors.engine_memory = 5000"]),
    (
        ["actors.engine_memory=1e-5"],
        ["1e-05 GiB holds no sequence of 12 tokens", "Set actors.engine_memory="],
    ),
    (
        ["buffer.max_staleness=0", "weights.publish_every=3"],
        ["at step 1 every group is too old", "at step 3 only"],
    ),
]


def message_of(function: Any, config: Config) -> str:
    with pytest.raises(AgroError) as caught:
        function(config)
    assert len(str(caught.value).splitlines()) <= 8
    return str(caught.value)


def test_what_wandb_would_not_understand_is_refused_before_a_model_is_made(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("model.path=./made", "model.make=recipes.arithmetic:make_base")
    for name, word in (("WANDB_MODE", "off"), ("WANDB_PROJECT", "my/project")):
        with monkeypatch.context() as patch:
            patch.setenv(name, word)
            message = message_of(prepare, config)
            assert f"{name} = {word!r}" in message
            assert message_of(lambda config: list(dry_run(config)), config) == message
    assert not (here / "made").exists()


def test_a_start_and_a_dry_run_find_the_same_and_leave_nothing(here: Path) -> None:
    before = sorted(here.rglob("*"))
    for changes, words in FAULTS:
        config = config_of(*changes)
        message = message_of(lambda config: list(dry_run(config)), config)
        assert sorted(here.rglob("*")) == before, changes
        assert message_of(prepare, config) == message
        assert all(word in message for word in words), (changes, message)
    assert [path for path in here.rglob("*") if path.suffix == ".yaml"] == []


def test_a_dry_run_tells_what_it_read_and_prints_a_config_that_can_be_given_back(here: Path) -> None:
    before = sorted(here.rglob("*"))
    config = config_of("rewards.functions={user_rewards:zero: 1}", "learner.lr=1e-5", "run.name=0600")
    printed, *checks = list(dry_run(config))
    assert parse_text(printed.partition("\nplacement\n")[0], "what was printed") == config
    text = "\n".join(checks)
    for words in (
        f"{here}/runs/0600-",
        "would be made",
        "prompts        300 of data/train.jsonl; tokens: 4 to 6, median 5",
        "held out       100 of data/test.jsonl",
        "W&B            off",
        "nothing wrong",
    ):
        assert words in text, text
    assert sorted(here.rglob("*")) == before


def test_a_dry_run_makes_no_model_and_says_what_it_did_not_check(here: Path) -> None:
    config = config_of("model.path=./made", "model.make=recipes.arithmetic:make_base")
    text = "\n".join(dry_run(config))
    assert f"recipes.arithmetic:make_base would make {here}/made" in text
    assert "not checked    what needs the model" in text
    assert not Path("made").exists()
    assert "300 lines of data/train.jsonl" in text
    changes = ["model.path=./made", "model.make=recipes.arithmetic:make_base", "data.path=./data?split=dev"]
    assert "no split 'dev'" in message_of(lambda config: list(dry_run(config)), config_of(*changes))


def test_a_dry_run_ends_with_what_the_machines_lack(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Packages for CPUs would be refused first.
    monkeypatch.setattr("cluster.preparation.installed.installed_kind", lambda: None)
    found = []
    with pytest.raises(PlacementError, match="this run cannot be placed"):
        found.extend(dry_run(config_of("learner.num_gpus=1", "learner.ranks=7")))
    lines = iter(dry_run(config_of("learner.num_gpus=1", "learner.ranks=7")))
    assert "warning: this run cannot be placed" in next(lines)
    assert "checks" in list(itertools.islice(lines, 3))


def test_a_model_is_made_at_its_own_path_only(here: Path) -> None:
    Path("recipe.py").write_text(
        "import pathlib\n\ndef make(path):\n    pathlib.Path(path).mkdir()\n\ndef fail(path):\n    raise "
        "KeyError('x')\n"
    )
    made = ensure_model(config_of("model.path=./made", "model.make=recipe:make"))
    assert (made.model.path, Path("made").is_dir()) == (str(here / "made"), True)
    assert locate_model(config_of()).model.path == str(here / "model")
    for recipe, words in (
        ("recipe:fail", "failed"),
        ("recipe:none", "recipe"),
        ("no_recipe:make", "no_recipe"),
    ):
        message = message_of(prepare, config_of("model.path=./other", f"model.make={recipe}"))
        assert f"model.make = {recipe}" in message
        assert words in message
    assert not Path("runs").exists()


def test_a_start_opens_its_directory_last(here: Path) -> None:
    inputs = prepare(config_of("run.dir=new"))
    assert (inputs.run_dir, inputs.is_continued, len(inputs.prompts), inputs.pad_id) == (
        here / "new",
        False,
        300,
        0,
    )
    assert sorted(path.name for path in inputs.run_dir.iterdir()) == ["config.yaml", "run.lock"]
    while run_dir._held_locks:
        os.close(run_dir._held_locks.pop())
    assert (
        check_start(locate_model(config_of("run.dir=new"))) == f"the run in {here / 'new'} would be continued"
    )


def test_what_is_in_the_cache_needs_no_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    assert "would be made" in check_start(locate_model(config_of("model.path=someone/model")))


# --- Positions ---


def hf_config(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **changes)


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


KINDS = [
    ("llama", {"max_position_embeddings": 96}, 96),
    ("llama", {"max_position_embeddings": 96, **scaled("linear", factor=2.0)}, 192),
    ("llama", {"max_position_embeddings": 96, **scaled("dynamic", factor=4.0)}, 384),
    (
        "llama",
        {"max_position_embeddings": 96, **scaled("yarn", factor=4.0, original_max_position_embeddings=24)},
        96,
    ),
    ("gpt2", {"n_positions": 64}, 64),
    ("opt", {"max_position_embeddings": 64}, 64),
    ("gpt_neox", {"max_position_embeddings": 64}, 64),
    ("bloom", {}, None),
    ("mamba", {}, None),
    ("gemma3_text", {"max_position_embeddings": 96}, 96),
    ("qwen2", {"max_position_embeddings": 96, "sliding_window": 8}, 96),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), KINDS)
def test_positions_are_known_from_the_config(
    kind: str, changes: dict[str, Any], expected: int | None
) -> None:
    found = max_positions(hf_config(kind, **changes))
    assert (found and found[0]) == expected


def test_a_cache_is_not_asked_to_hold_keys_of_each_head_where_all_share_them() -> None:
    config = quickstart("actors.engine_memory=0.001")
    with pytest.raises(ConfigError, match="holds no sequence of 12 tokens"):
        check_cache(config, hf_config("llama"))
    check_cache(config, hf_config("falcon"))


@pytest.mark.slow
def test_positions_are_those_that_vllm_finds() -> None:
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    for kind, changes, expected in KINDS:
        found = hf_config(kind, **changes)
        derived = ModelArchConfigConvertorBase(found, found.get_text_config()).derive_max_model_len_and_key()
        shape: Any = SimpleNamespace(derived_max_model_len_and_key=derived)
        if expected is None:
            assert _get_and_verify_max_len(found, shape, None, 10**9, False, None) == 10**9
            continue
        assert _get_and_verify_max_len(found, shape, None, expected, False, None) == expected
        with pytest.raises(ValueError, match="is greater than the derived"):
            _get_and_verify_max_len(found, shape, None, expected + 1, False, None)


def test_the_largest_seed_and_timeout_are_those_that_libraries_take() -> None:
    import random
    import threading
    from datetime import timedelta

    import numpy as np

    from core.config import MAX_NUMBER, MAX_TIMEOUT_S

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(MAX_NUMBER - 1)
    with pytest.raises(ValueError, match="2\\*\\*32"):
        np.random.seed(MAX_NUMBER)
    assert MAX_TIMEOUT_S * 1000 < 2**31
    assert threading.TIMEOUT_MAX > MAX_TIMEOUT_S
    assert timedelta(seconds=MAX_TIMEOUT_S).days == 23
    with pytest.raises(ConfigError, match=r"run\.seed"):
        config_of(f"run.seed={MAX_NUMBER}")


def test_a_model_that_can_never_end_a_completion_is_told(here: Path) -> None:
    for name, key in (
        ("tokenizer_config", "eos_token"),
        ("config", "eos_token_id"),
        ("generation_config", "eos_token_id"),
    ):
        path = here / "model" / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    told = "\n".join(dry_run(config_of()))
    assert (
        "warning: no end token is known (neither tokenizer, generation_config.json, config.json nor chat "
        "template names one)" in told
    )


def test_prompts_that_end_as_if_nothing_were_to_follow_are_told(here: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1=<eos>", "answer": "2"}]
    (here / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = "\n".join(dry_run(config_of("data.eval_rows=0")))
    assert "warning: 1 of 2 prompts end in an end token (the first: row 2)" in told


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "model.safetensors",
            None,
            ["no weights: neither model.safetensors nor pytorch_model.bin", "Copy the model's weights"],
        ),
        ("model.safetensors", b"", ["model.safetensors cannot be read", "header too small"]),
        ("model.safetensors", b"half", ["model.safetensors cannot be read"]),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ["is a pointer of git-lfs"]),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-1.safetensors"}}',
            ["its index names model-1.safetensors"],
        ),
        ("model.safetensors.index.json", b"[]", ["is no index of weights"]),
        ("model.safetensors.index.json", b"{", ["is no index of weights"]),
        ("pytorch_model.bin", b"", ["pytorch_model.bin is empty"]),
    ],
)
def test_weights_that_cannot_be_read_are_found_without_an_engine(
    here: Path, name: str, content: bytes | None, parts: list[str]
) -> None:
    Path("model/model.safetensors").unlink()
    if content is not None:
        Path("model", name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        check_weights(ModelConfig(path="model"))
    assert all(part in str(refused.value) for part in parts)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_of_weights_that_is_torn_is_found_by_a_dry_run(here: Path) -> None:
    whole = Path("model/model.safetensors").read_bytes()
    check_weights(ModelConfig(path="model"))
    Path("model/model.safetensors").write_bytes(whole[:-1])
    assert "model.safetensors cannot be read" in message_of(lambda config: list(dry_run(config)), config_of())


@pytest.mark.parametrize("name", ["org/" + "x" * 97, "some--one/model", "a..b/c"])
def test_a_name_that_the_hub_cannot_have_is_refused(here: Path, name: str) -> None:
    assert "the hub has no such names" in message_of(check_start, config_of(f"model.path={name}"))
