"""The learner's restarts: by deaths that are planted, and by real kills of real ranks in a real run."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from buffer.ledger import audit_run
from cluster import learner as learner_module
from cluster.deaths import Deaths
from cluster.gang import DeadRank, RankDied
from cluster.learner import Learner
from core.calls import Calls
from core.causes import Cause
from core.errors import TrainingError
from core.process_log import ProcessLog
from learner.catalogue import load_config
from tests.support import ROOT
from tests.support.runs import processes_of, rows_of, running, start_train, wait_for_end, wait_for_step


class Gang:
    """Dies at every look it is told to."""

    deaths: ClassVar[list[Exception | None]] = []
    becomes: ClassVar[list[str]] = []
    made: ClassVar[list[Any]] = []

    def __init__(self, config: Any, pad_id: int, arguments: Any, log_of: Any, calls: Any, place: Any) -> None:
        self.place = place or object()
        self.state, self.totals, self.killed, self.dead = "training", [], False, []
        Gang.made.append(self)
        self.arguments = arguments

    def poll(self) -> None:
        if Gang.becomes:
            self.state = Gang.becomes.pop()
        if Gang.deaths and (error := Gang.deaths.pop(0)) is not None:
            self.dead = [DeadRank(1, Cause("signal", str(error), 9), None)]
            raise error

    def tick(self, now_s: float) -> None:
        pass

    def kill(self, *, keeps_place: bool = False) -> None:
        self.killed = True

    def request_stop(self, *, is_target_reached: bool = False) -> None:
        self.state = "stopping at its target" if is_target_reached else "stopping"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(learner_module, "LearnerGang", Gang)
    Gang.deaths, Gang.made = [], []
    told: list[str] = []
    forgotten: list[bool] = []
    clock = [0.0]

    def forget() -> Any:
        forgotten.append(True)
        return SimpleNamespace(is_done=lambda: True, result=list)

    def make(*changes: str) -> Learner:
        config = load_config(ROOT / "configs" / "quickstart.yaml", list(changes))
        return Learner(
            config,
            0,
            ("buffers", "board", "monitor"),
            tmp_path,
            log_of=lambda name: ProcessLog(str(tmp_path), name),
            tell=told.append,
            forget_snapshots=forget,
            deaths=Deaths(tmp_path, clock=lambda: clock[0]),
            calls=Calls(60.0),
        )

    make.told, make.forgotten, make.clock = told, forgotten, clock  # type: ignore[attr-defined]
    return make


def look(learner: Learner) -> None:
    """One poll of the gang that there is, and another gang where it died."""
    wait_for_gang(learner)
    learner.poll()
    wait_for_gang(learner)


def wait_for_gang(learner: Learner) -> None:
    deadline_s = time.monotonic() + 60
    while learner.state == "verifying a checkpoint":
        learner.poll()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_dead_rank_starts_the_whole_gang_again(planted: Any) -> None:
    learner = planted()
    Gang.deaths = [None, RankDied("learner rank 1 died: killed")]
    look(learner)
    assert len(Gang.made) == 1
    look(learner)
    assert [gang.killed for gang in Gang.made] == [True, False]
    assert planted.forgotten == [True]
    assert planted.told == ["learner rank 1 died: killed; starting the learner again"]
    assert Gang.made[1].arguments[:4] == ("buffers", "board", "monitor", Gang.made[0].arguments[3])
    assert Gang.made[1].place is Gang.made[0].place, "nobody takes it meanwhile"
    assert learner.num_deaths == 1


def test_a_learner_whose_target_is_reached_ends_there_also_when_it_starts_again(planted: Any) -> None:
    learner = planted()
    learner.end_at_target()  # No gang yet.
    look(learner)
    assert [gang.state for gang in Gang.made] == ["training"]
    Gang.made[0].state = "loading"
    Gang.becomes = ["training"]
    learner.poll()
    assert Gang.made[0].state == "stopping at its target"
    Gang.deaths = [RankDied("killed")]
    look(learner)
    Gang.made[1].state, Gang.becomes = "loading", ["training"]
    learner.poll()
    assert Gang.made[1].state == "stopping at its target"


def test_five_deaths_within_half_an_hour_end_the_run_with_the_cause_and_five_in_two_hours_do_not(
    planted: Any,
) -> None:
    learner = planted()
    for number in range(8):
        planted.clock[0] = number * 1000.0
        Gang.deaths = [RankDied("killed")]
        look(learner)
    for _ in range(2):
        Gang.deaths = [RankDied("killed")]
        look(learner)
    Gang.deaths = [RankDied("learner rank 0 died: out of memory")]
    with pytest.raises(
        TrainingError,
        match="died 5 times within 30 min; the last time: learner rank 0 died: out of memory",
    ):
        look(learner)


@pytest.mark.parametrize("error", [TrainingError("the gradient norm is nan"), RuntimeError("a bug")])
def test_what_another_start_would_not_mend_ends_the_run(planted: Any, error: Exception) -> None:
    learner = planted()
    Gang.deaths = [error]
    with pytest.raises(type(error), match=str(error)):
        look(learner)
    assert len(Gang.made) == 1


def test_without_checkpoints_a_dead_rank_ends_the_run(planted: Any) -> None:
    learner = planted("checkpoint.every=0")
    Gang.deaths = [RankDied("learner rank 0 died: killed")]
    with pytest.raises(TrainingError, match="learner rank 0 died: killed"):
        look(learner)


@pytest.mark.slow
def test_killed_ranks_and_a_killed_driver_cost_no_step_no_prompt_and_no_group(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Two ranks; one is killed, then the driver's whole process group; the run is submitted again and
    ends at its step count.
    """
    run_dir, steps = tmp_path / "run", 26
    more = (
        "learner.ranks=2",
        "learner.num_cpus=0.5",
        "checkpoint.every=4",
        "buffer.uses_per_group=2",
        "run.timeout_s=120",
    )
    process = start_train(tiny_models["tied"], run_dir, steps, *more)
    wait_for_step(process, run_dir, 6)
    ranks = running(process.pid, "LearnerRank")
    assert len(ranks) == 2
    killed = ranks[1]  # Not always of rank 1: Ray starts them in an order of its own.
    killed.kill()
    deadline_s = time.monotonic() + 280
    while max((row["progress/step"] for row in rows_of(run_dir)), default=0) < 12:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    events = [event["text"] for event in rows_of(run_dir, "events")]
    deaths = [text for text in events if re.match(r"learner rank [01] died: its process was killed", text)]
    assert len(deaths) == 1, events
    assert f"(pid {killed.pid})" in deaths[0]
    assert "starting the learner again" in deaths[0]
    assert any("going on from step-" in text for text in events)
    family = processes_of([process.pid])
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert wait_for_end(family) == []

    again = start_train(tiny_models["tied"], run_dir, steps, *more)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, out + err
    rows = rows_of(run_dir)
    assert {row["progress/step"] for row in rows} == set(range(1, steps + 1)), "every step was done"
    assert rows[-1]["progress/step"] == steps
    found = audit_run(run_dir)
    assert found["violations"] == []
    ledger = [
        json.loads(line) for path in run_dir.glob("ledger*.jsonl") for line in path.read_text().splitlines()
    ]
    leased = {line["group_id"] for line in ledger if line["event"] == "leased"}
    assert leased == set(range(len(leased))), "no prompt was skipped"
    trained = [(line["step"], line["group_id"]) for line in ledger if line["event"] == "trained"]
    assert len(trained) == len(set(trained)) == 8 * steps, (
        "every batch was taken once, however often its step was done"
    )
    (wandb_id,) = {path.name.rsplit("-", 1)[1] for path in run_dir.glob("wandb/offline-run-*")}
    assert wandb_id == (run_dir / "wandb_id").read_text().strip()
    assert any("continuing the run" in event["text"] for event in rows_of(run_dir, "events"))
