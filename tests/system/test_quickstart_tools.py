"""A few steps of the quickstart with a tool: real vLLM, the shipped calculator, ZeRO-3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from actors.dialogue import Dialogue
from buffer.ledger import audit
from environments.spec import describe
from recipes import products
from tests.support.runs import ROOT, environment, rows_of

CONFIG = "configs/quickstart_tools.yaml"
CALCULATOR = "environments.calculator:Calculator"


def test_the_base_is_warmed_up_on_what_a_run_shows_it():
    tokenizer = products.make_tokenizer()
    tools = describe({"calculator": CALCULATOR})["calculator"].tools
    assert tuple(tool["function"]["name"] for tool in tools) == products.TOOLS
    dialogue = Dialogue(tokenizer, tools, {}, chat_template=True, end_ids=[tokenizer.eos_token_id])
    assert dialogue.check() == ()
    rng = products.random.Random(3)
    while len(talk := products.conversation(37, 42, rng)) == 2:
        continue
    whole = tokenizer.apply_chat_template(talk, tools=tools, tokenize=False)
    first = dialogue.first(talk[:1])
    call, reading = (tokenizer(text)["input_ids"] for text in whole.split("<assistant>")[1:])
    call, reading = call[: call.index(tokenizer.eos_token_id) + 1], reading
    said = dialogue.read("", call)
    assert [(asked.name, [*(asked.arguments or {})]) for asked in said.calls] == [
        ("calculate", ["expression"])
    ]
    shown = dialogue.continuation([{"role": "tool", "name": "calculate", "content": talk[2]["content"]}])
    assert [*first, *call, *shown, *reading] == tokenizer(whole)["input_ids"]


@pytest.mark.slow
def test_a_few_steps_of_the_quickstart_with_a_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WARM_UP_STEPS", 80)
    products.make_base(str(tmp_path / "base"))
    run_dir = tmp_path / "run"
    changes = {
        "model.path": tmp_path / "base",
        "run.dir": run_dir,
        "run.steps": 3,
        "actors.count": 1,
        "learner.groups_per_step": 4,
        "buffer.capacity": 12,
        "data.eval_rows": 10,
        "eval.sampling": "[1,1.0]",
    }
    command = [
        sys.executable,
        "launch.py",
        "train",
        CONFIG,
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=560, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = rows_of(run_dir)
    assert len(metrics) == 3
    assert all(1 < row["completions/turns"] <= 2 and row["completions/tool_calls"] > 0 for row in metrics)
    assert all(row["reward/error_fraction"] == 0 for row in metrics)
    assert audit(run_dir / "ledger.jsonl")["violations"] == []
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
