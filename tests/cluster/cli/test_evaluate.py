"""`launch.py evaluate` on suites: a simulated engine, real rewards; it goes on where it was ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fake_engine import FakeEngine
from cluster.cli import evaluate as module
from cluster.cli.evaluate import evaluate, table
from core.config import Config
from core.errors import AgroError, ConfigError, RewardError

CONFIG = """
model: {path: none}
data: {path: DATA, chat_template: false, max_prompt_tokens: 8}
rewards: {functions: {exact_match: 1.0}}
actors: {max_new_tokens: 4, slots: 8}
eval:
  sampling: [2, 1.0]
  suites:
    all: {path: DATA, samples: 4}
    few: {path: DATA, rows: 3, temperature: 0, functions: {exact_match: 2.0}}
"""


@pytest.fixture
def ask(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., module.Evaluated]:
    """Evaluates the tiny model by a simulated engine, whose samples are digits."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(9)))
    (tmp_path / "config.yaml").write_text(CONFIG.replace("DATA", str(data)))

    def make(config: Config) -> FakeEngine:
        return FakeEngine(config.actors, num_tokens=(2, 3), version=0)

    monkeypatch.setattr(module, "_make_engine", make)
    monkeypatch.setattr(module, "SAY_EVERY_S", 0.0)

    def asked(*overrides: str, **more: Any) -> module.Evaluated:
        given = {"config_path": str(tmp_path / "config.yaml"), "out": str(tmp_path / "out")} | more
        return evaluate(str(tiny_models["tied"]), overrides, **given)

    return asked


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def test_suites_are_evaluated_and_table_and_samples_are_written(ask: Any) -> None:
    said: list[str] = []
    found = ask(say=said.append)
    every, few = found.results
    assert (every.suite, every.num_problems, every.num_samples, every.num_errors) == ("all", 9, 36, 0)
    assert (few.num_problems, few.num_samples) == (3, 6)
    assert {"avg@4", "pass@4", "majority@4", "pass@2"} <= every.metrics.keys()
    assert 0.0 < every.metrics["pass@4"] <= 1.0
    assert few.solve_rate in {2.0 * right / 6 for right in range(7)}
    samples = lines(found.directory)
    assert len(samples) == 12
    assert {len(sample["texts"]) for sample in samples if sample["item"]["suite"] == "all"} == {4}
    tree = json.loads((found.directory / "evaluation.json").read_text())
    assert [result["suite"] for result in tree["results"]] == ["all", "few"]
    shown = (found.directory / "evaluation.md").read_text()
    assert table(found.results) in shown
    assert "| avg@4" in shown
    assert "±" in shown
    assert any("all 9/9" in text and "s left" in text for text in said)


def test_it_goes_on_where_it_was_ended_and_asks_nothing_twice(ask: Any, monkeypatch: Any) -> None:
    whole = ask()
    path = whole.directory / "samples.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # Torn in the middle of a line.
    said: list[str] = []
    again = ask(say=said.append)
    assert "going on in" in said[0]
    assert [result.metrics for result in again.results] == [result.metrics for result in whole.results]
    items = [(line["item"]["suite"], line["item"]["prompt_index"]) for line in lines(whole.directory)]
    assert len(set(items)) == len(items) == 12

    def none(config: Config) -> Any:
        raise AssertionError("an engine for nothing")

    monkeypatch.setattr(module, "_make_engine", none)
    assert ask().results == again.results


def test_one_suite_by_name(ask: Any) -> None:
    (few,) = ask(suites=["few"]).results
    assert few.suite == "few"


@pytest.mark.parametrize(
    ("overrides", "more", "words"),
    [
        ((), {"suites": ["fw"]}, "--suite fw: there is no such suite; valid here: all, few"),
        ((), {"config_path": None}, "Give a config: --config FILE"),
        (("eval.suites={}", "data.eval_rows=0"), {}, "there is nothing to evaluate on"),
        (("eval.suites.few.functions={no_such: 1.0}",), {}, "eval.suites.few.functions: "),
        (("eval.suites.few.path=nowhere.jsonl",), {}, "eval.suites.few.path = nowhere.jsonl"),
        (("actors.max_new_tokens=4000",), {}, "positions for 512"),
    ],
)
def test_what_cannot_be_evaluated_is_said(ask: Any, overrides: Any, more: Any, words: str) -> None:
    with pytest.raises(AgroError) as caught:
        ask(*overrides, **more)
    assert words in str(caught.value)


def test_another_evaluation_is_not_mixed_in(ask: Any, tmp_path: Path) -> None:
    ask()
    with pytest.raises(ConfigError, match="another model or of other settings"):
        ask("eval.suites.few.rows=2")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="is not an empty directory"):
        ask(out=str(tmp_path / "taken"))


def test_a_reward_that_fails_is_an_error_and_is_counted_by_its_reason(ask: Any) -> None:
    found = ask("eval.suites.few.functions={tests.support.reward_functions:raises: 1.0}", suites=["few"])
    assert found.results[0].num_errors == 6
    assert sum(found.reasons.values()) == 6
    assert issubclass(RewardError, AgroError)


def test_a_suite_is_played_in_its_environment(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twice.py").write_text(
        "class Twice:\n"
        "    def reset(self, **row):\n"
        "        self.said = []\n"
        "    def step(self, text):\n"
        "        self.said.append(text)\n"
        "        return '+1=', float(len(self.said)), len(self.said) == 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (few,) = ask(
        "eval.suites.few.environments=twice:Twice",
        "eval.suites.few.functions={environment: 1.0}",
        suites=["few"],
    ).results
    assert (few.num_samples, few.num_errors) == (6, 0)
    assert few.solve_rate == 3.0, "the rewards of both turns"
