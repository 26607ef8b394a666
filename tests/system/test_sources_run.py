"""A whole run on three families of reasoning-gym at once, each with its share, scored as the family does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from buffer.ledger import audit
from buffer.sources import locate
from core.config import DataConfig
from recipes.arithmetic import make_llama
from tests.support.runs import ROOT, environment, overrides, rows_of
from tests.support.tokenizers_made import byte_tokenizer

SOURCES = {
    "reasoning_gym:chain_sum?max_terms=3&max_digits=1&size=40": 0.5,
    "reasoning_gym:gcd?size=40": 0.25,
    "reasoning_gym:spell_backward?size=40": 0.25,
}
SAYS = {
    "chain_sum": "arithmetic problem",
    "gcd": "Greatest Common Divisor",
    "spell_backward": "Spell this word",
}
STEPS = 3


def run_train(model: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "launch.py",
        "train",
        "configs/quickstart.yaml",
        *overrides(model, run_dir, STEPS),
        "rewards.functions={reasoning_gym: 1.0}",
        "data.max_prompt_tokens=128",
        "data.eval_rows=8",
        "actors.group_size=4",
        *more,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment(), timeout=560, capture_output=True, text=True)


def path_of(sources: dict[str, float]) -> str:
    return "data.path={" + ", ".join(f"'{name}': {share}" for name, share in sources.items()) + "}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer("<pad>", "<eos>")
    made = make_llama(len(tokenizer), hidden=64, layers=2, positions=256)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_three_families_at_once_have_their_shares_and_their_own_scores(model: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run_train(model, run_dir, path_of(SOURCES))
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"by_source/reward_{label}" for label in DataConfig(path=SOURCES).source_labels]
    assert names == [f"by_source/reward_{family}" for family in SAYS]
    metrics = rows_of(run_dir)
    assert len(metrics) == STEPS
    assert all(0 <= row[name] <= 1 for row in metrics for name in names if name in row)
    assert all(any(name in row for row in metrics) for name in names), "every family is trained on"
    shown = [sample["prompt"] for sample in rows_of(run_dir, "samples")]
    assert all(any(words in prompt for words in SAYS.values()) for prompt in shown)

    leased = {event["group_id"] for event in rows_of(run_dir, "ledger") if event["event"] == "leased"}
    assert leased == set(range(len(leased)))
    counts = Counter(locate(ordinal, (2, 1, 1))[0] for ordinal in leased)
    assert all(
        abs(counts[number] - len(leased) * share) < 1 for number, share in enumerate((0.5, 0.25, 0.25))
    )
    assert audit(run_dir / "ledger.jsonl")["violations"] == []
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == STEPS

    other = dict.fromkeys(SOURCES, 1 / 3)
    refused = run_train(model, run_dir, path_of(other), "run.steps=4")
    assert refused.returncode == 2
    assert "already holds a run with data.path = {" in refused.stdout + refused.stderr
