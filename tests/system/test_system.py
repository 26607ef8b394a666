"""The whole system with its real parts, started as a user starts it: bare, by `ray job submit`, stopped
by signals, killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from buffer.ledger import audit, audit_run
from core.metrics import METRICS
from tests.support.clocks.machine import machine_s
from tests.support.clone import BY_TEST, make_clone
from tests.support.clone import run as run_in_clone
from tests.support.runs import (
    ROOT,
    STEPS,
    environment,
    overrides,
    processes_of,
    rows_of,
    start_train,
    wait_for_end,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.alone]


class TestFinishedRun:
    """One run to its end; everything it left is looked at."""

    @pytest.fixture(scope="class")
    def run(self, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
        run_dir = tmp_path_factory.mktemp("run") / "run"
        process = start_train(tiny_models["tied"], run_dir, STEPS, "learner.ranks=2", "learner.num_cpus=0.5")
        out, err = process.communicate(timeout=280)
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


def check_ends_in_order(process: subprocess.Popen[str], run_dir: Path, name: str, code: int) -> None:
    """Sends the signal: the run ends within 30 s with all its files, and no process of it is left."""
    family = processes_of([process.pid])
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # As Ctrl-C in a terminal: the whole process group.
    else:
        process.send_signal(signal.SIGTERM)
    start_s = machine_s()
    out, err = process.communicate(timeout=120)
    assert machine_s() - start_s <= 30
    assert process.returncode == code, out + err
    assert f"stopped: {name}" in out
    assert (run_dir / "policy" / "model.safetensors").exists()
    assert (run_dir / "report.html").exists()
    assert len(family) > 5
    assert wait_for_end(family) == []


def test_ctrl_c_ends_the_run_in_order_and_leaves_no_process(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    process = start_train(tiny_models["tied"], tmp_path / "run", 5000)
    wait_for_step(process, tmp_path / "run", 3)
    check_ends_in_order(process, tmp_path / "run", "SIGINT", 130)


def test_a_hangup_while_the_processes_load_is_answered_at_once_and_ends_in_order(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    process = start_train(tiny_models["tied"], tmp_path / "run", 5000)
    assert process.stdout is not None
    assert process.stderr is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("starting the processes"):
            break
    assert [line.split()[0] for line in told] == [
        "reading",
        "loading",
        "starting",
        "reading",
        "run",
        "starting",
    ], told
    family = processes_of([process.pid])
    process.send_signal(signal.SIGHUP)
    start_s = machine_s()
    line = next(line for line in process.stderr if line.startswith("SIGHUP"))
    assert machine_s() - start_s < 1.0
    assert "ending in order" in line
    out, err = process.communicate(timeout=120)
    assert process.returncode == 129, out + err
    assert "stopped: SIGHUP" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == "SIGHUP"
    assert wait_for_end(family) == []


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """A command from another shell."""
    return subprocess.run(
        [sys.executable, "launch.py", *words],
        cwd=ROOT,
        env=environment(),
        timeout=120,
        capture_output=True,
        text=True,
    )


def running_actors(run_dir: Path) -> dict[str, int]:
    """Process ids of the actors that run, by name, as status.json has them."""
    actors = json.loads((run_dir / "status.json").read_text())["actors"]
    return {actor["name"]: actor["pid"] for actor in actors if actor["state"] == "running"}


def wait_for_actors(
    process: subprocess.Popen[str], run_dir: Path, *names: str, timeout_s: float = 150
) -> None:
    """Until these run, and no other."""
    deadline_s = time.monotonic() + timeout_s
    while running_actors(run_dir).keys() != set(names):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, launch("status", str(run_dir)).stdout
        time.sleep(0.2)


def wait_for_status(run_dir: Path, pattern: str, timeout_s: float = 120) -> None:
    """Until a line of `launch.py status` is so: a run writes its status once a second."""
    deadline_s = time.monotonic() + timeout_s
    while not re.search(pattern, shown := launch("status", str(run_dir)).stdout, re.MULTILINE):
        assert time.monotonic() < deadline_s, shown


def check_nothing_is_lost(run_dir: Path) -> None:
    """The ledger has no contradiction, nothing is in flight after the end, and every step had its whole
    batch.
    """
    result = launch("audit", str(run_dir))
    assert result.returncode == 0, result.stdout
    assert "no violations" in result.stdout
    found = audit_run(run_dir)
    assert found["balance"].endswith(" 0 in flight")
    steps = [row["progress/step"] for row in rows_of(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    # learner.groups_per_step; a batch may have been handed out and not used.
    assert found["events"]["trained"] >= 8 * len(steps)
    assert found["max_staleness"] <= 16


def test_scaling_one_to_three_to_one_from_another_shell_and_sigterm_lose_nothing(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start_train(tiny_models["tied"], run_dir, 100_000)
    wait_for_step(process, run_dir, 2)
    wait_for_actors(process, run_dir, "actor-0")
    before = len(rows_of(run_dir))
    more = launch("scale", str(run_dir), "--actors", "3")
    assert more.returncode == 0, more.stderr
    assert "3 actors; 2 added, 0 retire" in more.stdout
    assert re.search(r"^\+ actor-2 +(waiting for placement|loading)", more.stdout, re.MULTILINE)
    wait_for_actors(process, run_dir, "actor-0", "actor-1", "actor-2")
    between = len(rows_of(run_dir))
    assert between > before + 1  # The learner went on while they loaded.
    fewer = launch("scale", str(run_dir), "--actors", "1")
    assert re.search(r"^- actor-2 +retiring", fewer.stdout, re.MULTILINE), fewer.stdout + fewer.stderr
    wait_for_actors(process, run_dir, "actor-0")
    wait_for_step(process, run_dir, len(rows_of(run_dir)) + 5)
    wait_for_status(run_dir, r"^ +actor-1 +gone for .* retired$")
    check_ends_in_order(process, run_dir, "SIGTERM", 143)
    check_nothing_is_lost(run_dir)
    events = " ".join(event["text"] for event in rows_of(run_dir, "events"))
    assert "scaled from 1 to 3 actors, as asked: actor-1, actor-2 added" in events
    assert "died" not in events
    assert "the run is over (SIGTERM)" in launch("scale", str(run_dir), "--actors", "2").stderr


def test_all_actors_killed_the_learner_waits_and_goes_on_and_a_killed_driver_leaves_no_process(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start_train(tiny_models["tied"], run_dir, 100_000, "actors.count=2")
    wait_for_step(process, run_dir, 2)
    wait_for_actors(process, run_dir, "actor-0", "actor-1")
    for pid in running_actors(run_dir).values():
        os.kill(pid, signal.SIGKILL)
    killed_s, deadline_s = machine_s(), time.monotonic() + 60
    while not any("actor-1 died" in event["text"] for event in rows_of(run_dir, "events")):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert machine_s() - killed_s < 3.0
    wait_for_actors(process, run_dir, "actor-0.1", "actor-1.1")
    wait_for_step(process, run_dir, len(rows_of(run_dir)) + 5)
    family = processes_of([process.pid])
    process.kill()
    process.communicate(timeout=120)
    assert wait_for_end(family) == []
    found, rows = audit_run(run_dir), rows_of(run_dir)
    assert found["violations"] == []
    assert [row["progress/step"] for row in rows] == list(range(1, len(rows) + 1))
    assert found["events"]["trained"] >= 8 * len(rows)
    assert found["max_staleness"] <= 16
    events = [event["text"] for event in rows_of(run_dir, "events")]
    assert sum(" died, restarted as " in text for text in events) == 2  # Each once.
    assert any("all actors are dead; the learner waits" in text for text in events)
    assert any(text.startswith("the learner goes on: step") for text in events)


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


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A local head with token authentication, ended by its own pid; no port of it is another's."""
    sockets = [socket.socket() for _ in range(4)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    port, dashboard_port, agent_port, client_port = (each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0123456789abcdef" * 4)
    temp_dir = Path("/tmp") / f"agro-ray-{os.getpid()}"  # Ray's sockets need a short path.
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}",
        f"--ray-client-server-port={client_port}",
    ]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={temp_dir}"]
    log = tmp_path / "head.log"
    with log.open("w") as file, subprocess.Popen(command, env=env, stdout=file, stderr=file) as head:
        try:
            deadline_s = time.monotonic() + 180
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s
                time.sleep(0.5)
            yield {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
        finally:
            family = processes_of([head.pid])[1:]
            head.terminate()
            head.wait(timeout=60)
            for process in psutil.wait_procs(family, timeout=10)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def test_ray_job_submit_with_token_authentication(
    ray_head: dict[str, str], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    entrypoint = [
        "python",
        "launch.py",
        "train",
        "configs/quickstart.yaml",
        *overrides(tiny_models["untied"], tmp_path / "run", 4),
    ]
    command = ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint]
    refused = subprocess.run(
        command,
        cwd=ROOT,
        env={**ray_head, "RAY_AUTH_TOKEN": "f" * 64},
        timeout=180,
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    deadline_s = time.monotonic() + 120
    while True:
        done = subprocess.run(command, cwd=ROOT, env=ray_head, timeout=280, capture_output=True, text=True)
        if "No available agent to submit job" not in done.stderr or time.monotonic() > deadline_s:
            break  # A head that has just started has no agent for jobs yet, and says "try again later".
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert "quickstart finished" in done.stdout
    rows = rows_of(tmp_path / "run")
    assert [row["progress/step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["mismatch/tokens"] > 32
    assert rows[0]["mismatch/mean"] < 1e-4
    assert "actors and learner agree at learner step 0" in (tmp_path / "run" / "events.jsonl").read_text()
    assert (tmp_path / "run" / "report.html").exists()
