"""The whole system with its real parts, started as a user starts it: to its end, and where it is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.ledger import audit
from core.metrics import METRICS
from tests.support.clone import BY_TEST, make_clone
from tests.support.clone import run as run_in_clone
from tests.support.runs import ROOT, STEPS, environment, rows_of, start_train

pytestmark = pytest.mark.slow


class TestFinishedRun:
    """One run to its end; everything it left is looked at."""

    @pytest.fixture(scope="class")
    def run(self, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
        run_dir = tmp_path_factory.mktemp("run") / "run"
        process = start_train(tiny_models["tied"], run_dir, STEPS, "learner.ranks=2", "learner.num_cpus=0.5")
        out, err = process.communicate(timeout=560)
        assert process.returncode == 0, out + err
        return run_dir, out

    def test_one_row_per_step_with_every_metric(self, run: tuple[Path, str]) -> None:
        rows = rows_of(run[0])
        assert [row["progress/step"] for row in rows] == list(range(1, STEPS + 1))
        assert all(METRICS.keys() <= row.keys() for row in rows)
        last = rows[-1]
        # Of the buckets, only those that have samples are known; the mismatch, where there are fresh ones.
        may_lack = ("by_", "mismatch/", "objective/brake_share", "environment/")
        unknown = [name for name in METRICS if last[name] is None and not name.startswith(may_lack)]
        assert rows[0]["mismatch/mean"] < 1e-4
        # A share of nothing.
        assert all(
            (row["objective/brake_share"] is None) == (row["objective/reward_std"] == 0) for row in rows
        )
        assert any(row["by_staleness/advantage_1-3"] is not None for row in rows)
        scored = {"reward/queue_s", "reward/busy_share"}  # Where groups were scored since the row before.
        assert all(any(row[name] is not None for row in rows) for name in scored)
        unknown = [name for name in unknown if name not in scored]
        assert set(unknown) in (set(), {"perf/sampled_tokens_per_s", "time/actor_busy_fraction"}), unknown

    def test_off_policy_within_the_bound(self, run: tuple[Path, str]) -> None:
        ages = [row["staleness/oldest_token"] for row in rows_of(run[0])]
        assert 0 < max(ages) <= 16

    def test_weights_were_published_and_the_evaluations_name_their_version(
        self, run: tuple[Path, str]
    ) -> None:
        rows, evaluations = rows_of(run[0]), rows_of(run[0], "evaluations")
        assert rows[-1]["weights/version"] == STEPS
        assert [evaluation["policy_version"] for evaluation in evaluations] == [0, 6, 12]
        assert all(evaluation["num_problems"] == 20 for evaluation in evaluations)
        assert rows[-1]["eval/policy_version"] == STEPS

    def test_held_out_prompts_never_enter_the_buffer_and_every_lease_ends_once(
        self, run: tuple[Path, str]
    ) -> None:
        result = audit(run[0] / "ledger.jsonl")
        assert result["violations"] == []
        held_out = {
            json.loads(line)["prompt"]
            for line in (ROOT / "configs/arithmetic/test.jsonl").read_text().splitlines()
        }
        trained = {sample["prompt"] for sample in rows_of(run[0], "samples")}
        assert trained
        assert not trained & held_out

    def test_summary_names_staleness_solve_rates_and_what_to_do_next(self, run: tuple[Path, str]) -> None:
        out = run[1]
        for words in ("solve rate", "staleness  mean", "report.html", "launch.py chat", "launch.py evaluate"):
            assert words in out
        assert "Traceback" not in out

    def test_wandb_offline_run_and_report_are_written(self, run: tuple[Path, str]) -> None:
        (wandb_file,) = run[0].glob("wandb/offline-run-*/*.wandb")
        assert wandb_file.stat().st_size > 1000
        report = (run[0] / "report.html").read_text()
        assert "<svg" in report or "svg" in report
        assert not re.search(r"(src|href)=[\"']https?://", report)

    def test_policy_loads_in_transformers_and_has_changed(
        self, run: tuple[Path, str], tiny_models: dict[str, Path]
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        trained = AutoModelForCausalLM.from_pretrained(run[0] / "policy").state_dict()
        base = AutoModelForCausalLM.from_pretrained(tiny_models["tied"]).state_dict()
        assert trained.keys() == base.keys()
        assert any(not torch.equal(trained[name], base[name]) for name in base)

    def test_the_commands_of_readme_for_a_run(self, run: tuple[Path, str], tmp_path: Path) -> None:
        clone = make_clone(tmp_path / "clone")
        shown = [
            command
            for command, name in BY_TEST.items()
            if name.endswith("test_the_commands_of_readme_for_a_run")
        ]
        for command in shown:
            typed = command.replace("RUN_DIR", str(run[0])).replace("--step 200", f"--step {STEPS}")
            run_in_clone(clone, typed if typed.startswith(".venv/") else f".venv/bin/python {typed}")
        assert len(shown) == 7
        assert (clone / "DIR" / "model.safetensors").is_file()

    def test_policy_is_evaluated_by_vllm_through_the_cli(self, run: tuple[Path, str]) -> None:
        command = [
            sys.executable,
            "launch.py",
            "evaluate",
            str(run[0] / "policy"),
            "--out",
            str(run[0] / "evaluated"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), timeout=200, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"solve rate [01]\.\d+ on 20 held-out problems, 20 samples", done.stdout)

    def test_the_same_directory_is_not_overwritten(
        self, run: tuple[Path, str], tiny_models: dict[str, Path]
    ) -> None:
        process = start_train(tiny_models["tied"], run[0])
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2
        assert "already holds a finished run" in err
        assert "Traceback" not in err


def test_failing_rewards_stop_the_run_with_the_reason(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    process = start_train(
        tiny_models["tied"],
        tmp_path / "run",
        50,
        "rewards.functions={tests.support.reward_functions:raises: 1}",
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "samples got no reward" in err
    assert "raises" in err
    assert "Traceback (most recent call last)" not in err


def test_a_run_whose_actors_compute_another_function_than_the_learner_ends_before_its_first_step(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM's Llama reads layer_types, transformers' does not: a window that nobody's config check knows
    of.
    """
    shutil.copytree(tiny_models["untied"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    process = start_train(tmp_path / "model", tmp_path / "run", 50)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    for words in (
        "the actors do not sample from what the learner computes",
        "bound 0.0001 for float32",
        "Step 0 was not done",
    ):
        assert words in err
    assert (
        "Likely for llama (LlamaForCausalLM): its attention's window of 3 tokens: keep data.max_prompt_tokens"
        in err
    )
    assert "Traceback (most recent call last)" not in err
    assert rows_of(tmp_path / "run") == []
    assert not (tmp_path / "run" / "policy").exists()
    assert "do not sample from" in (tmp_path / "run" / "summary.json").read_text()
    assert (tmp_path / "run" / "report.html").exists()
