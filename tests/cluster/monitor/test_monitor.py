"""The monitor: every row complete, W&B never in the way, no secret written; and what the terminal shows
of it.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from cluster.monitor import monitor as monitor_module
from cluster.monitor.monitor import Monitor
from cluster.monitor.wandb_writer import WandbWriter, project_of, wandb_mode, wandb_project
from core import json_lines
from core.errors import ConfigError
from core.json_lines import JsonLines, Redactor, StepLines, last_json_lines, read_json_lines
from core.metrics import METRICS
from tests.support.clocks.machine import machine_s
from tests.support.monitored import Clock, evaluation, monitored, rows_of

CANARY_KEY = "c0ffee" * 6 + "abcd"
CANARY_TOKEN = "hf_canary-value-of-a-secret"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "run" / "wandb" / "data"))


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What hanging fakes wait for, so that their threads end with the test."""
    event = threading.Event()
    yield event
    event.set()


def test_every_row_has_every_metric_name(tmp_path: Path) -> None:
    monitor = Monitor(monitored(steps=3), str(tmp_path))
    for step in (1, 2, 3):
        monitor.log_step({"progress/step": step, "reward/mean": 0.5})
    monitor.close({})
    rows = rows_of(tmp_path)
    assert [row["progress/step"] for row in rows] == [1, 2, 3]
    assert all(set(METRICS) <= set(row) for row in rows)
    assert rows[0]["objective/kl_ref"] is None
    assert all(row["time/wall_s"] >= 0 for row in rows)


def test_values_that_are_no_finite_number_become_null_and_are_counted(tmp_path: Path) -> None:
    monitor = Monitor(monitored(), str(tmp_path))
    monitor.log_buffer({"buffer/groups": math.inf})
    monitor.log_step(
        {"progress/step": 1, "reward/mean": math.nan, "optim/lr": "high", "objective/kl_ref": None}
    )  # type: ignore[dict-item]
    monitor.close({"final_solve_rate": math.nan})
    (row,) = rows_of(tmp_path)
    assert row["reward/mean"] is row["optim/lr"] is row["buffer/groups"] is None
    assert row["monitor/null_values"] == 3
    assert json.loads((tmp_path / "summary.json").read_text()) == {"final_solve_rate": None}


def test_the_last_row_waits_for_the_final_evaluation(tmp_path: Path) -> None:
    monitor = Monitor(monitored(steps=2), str(tmp_path))
    monitor.log_evaluation(evaluation(0, 0.2), [])
    monitor.log_step({"progress/step": 1})
    monitor.log_step({"progress/step": 2})
    assert [row["progress/step"] for row in rows_of(tmp_path)] == [1]
    assert monitor.view()["row"]["progress/step"] == 2
    monitor.log_evaluation(evaluation(2, 0.9), [{"prompt": "1+1=", "completion": "2", "reward": 1.0}])
    monitor.close({})
    first, last = rows_of(tmp_path)
    assert (first["eval/solve_rate"], first["eval/policy_version"]) == (0.2, 0)
    assert (last["eval/solve_rate"], last["eval/policy_version"]) == (0.9, 2)
    lines, num_torn = read_json_lines(tmp_path / "evaluations.jsonl")
    assert num_torn == 0
    assert lines[1]["samples"] == [{"prompt": "1+1=", "completion": "2", "reward": 1.0}]


def test_actor_rates_are_differences_of_cumulative_counters_over_seconds(tmp_path: Path) -> None:
    clock = Clock()
    monitor = Monitor(monitored(steps=100), str(tmp_path), clock)

    def second(step: int, tokens: dict[str, float], busy_s: float) -> dict[str, Any]:
        clock.now_s += 1.0
        for name, count in tokens.items():
            monitor.log_actor(
                name, {"generated_tokens": count, "busy_s": busy_s, "apply_s": 0.1, "version": step}
            )
        monitor.log_step({"progress/step": step})
        return rows_of(tmp_path)[-1]

    assert second(1, {"a": 1000, "b": 500}, 0.0)["perf/sampled_tokens_per_s"] is None
    assert second(2, {"a": 1100, "b": 550}, 0.5)["perf/sampled_tokens_per_s"] is None
    row = second(3, {"a": 1200, "b": 600}, 1.0)
    assert row["perf/sampled_tokens_per_s"] == pytest.approx(150.0)
    assert row["time/actor_busy_fraction"] == pytest.approx(0.5)
    assert row["weights/apply_s"] == pytest.approx(0.1)
    # a is started again and counts from 0: b alone has a rate, none is negative
    row = second(4, {"a": 0, "b": 650}, 1.5)
    assert row["perf/sampled_tokens_per_s"] == pytest.approx(50.0)
    # all silent for long: nobody generates
    clock.now_s += 100
    monitor.log_step({"progress/step": 5})
    assert rows_of(tmp_path)[-1]["perf/sampled_tokens_per_s"] is None


def test_an_actor_that_is_gone_leaves_the_view_but_for_what_it_waited(tmp_path: Path) -> None:
    monitor = Monitor(monitored(), str(tmp_path))
    for name in ("actor-0", "actor-1"):
        monitor.log_actor(name, {"generated_tokens": 5.0, "wait_disk_s": 2.0})
    monitor.forget_actor("actor-0")
    monitor.log_actor("actor-0", {"wait_disk_s": 9.0})  # It was on its way.
    assert monitor.view()["actors"].keys() == monitor.generation().keys() == {"actor-1"}
    assert monitor.view()["waits"] == {
        "admission": 0.0,
        "rewards": 0.0,
        "weights": 0.0,
        "evaluation": 0.0,
        "disk": 4.0,
    }
    for number in range(1000):
        monitor.log_actor(f"actor-{number}.1", {})
        monitor.forget_actor(f"actor-{number}.1")
    assert len(monitor.view()["actors"]) == 1
    assert len(monitor._gone) <= 64


def test_a_warning_is_an_event_when_it_comes_and_whenever_its_count_gains_a_digit(tmp_path: Path) -> None:
    monitor = Monitor(monitored(), str(tmp_path))
    monitor.warn("actor-0", {"whole logits": 1})
    monitor.warn("actor-1", {"whole logits": 7, "other": 1})
    monitor.warn("actor-0", {"whole logits": 2})
    monitor.warn("actor-0", {"whole logits": 80})
    assert [event["text"] for event in monitor.view()["events"]] == [
        "actor-0: whole logits",
        "actor-1: other",
        "actor-0: whole logits (10 times by now, all processes together)",
    ]
    monitor.log_step({"progress/step": 1})
    assert rows_of(tmp_path)[-1]["monitor/warnings"] == 91


def test_a_continued_run_appends_and_keeps_the_last_evaluation(tmp_path: Path) -> None:
    first = Monitor(monitored(), str(tmp_path))
    first.log_step({"progress/step": 1})
    first.log_evaluation(evaluation(1, 0.4), [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"progress/step": 2, "rew')  # killed in mid-line
    second = Monitor(monitored(), str(tmp_path))
    second.log_step({"progress/step": 2})
    second.close({})
    rows, num_torn = read_json_lines(tmp_path / "metrics.jsonl")
    assert [row["progress/step"] for row in rows] == [1, 2]
    assert num_torn == 1
    assert rows[1]["eval/solve_rate"] == 0.4


def test_a_monitor_that_was_killed_goes_on_with_the_newest_row_the_time_and_the_row_it_held_back(
    tmp_path: Path,
) -> None:
    began_at_s = time.time() - 100.0

    def start() -> Monitor:
        return Monitor(monitored(steps=3), str(tmp_path), began_at_s=began_at_s)

    monitor = start()
    monitor.event("first")
    number = monitor.view()["events"][-1]["number"]
    for step in (1, 2):
        monitor.log_step({"progress/step": step, "reward/mean": step / 10})
    monitor = start()
    assert (monitor.view()["row"]["progress/step"], monitor.view()["row"]["reward/mean"]) == (2, 0.2)
    assert 100 <= monitor.view()["wall_s"] < 120
    monitor.event("second")
    assert monitor.view()["events"][-1]["number"] > number, (
        "what the terminal has shown is known by its number"
    )
    monitor.log_step({"progress/step": 2, "reward/mean": 0.2})  # Ray repeats a call whose answer was lost.
    monitor.log_step({"progress/step": 3, "reward/mean": 0.3})
    monitor = start()
    monitor.log_evaluation(evaluation(3, 0.75), [])
    monitor.close({})
    rows = read_json_lines(tmp_path / "metrics.jsonl")[0]
    assert [(row["progress/step"], row["reward/mean"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert rows[-1]["eval/solve_rate"] == 0.75
    later = Monitor(monitored(steps=9), str(tmp_path), began_at_s=time.time())
    assert later.view()["row"]["progress/step"] is None, "of an earlier start of the run"
    later.close({})


@pytest.mark.parametrize(
    ("steps", "done", "found"), [(2, [], [1, 2]), (3, [3], [1, 2, 3]), (2, [1, 2], [1, 2])]
)
def test_the_row_that_a_killed_run_held_back_is_written_by_the_start_that_goes_on(
    steps: int, done: list[int], found: list[int], tmp_path: Path
) -> None:
    """From behind its last step, with more steps, or from a checkpoint before it."""
    killed = Monitor(monitored(steps=2), str(tmp_path), began_at_s=time.time() - 100.0)
    for step in (1, 2):
        killed.log_step({"progress/step": step, "reward/mean": 0.5})
    again = Monitor(monitored(steps=steps), str(tmp_path), began_at_s=time.time())
    for step in done:
        again.log_step({"progress/step": step, "reward/mean": 0.25})
    again.log_evaluation(evaluation(steps, 0.75), [])
    again.close({})
    rows = read_json_lines(tmp_path / "metrics.jsonl")[0]
    assert [row["progress/step"] for row in rows] == found
    assert [row["reward/mean"] for row in rows] == [0.25 if row in done else 0.5 for row in found]
    assert rows[-1]["eval/solve_rate"] == 0.75


def test_lines_that_a_full_disk_keeps_out_for_too_long_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.json_lines._MAX_PENDING_LINES", 3)
    lines = JsonLines(Path("/dev/full"), Redactor({}))
    for number in range(5):
        lines.append({"number": number})
    assert (lines.lines_lost, lines.write_errors) == (2, 5)


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / "x.jsonl", Redactor({}))
    lines.append({"n": 1})
    with monkeypatch.context() as full:
        real_write = monitor_module.os.write
        room = [5]

        def write(descriptor: int, payload: bytes) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            written = real_write(descriptor, payload[: room[0]])
            room[0] -= written
            return written

        full.setattr(monitor_module.os, "write", write)
        lines.append({"n": 2})
        lines.append({"n": 3})
        assert lines.write_errors == 2
    lines.append({"n": 4})
    lines.close()
    assert read_json_lines(tmp_path / "x.jsonl") == ([{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}], 0)


def test_lines_are_in_the_order_of_steps_whatever_was_done_again_and_no_more_than_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": step // 2, "text": "é" * (step % 7)}, ensure_ascii=False) + "\n"
            for step in range(2, 2002)
        ),
        encoding="utf-8",
    )
    size = path.stat().st_size
    assert [(line["step"], len(line["text"])) for line in last_json_lines(path, 3)] == [
        (999, 4),
        (1000, 5),
        (1000, 6),
    ]
    with path.open("ab") as file:
        file.write(b'{"step": 1001, "te')  # Killed.
    loads = json.loads
    read: list[int] = []
    monkeypatch.setattr(json_lines.json, "loads", lambda line: read.append(len(line)) or loads(line))
    lines = StepLines(path, Redactor({}), "step")
    for step in (1001, 999, 999):
        lines.rewind(step)
        lines.append({"step": step, "text": "again"})
    assert sum(read) < size / 50
    monkeypatch.undo()
    steps = [step // 2 for step in range(2, 1998)]
    assert [line["step"] for line in read_json_lines(path)[0]] == [*steps, 999]
    lines.rewind(0)
    assert path.stat().st_size == 0
    assert last_json_lines(path, 1) == last_json_lines(tmp_path / "none.jsonl", 1) == []


def test_steps_that_a_full_disk_kept_twice_stay_when_the_monitor_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4, 2, 3)))
    lines = StepLines(path, Redactor({}), "step")
    lines.rewind(4)
    lines.append({"step": 4})
    assert [line["step"] for line in read_json_lines(path)[0]] == [1, 2, 3, 4, 2, 3, 4]


@pytest.mark.slow
def test_a_real_offline_wandb_run_is_written_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("WANDB_API_KEY", CANARY_KEY)
    monkeypatch.setenv("HF_TOKEN", CANARY_TOKEN)
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.setattr("sys.argv", ["launch.py", "--password", CANARY_TOKEN])
    config = monitored(steps=3)
    monitor = Monitor(
        config.model_copy(update={"model": config.model.model_copy(update={"path": f"hub/{CANARY_TOKEN}"})}),
        str(run_dir),
        wandb="offline",
    )
    monitor.event(f"401 for token {CANARY_TOKEN}")
    for step in (1, 2, 3):
        monitor.log_step({"progress/step": step, "reward/mean": 0.5})
        monitor.log_samples(
            step,
            [{"version": 0, "prompt": f"p {CANARY_KEY}", "completion": "c", "reward": 1.0, "error": None}]
            * 20,
        )
    monitor.close({"name": "unit", "stopped": f"reward said {CANARY_TOKEN}"})

    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert log.stat().st_size > 500
    assert b"reward/mean" in log.read_bytes()
    tables = list(run_dir.glob("wandb/offline-run-*/files/media/table/*.json"))
    assert [len(json.loads(table.read_text())["data"]) for table in tables] == [16, 16, 16]
    assert [row["monitor/wandb_dropped"] for row in rows_of(run_dir)] == [0, 0, 0]
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        content = path.read_bytes()
        assert CANARY_KEY.encode() not in content, path
        assert CANARY_TOKEN.encode() not in content, path


@pytest.mark.slow
def test_online_that_fails_goes_on_offline_with_the_same_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY_KEY)
    real_init = wandb.init

    def init(**options: Any) -> Any:
        if options["mode"] == "online":
            raise ConnectionError("no route to host")
        return real_init(**options)

    monkeypatch.setattr(wandb, "init", init)
    monitor = Monitor(monitored(), str(tmp_path / "run"), wandb="online")
    monitor.log_step({"progress/step": 1})
    monitor.close({})
    run_id = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert list((tmp_path / "run").glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    events, _ = read_json_lines(tmp_path / "run" / "events.jsonl")
    assert "no route to host" in events[0]["text"]


class FakeRun:
    """A W&B run that fails as told: `fault` is (method, what it does)."""

    def __init__(self, fault: tuple[str, Any] | None = None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self._fault = fault

    def _maybe_fail(self, method: str) -> None:
        if self._fault is not None and self._fault[0] == method:
            self._fault[1]()

    def define_metric(self, *args: Any, **options: Any) -> None:
        pass

    def log(self, row: dict[str, Any], **options: Any) -> None:
        assert not options, "never W&B's own step"
        self._maybe_fail("log")
        self.logged.append(row)

    def finish(self) -> None:
        self._maybe_fail("finish")


@pytest.mark.parametrize("method", ["init", "log", "finish"])
@pytest.mark.parametrize("manner", ["raises", "hangs"])
def test_wandb_outage_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event, method: str, manner: str
) -> None:
    def fail() -> None:
        if manner == "raises":
            raise RuntimeError("wandb is down")
        release.wait(60)

    def init(**options: Any) -> FakeRun:
        if method == "init":
            fail()
        return FakeRun((method, fail))

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(monitor_module, "WANDB_FINISH_S", 0.5)
    began_s = machine_s()
    monitor = Monitor(monitored(steps=1500), str(tmp_path), wandb="offline")
    for step in range(1, 1501):  # more than the queue holds
        monitor.log_step({"progress/step": step})
    monitor.close({})
    elapsed_s = machine_s() - began_s

    assert [row["progress/step"] for row in rows_of(tmp_path)] == list(range(1, 1501))
    assert elapsed_s < 10
    events = " ".join(event["text"] for event in read_json_lines(tmp_path / "events.jsonl")[0])
    assert ("wandb is down" in events) == (manner == "raises")
    assert ("did not finish within" in events) == (manner == "hangs")
    if manner == "hangs" and method != "finish":
        assert rows_of(tmp_path)[-1]["monitor/wandb_dropped"] > 400
    if method == "log":
        assert monitor._wandb.dropped >= 1000


def test_wandb_gets_known_values_only_and_the_same_rows_as_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    monitor = Monitor(monitored(steps=2), str(tmp_path), wandb="offline")
    monitor.log_step({"progress/step": 1, "reward/mean": 0.25})
    monitor.log_step({"progress/step": 2, "reward/mean": 0.5})
    monitor.close({"final_solve_rate": 0.5, "errors": {}})
    assert run.logged == [
        {name: value for name, value in row.items() if value is not None} for row in rows_of(tmp_path)
    ]
    assert run.summary == {"final_solve_rate": 0.5}


def test_a_continued_run_goes_on_in_the_project_in_which_it_began(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_PROJECT", "first")
    assert project_of(tmp_path) == "first"
    writer = WandbWriter("name", "first", {}, tmp_path, "disabled")
    run_id = writer._run_id()
    monkeypatch.setenv("WANDB_PROJECT", "second")
    assert (writer._run_id(), project_of(tmp_path)) == (run_id, "first")


@pytest.mark.parametrize("name", ["my/project", "50%", "x" * 129])
def test_a_project_that_wandb_would_refuse_is_refused_at_the_start(monkeypatch, name):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert wandb_project() == "agro"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert wandb_project() == "mine"
    monkeypatch.setenv("WANDB_PROJECT", name)
    with pytest.raises(ConfigError, match="WANDB_PROJECT = "):
        wandb_project()


@pytest.mark.parametrize(
    ("word", "mode"),
    [("", "offline"), ("disabled", "disabled"), ("offline", "offline"), ("dryrun", "offline")],
)
def test_what_wandb_does_without_a_key_is_what_its_own_variable_says(monkeypatch, word, mode):
    monkeypatch.setenv("WANDB_MODE", word)
    assert wandb_mode() == mode


@pytest.mark.parametrize("word", ["off", "on", "Online", "auto"])
def test_another_word_than_those_of_wandb_is_refused_with_what_to_type(monkeypatch, word):
    monkeypatch.setenv("WANDB_MODE", word)
    with pytest.raises(
        ConfigError, match=f"WANDB_MODE = '{word}': expected online, offline or disabled; unset"
    ):
        wandb_mode()


def test_wandb_mode_is_decided_by_environment_and_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        wandb_mode()
    monkeypatch.delenv("WANDB_MODE")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example.org login user password " + CANARY_KEY)
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode() == "offline"


def test_words_that_only_sound_secret_are_left_alone() -> None:
    redact = Redactor(
        {"TOKENIZERS_PARALLELISM": "parallelism", "API_TOKEN": "true", "MY_API_KEY": 'quo"ted-secret'}
    )
    assert redact("parallelism true") == "parallelism true"
    assert redact(json.dumps({"x": 'a quo"ted-secret b'})) == '{"x": "a [redacted] b"}'
