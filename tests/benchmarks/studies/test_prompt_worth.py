"""What a run needed for a share of the held-out prompts is read from its directory."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.studies.prompt_worth import figures, first_version


def test_a_share_is_reached_where_three_evaluations_have_it_on_average() -> None:
    rates = [(0, 0.4), (20, 0.95), (40, 0.7), (60, 0.9), (80, 0.91), (100, 0.9), (120, 0.95)]
    assert first_version(rates, 0.9) == 80
    assert first_version(rates, 0.95) is None


def test_steps_and_tokens_are_those_of_that_version(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {seed: 3}\nbuffer: {skip_equal_rewards: true}\ndata: {}\n")
    rates = [(0, 0.4), (2, 0.9), (4, 0.95)]
    (tmp_path / "evaluations.jsonl").write_text(
        "\n".join(json.dumps({"policy_version": version, "solve_rate": rate}) for version, rate in rates)
    )
    rows = [
        {
            "progress/step": step,
            "progress/sampled_tokens": 30 * step,
            "completions/mean_length": 2.0 + step,
            "buffer/samples_total": 20 * step,
            "buffer/inserted": 5 * step,
            "buffer/evicted_equal": step,
        }
        for step in range(1, 5)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = figures(tmp_path)
    assert (found["skip_equal_rewards"], found["curriculum"], found["seed"]) == (True, None, 3)
    assert "steps" not in found, "no three evaluations have it"
    (tmp_path / "evaluations.jsonl").write_text(
        "\n".join(json.dumps({"policy_version": version, "solve_rate": 0.9}) for version, _ in rates)
    )
    found = figures(tmp_path)
    assert (found["steps"], found["generated_tokens"], found["trained_tokens"]) == (2, 140, 60)
    assert (found["generated_groups"], found["left_out"], found["passed_over"]) == (10, 2, 0.0)
