"""What the supervisor concludes: which stage stalls, who does not answer, what a death was, and when a
buffer dies too often.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray

from actors.prompts import PromptRow, PromptSet
from buffer.store import DiskFullError, StoreError
from cluster.deaths import BOARD, Deaths, read_deaths
from cluster.fleet import ActorClient
from cluster.gang import LearnerGang, RankDied
from cluster.preparation.prepare import Inputs
from cluster.services import Services
from cluster.session import logical_cpus, without_onlookers
from cluster.watchdog import dump_stacks
from core.calls import Calls, Client, asks
from core.causes import Cause, memory_hint
from core.errors import DataError, PeerTimeout, TrainingError
from core.process_log import ProcessLog
from core.processes import explained, remote
from core.records import WorkItem
from core.weights.board import Directive
from tests.support.clients import events_to
from tests.support.clocks.waits import until
from tests.support.configs import make_config
from tests.support.fleet_actors import SleepingActor, UnluckyRank

pytestmark = pytest.mark.timed

CONFIG = make_config({"run": {"timeout_s": 30.0}})


# --- Stacks and causes, with real processes ---


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with without_onlookers():
        ray.init(
            address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_stacks_of_all_are_written_and_who_does_not_answer_is_named(
    local_ray: None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cluster.watchdog.STACKS_TIMEOUT_S", 8.0)
    sleeping = ray.remote(SleepingActor).options(num_cpus=0, max_concurrency=2)
    calls, names = Calls(60.0), ("actor-0", "actor-1")
    clients = {name: ActorClient(sleeping.remote(name, str(tmp_path)), name) for name in names}
    runs = [calls.start(client.run()) for client in clients.values()]
    pid = calls.ask(clients["actor-1"].inside(lambda _: os.getpid()))
    calls.ask(clients["actor-0"].ping())
    os.kill(pid, signal.SIGSTOP)
    path, silent = dump_stacks(calls, clients, tmp_path)
    assert silent == ["actor-1"]
    assert path.name.startswith("stacks-")
    text = path.read_text()
    assert "===== actor-0\n" in text
    assert "in run\n" in text
    assert "===== actor-1\nno answer" in text
    for client, run in zip(clients.values(), runs, strict=True):
        run.give_up()
        ray.kill(client.handle)


@pytest.mark.slow
def test_a_failure_is_told_in_a_few_lines_with_its_cause(local_ray: None, tmp_path: Path) -> None:
    class Part:
        def __init__(self, kind: str = "") -> None:
            if kind == "data":
                raise DataError("row 3 is empty.\nRemove: row 3")
            if kind == "other":
                raise KeyError("x")

        def fail(self, ours: bool) -> None:
            raise DataError("row 4 is empty") if ours else ValueError("broken")

        def pid(self) -> int:
            return os.getpid()

        def sleep(self) -> None:
            time.sleep(60)

    class PartClient(Client):
        fail, pid, sleep = asks(Part.fail), asks(Part.pid), asks(Part.sleep)

    remote_part, calls = ray.remote(Part).options(num_cpus=0), Calls(60.0)
    part = PartClient(remote_part.remote(), "the part")
    with pytest.raises(DataError, match="row 4 is empty"):
        calls.ask(part.fail(True))
    with pytest.raises(
        TrainingError,
        match=r"the part failed: ValueError: broken\n  in fail "
        r"\(.*test_supervisor\.py:\d+\)$",
    ):
        calls.ask(part.fail(False))
    pid = calls.ask(part.pid())
    call = calls.start(part.sleep())
    with pytest.raises(PeerTimeout, match=r"the part did not answer within 0 s \(run.timeout_s\)"):
        calls.ask(part.sleep(), 0.2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        TrainingError,
        match=r"the part died: its process was killed \(.*\) or crashed \(pid "
        rf"{pid}\)",
    ):
        call.wait()
    with pytest.raises(DataError) as caught:
        calls.ask(PartClient(remote_part.remote("data"), "the part").pid())
    assert str(caught.value) == "row 3 is empty.\nRemove: row 3"
    with pytest.raises(TrainingError, match=r"the part could not start:\n(.*\n)*.*KeyError"):
        calls.ask(PartClient(remote_part.remote("other"), "the part").pid())


NO_SPACE = "buffer database /run/buffer.sqlite: database or disk is full. Free space on that disk."


class Refusing:
    async def insert(self) -> None:
        raise DiskFullError(NO_SPACE)

    async def stumble(self) -> None:
        raise KeyError("x")


class RefusingClient(Client):
    insert = asks(Refusing.insert)
    stumble = asks(Refusing.stumble)


@pytest.mark.slow
def test_an_error_that_crosses_ray_keeps_its_own_sentence(local_ray: None) -> None:
    told: list[str] = []
    calls = Calls(60.0, events_to(told))
    part = RefusingClient(ray.remote(Refusing).options(num_cpus=0).remote(), "the part")
    with pytest.raises(DiskFullError) as caught:
        calls.ask(part.insert())
    assert str(caught.value) == NO_SPACE
    with pytest.raises(
        TrainingError,
        match=r"^the part failed: KeyError: 'x'\n  in stumble "
        r"\(.*test_supervisor.py:\d+\)$",
    ):
        calls.ask(part.stumble())
    for _ in range(3):
        calls.post(part.insert(), "groups")
    until(lambda: calls.num_failed_posts == 3 and told)
    assert told == [f"the part did not take groups: {NO_SPACE}"]


def test_a_lack_of_memory_is_hinted_at_with_the_knobs_to_lower() -> None:
    assert memory_hint("Task was killed due to the node running low on memory.").startswith(
        "This looks like a lack of memory: lower"
    )
    assert memory_hint("ValueError: broken").startswith(
        "If it is a lack of memory: lower actors.slots and actors.engine_memory"
    )
    assert isinstance(explained(ray.exceptions.RayActorError(), "x"), TrainingError)


def test_what_ray_itself_raised_in_a_process_is_told_without_its_paragraph() -> None:
    full = ray.exceptions.ObjectStoreFullError("Failed to put object 00ff: it is full.")
    text = str(explained(ray.exceptions.RayTaskError("train", "a traceback", full), "learner ranks"))
    assert text == "learner ranks failed: ObjectStoreFullError: Failed to put object 00ff: it is full."


# --- The buffer as a service ---


def inputs(run_dir: Path, **sections: dict[str, Any]) -> Inputs:
    config = make_config({"run": {"timeout_s": 60.0}, **sections})
    rows = [
        PromptRow(source_row=number, text="1+1=", token_ids=(1, 2), columns={"answer": "2"})
        for number in range(4)
    ]
    prompts = PromptSet(rows=rows, num_bad_rows=0, source="test")
    return Inputs(
        config=config,
        prompts=prompts,
        eval_prompts={"held_out": prompts},
        pad_id=0,
        run_dir=run_dir,
        wandb_mode="disabled",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "cause"),
    [
        ("dies-loading", 1, "learner rank 0 died"),
        ("dies-loading", 2, "learner rank 1 died"),
        ("hangs", 2, "learner rank 1 does not answer"),
    ],
)
def test_a_rank_that_dies_while_it_loads_or_hangs_is_named_and_can_be_started_again(
    local_ray: None, monkeypatch: Any, tmp_path: Path, name: str, ranks: int, cause: str
) -> None:
    monkeypatch.setattr("cluster.gang.LearnerRank", UnluckyRank)
    monkeypatch.setattr("cluster.gang.DEATH_LOOK_S", 8.0)
    gang = LearnerGang(
        make_config({"run": {"name": name}, "learner": {"ranks": ranks, "num_cpus": 0.5}}),
        0,
        (),
        lambda name: ProcessLog(str(tmp_path), name),
        Calls(60.0),
    )
    (tmp_path / "logs").mkdir()

    def look_on() -> None:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            gang.poll()
            gang.tick(time.monotonic())
            time.sleep(0.1)

    try:
        with pytest.raises(RankDied, match=cause):
            look_on()
    finally:
        gang.kill()


def poll_until_known(services: Services, name: str) -> int:
    """The process id of a service, once it has said it."""
    (life,) = [life for life in services._lives if life.name == name]
    deadline_s = time.monotonic() + 60
    while life.known is None:
        assert services.poll() == []
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    return life.known.pid


def poll_until_restarted(services: Services) -> list[str]:
    """The services that were started again, as soon as there is one."""
    deadline_s = time.monotonic() + 60
    while not (found := services.poll()):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_killed_shards_come_back_with_what_they_held_and_the_restart_is_an_event(
    local_ray: None, tmp_path: Path
) -> None:
    services = Services(inputs(tmp_path, buffer={"num_shards": 2}), Deaths(tmp_path))
    told: list[str] = []
    services.event = told.append  # type: ignore[method-assign]
    try:
        leased = services.calls.ask(services.buffer.lease("actor-0", 3, 5.0))
        held = [msgspec.msgpack.decode(item, type=WorkItem).ordinal for item in leased]
        assert len(held) == 3
        victim = f"buffer-{held[0] % 2}"
        pid = poll_until_known(services, victim)
        os.kill(pid, signal.SIGKILL)
        stats = services.calls.ask(services.buffer.stats())  # The call waits for the new process.
        assert stats["buffer/leased"] == 3
        assert poll_until_restarted(services) == [victim]
        assert [text.splitlines()[0].partition(":")[0] for text in told] == [
            "replay buffer restarted (1st time), 0 groups recovered"
        ]
        (death,) = read_deaths(tmp_path)
        assert (death.kind, death.name, death.pid, death.what, death.code) == (
            "buffer shard",
            victim,
            pid,
            "signal",
            signal.SIGKILL,
        )
        services.release("actor-0")
        deadline_s = time.monotonic() + 60
        while services._owed and time.monotonic() < deadline_s:
            services.poll()
            time.sleep(0.1)
        assert not services._owed
        again = services.calls.ask(services.buffer.lease("actor-1", 200, 5.0))
        assert set(leased) < set(again)
    finally:
        services.kill()


@pytest.mark.slow
def test_a_killed_monitor_and_a_killed_board_come_back_are_told_of_and_the_board_knows_who_ends(
    local_ray: None, tmp_path: Path
) -> None:
    deaths = Deaths(tmp_path)
    services = Services(inputs(tmp_path), deaths)

    def killed(who: str) -> None:
        services.calls.ask(services.monitor.view())  # An event under way would be told twice.
        os.kill(poll_until_known(services, who), signal.SIGKILL)
        assert poll_until_restarted(services) == [who]

    try:
        services.calls.ask(services.monitor.log_step({"progress/step": 5}))
        services.retire(["actor-3"], "now")
        killed("board")
        services.calls.ask(services.board.restore([], dict(services._retiring)))
        payload, _ = services.calls.ask(services.board.poll("actor-3", 0, 0, 0.0))
        assert msgspec.msgpack.decode(payload, type=Directive).retire == "now"
        killed("monitor")
        view = services.calls.ask(services.monitor.view())
        assert view["row"]["progress/step"] == 5
        told = [json.loads(line)["text"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        assert [text.partition(":")[0] for text in told] == [
            "board restarted (1st time)",
            "monitor restarted (1st time)",
        ]
        for _ in range(BOARD.max_deaths - 2):
            deaths.note(BOARD, "board", Cause("signal", "killed", 9))
        with pytest.raises(TrainingError, match="board died 5 times within 5 min"):
            deaths.note(BOARD, "board", Cause("signal", "killed", 9))
        assert [death.name for death in read_deaths(tmp_path)] == ["board", "monitor", *["board"] * 4]
    finally:
        services.kill()


@pytest.mark.slow
def test_a_buffer_that_cannot_be_opened_stops_the_run_with_its_own_error(
    local_ray: None, tmp_path: Path
) -> None:
    (tmp_path / "buffer.sqlite").write_bytes(b"this is no database" * 100)
    services = Services(inputs(tmp_path), Deaths(tmp_path))
    try:
        with pytest.raises(StoreError, match=r"buffer\.sqlite"):
            services.calls.ask(services.buffer.stats())
    finally:
        services.kill()


class Talkative:
    """An actor's place is enough for it: it warns, and writes."""

    def speak(self, count: int) -> None:
        for _ in range(count):
            logging.getLogger("actors.part").warning("%d of 3 things is missing", 1)
            logging.getLogger("theirs").warning("not ours")
        print("said aloud")
        os.system("echo a child says")


@pytest.mark.slow
def test_what_any_process_warns_of_is_an_event_once_and_what_it_writes_is_in_its_log(
    local_ray: None, tmp_path: Path
) -> None:
    services = Services(inputs(tmp_path), Deaths(tmp_path))
    try:
        part = remote(Talkative, services.log_of("actor-7.2")).options(num_cpus=0).remote()
        ray.get([part.speak.remote(3), part.speak.remote(2)])
        services.calls.ask(
            services.monitor.inside(lambda _: logging.getLogger("cluster.monitor").error("of its own"))
        )

        def told() -> list[str]:
            return [event["text"] for event in services.calls.ask(services.monitor.view())["events"]]

        def num_warnings() -> int:
            return services.calls.ask(services.monitor.inside(lambda monitor: monitor._num_warnings))

        until(lambda: num_warnings() == 6, 60.0)  # A part sends what it has each second, in two parts or one.
        assert sorted(told()) == ["actor-7.2: 1 of 3 things is missing", "monitor: of its own"]
        log = (tmp_path / "logs" / "actor-7.log").read_text()
        assert log.startswith("===== actor-7.2: process ")
        assert (
            log.count("WARNING actors.part: 1 of 3 things is missing") == log.count("theirs: not ours") == 5
        )
        assert log.count("said aloud") == log.count("a child says") == 2
        services.calls.ask(services.monitor.log_step({"progress/step": 1}))
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["monitor/warnings"] == 6
    finally:
        services.kill()


@pytest.mark.parametrize(
    ("actors", "expected"), [({"count": 2}, 9), ({"count": 12}, 13), ({"count": [2, 20]}, 21)]
)
def test_a_local_ray_has_room_for_scaling(actors: dict[str, Any], expected: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    config = make_config({"actors": actors})
    assert logical_cpus(config.actors, config.learner) == expected
