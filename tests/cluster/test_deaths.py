"""The table of deaths, which the docs show, and the record of each, which outlives the driver."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cluster.deaths import ACTOR, KINDS, RANK, SHARD, Deaths, as_markdown, read_deaths
from core.causes import Cause, cause_from
from core.errors import TrainingError
from core.processes import Whereabouts
from tests.support import ROOT

KILLED = Cause("signal", "its process was killed", 9)


def test_the_docs_show_the_table_as_the_code_has_it() -> None:
    text = (ROOT / "docs" / "deaths.md").read_text(encoding="utf-8")
    assert as_markdown() in text, "put cluster.deaths.as_markdown() there"
    assert [kind.name for kind in KINDS] == [
        "rollout actor",
        "learner rank",
        "buffer shard",
        "board",
        "monitor",
        "reward model",
    ]


def test_a_death_is_written_down_with_the_words_of_its_process_and_survives_a_torn_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "actor-0.log"
    log.write_text(
        "===== actor-0: process 5 on here since 2026\nthe first\n"
        "===== actor-0.1: process 6 on there since 2026\nthe second\nits end\n"
    )
    deaths = Deaths(tmp_path)
    deaths.step = 40
    where = Whereabouts("node", 6, "there")
    deaths.note(ACTOR, "actor-0.1", KILLED, where=where, held="4 leases", done="actor-0.2 took its place")
    with (tmp_path / "deaths.jsonl").open("ab") as file:
        file.write(b'{"kind": "torn')
    again = Deaths(tmp_path)  # Of the next start.
    again.note(SHARD, "buffer-1", Cause("unknown", "nobody knows", None, ("its own words",)))
    again.note_end("the run's error")
    first, second, end = read_deaths(tmp_path)
    assert (first.step, first.kind, first.name, first.pid, first.host) == (
        40,
        ACTOR.name,
        "actor-0.1",
        6,
        "there",
    )
    assert (first.what, first.code, first.last_words) == ("signal", 9, ("the second", "its end"))
    assert (first.held, first.done, first.log) == ("4 leases", "actor-0.2 took its place", "logs/actor-0.log")
    assert first.noticed == ACTOR.noticed
    assert (second.last_words, second.held, second.done) == (("its own words",), SHARD.held, SHARD.done)
    assert second.log == ""
    assert (end.kind, end.cause) == ("run", "the run's error")


def test_deaths_that_do_not_count_never_end_the_run_and_each_kind_is_counted_as_it_says(
    tmp_path: Path,
) -> None:
    now_s = 0.0
    deaths = Deaths(tmp_path, clock=lambda: now_s)
    for _ in range(9):
        deaths.note(ACTOR, "actor-0", KILLED, counts=False)
    assert deaths.total(ACTOR) == 0
    for number in range(9):
        deaths.note(ACTOR, f"actor-{number}", KILLED)  # One of each role.
    assert deaths.total(ACTOR) == 9
    for number in range(4):
        deaths.note(ACTOR, f"actor-0.{number}", KILLED) if number < 3 else None
    with pytest.raises(TrainingError, match=r"actor-0 died 5 times within 5 min.*\n.*lower actors\.slots"):
        deaths.note(ACTOR, "actor-0.4", KILLED)
    for number in range(4):
        deaths.note(RANK, f"learner-rank-{number}", KILLED)
    now_s = RANK.window_s - 1
    with pytest.raises(TrainingError, match="learner ranks died 5 times within 30 min"):
        deaths.note(RANK, "learner-rank-0", KILLED)


def test_only_the_kernel_of_its_own_machine_explains_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = Deaths(tmp_path)
    monkeypatch.setattr(deaths._kernel, "_count", lambda: 1 + deaths._kernel._seen)
    killed = cause_from("", "", 7)
    assert deaths.note(ACTOR, "actor-0", killed, where=Whereabouts("n", 7, "elsewhere")).what == "signal"
    here = Whereabouts("n", 7, socket.gethostname())
    assert deaths.note(ACTOR, "actor-0", killed, where=here).what == "out of memory"


def test_secrets_are_not_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-secret-value")
    deaths = Deaths(tmp_path)
    deaths.note(ACTOR, "actor-0", Cause("exception", "no access with a-secret-value"))
    assert "a-secret-value" not in (tmp_path / "deaths.jsonl").read_text()
    assert json.loads((tmp_path / "deaths.jsonl").read_text())["cause"] == "no access with [redacted]"
