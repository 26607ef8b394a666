"""What the supervisor concludes: which stage stalls, who does not answer, what a death was, and when a
buffer dies too often.
"""

from __future__ import annotations

import asyncio
import json
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
from buffer.client import connect_buffer
from buffer.store import DiskFullError, StoreError
from cluster.deaths import BOARD, SHARD, Deaths, read_deaths
from cluster.gang import LearnerGang, RankDied
from cluster.health import Health, Recent
from cluster.preparation.prepare import Inputs
from cluster.services import Services, ordinal
from cluster.session import logical_cpus
from cluster.watchdog import MIN_QUIET_S, RECENT_S, Observation, Watchdog, dump_stacks, stalled_stage
from core.calls import Calls, Client, Local, asks
from core.causes import Cause, memory_hint
from core.errors import DataError, PeerTimeout, RewardError, TrainingError
from core.process_log import ProcessLog
from core.processes import answer, explained
from core.records import WorkItem
from core.weights.board import Board, Directive
from tests.support.clients import events_to
from tests.support.configs import make_config
from tests.support.fleet_actors import SleepingActor, UnluckyRank
from tests.support.simulated import until

pytestmark = pytest.mark.timed

CONFIG = make_config({"run": {"timeout_s": 30.0}})


# --- The watchdog: which stage ---


def seen(
    time_s: float,
    *,
    step: int = 3,
    actors: dict[str, dict[str, Any]] | None = None,
    absent: tuple[str, ...] = (),
    waited: float = 0.0,
    evaluations: int = 0,
    full_disk: str = "",
    **stats: float,
) -> Observation:
    return Observation(
        time_s=time_s,
        step=step,
        actors={} if actors is None else actors,
        absent=absent,
        stats={"buffer/wait_batch_s": waited, **{f"buffer/{name}": value for name, value in stats.items()}},
        num_evaluations=evaluations,
        group_size=4,
        admitted_groups=24,
        full_disk=full_disk,
    )


def actor(**counters: float) -> dict[str, float]:
    return {
        "version": 6.0,
        "generated_samples": 80.0,
        "groups": 20.0,
        "busy_s": 50.0,
        "wait_admission_s": 5.0,
        **counters,
    }


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (seen(10, actors={"a": actor()}, waited=0.0, groups=40), "the learner is in its step"),
        (
            seen(10, waited=10, absent=("actor-0 loading for 40 s",)),
            "no actor is running; actor-0 loading for 40 s",
        ),
        (
            seen(10, actors={"a": actor(wait_weights_s=9.0)}, waited=10),
            "the actors wait for weights (versions 6)",
        ),
        (
            seen(10, actors={"a": actor(wait_disk_s=9.0)}, waited=10),
            "the buffer takes nothing: its disk is full",
        ),
        (
            seen(10, actors={"a": actor(busy_s=60.0)}, waited=10, full_disk="the disk of /run refuses"),
            "the disk of /run refuses",
        ),
        (seen(10, actors={"a": actor(busy_s=59.0)}, waited=10, evaluations=1), "evaluation: 1 of them open"),
        (seen(10, actors={"a": actor(generated_samples=88.0)}, waited=10), "rewards are pending: 2 groups"),
        (
            seen(10, actors={"a": actor(wait_admission_s=15.0)}, waited=10, leased=4, unconsumed=20),
            "admission is closed: 24 of 24 groups",
        ),
        (
            seen(10, actors={"a": actor(busy_s=60.0)}, waited=10, leased=16),
            "the actors generate, but no group is finished (16 leased)",
        ),
        (
            seen(10, actors={"a": actor(busy_s=60.0, groups=25.0, generated_samples=100.0)}, waited=10),
            "groups come, but slowly: 0.50 a second",
        ),
    ],
)
def test_the_stalled_stage_is_named(after: Observation, expected: str) -> None:
    assert expected in stalled_stage(seen(0, actors={"a": actor()}), after)


def feed(dog: Watchdog, times_s: Iterator[int] | range, step: int) -> list[tuple[int, str]]:
    told = [(time_s, dog.judge(seen(time_s, step=step, waited=float(time_s)))) for time_s in times_s]
    return [(time_s, text) for time_s, text in told if text]


def test_a_stall_is_told_once_after_sixty_seconds_and_again_after_a_step() -> None:
    dog = Watchdog(timeout_s=600)
    found = feed(dog, range(200), step=1)
    assert [time_s for time_s, _ in found] == [MIN_QUIET_S]
    assert "no optimizer step for 60 s after step 1: no actor is running" in found[0][1]
    # The step took 200 s; half of the timeout.
    assert [time_s for time_s, _ in feed(dog, range(200, 2500), step=2)] == [200 + 300]


def test_a_stall_is_ten_median_steps_at_most_half_of_the_timeout() -> None:
    dog = Watchdog(timeout_s=1000)
    for step in range(10):
        dog.judge(seen(step * 12, step=step))
    assert dog.quiet_s == 120
    assert Watchdog(timeout_s=60).quiet_s == 30
    assert RECENT_S < MIN_QUIET_S


# --- Stacks and causes, with real processes ---


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_stacks_of_all_are_written_and_who_does_not_answer_is_named(
    local_ray: None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cluster.watchdog.STACKS_TIMEOUT_S", 3.0)
    sleeping = ray.remote(SleepingActor).options(num_cpus=0, max_concurrency=2)
    handles = {name: sleeping.remote(name, str(tmp_path)) for name in ("actor-0", "actor-1")}
    calls = [handle.run.remote() for handle in handles.values()]
    pid = ray.get(handles["actor-1"].__ray_call__.remote(lambda _: os.getpid()))
    ray.get(handles["actor-0"].ping.remote())
    os.kill(pid, signal.SIGSTOP)
    path, silent = dump_stacks(handles, tmp_path)
    assert silent == ["actor-1"]
    assert path.name.startswith("stacks-")
    text = path.read_text()
    assert "===== actor-0\n" in text
    assert "in run\n" in text
    assert "===== actor-1\nno answer" in text
    for handle in handles.values():
        ray.kill(handle)
    del calls


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

    remote_part = ray.remote(Part).options(num_cpus=0)
    part = remote_part.remote()
    with pytest.raises(DataError, match="row 4 is empty"):
        answer(part.fail.remote(True), "the part", 20.0)
    with pytest.raises(
        TrainingError,
        match=r"the part failed: ValueError: broken\n  in fail "
        r"\(.*test_supervisor\.py:\d+\)$",
    ):
        answer(part.fail.remote(False), "the part", 20.0)
    pid = ray.get(part.pid.remote())
    call = part.sleep.remote()
    with pytest.raises(PeerTimeout, match=r"the part did not answer within 0 s \(run.timeout_s\)"):
        answer(call, "the part", 0.2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        TrainingError,
        match=r"the part died: its process was killed \(.*\) or crashed \(pid "
        rf"{pid}\)",
    ):
        answer(call, "the part", 20.0)
    with pytest.raises(DataError) as caught:
        answer(remote_part.remote("data").pid.remote(), "the part", 20.0)
    assert str(caught.value) == "row 3 is empty.\nRemove: row 3"
    with pytest.raises(TrainingError, match=r"the part could not start:\n(.*\n)*.*KeyError"):
        answer(remote_part.remote("other").pid.remote(), "the part", 20.0)


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
    calls = Calls(30.0, events_to(told))
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
        "If it is a lack of memory: lower actors.slots and actors.kv_cache_gib"
    )
    assert isinstance(explained(ray.exceptions.RayActorError(), "x"), TrainingError)


def test_what_ray_itself_raised_in_a_process_is_told_without_its_paragraph() -> None:
    full = ray.exceptions.ObjectStoreFullError("Failed to put object 00ff: it is full.")
    text = str(explained(ray.exceptions.RayTaskError("train", "a traceback", full), "learner ranks"))
    assert text == "learner ranks failed: ObjectStoreFullError: Failed to put object 00ff: it is full."


# --- The buffer as a service ---


def inputs(run_dir: Path, **sections: dict[str, Any]) -> Inputs:
    config = make_config({"run": {"timeout_s": 40.0}, "monitor": {"wandb": "off"}, **sections})
    rows = [
        PromptRow(source_row=number, text="1+1=", token_ids=(1, 2), columns={"answer": "2"})
        for number in range(4)
    ]
    prompts = PromptSet(rows=rows, num_bad_rows=0, source="test")
    return Inputs(
        config=config, prompts=prompts, eval_prompts=prompts, pad_id=0, run_dir=run_dir, wandb_mode="off"
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
    monkeypatch.setattr("cluster.gang.DEATH_LOOK_S", 3.0)
    gang = LearnerGang(
        make_config({"run": {"name": name}, "learner": {"ranks": ranks, "num_cpus": 0.5}}),
        0,
        (),
        lambda name: ProcessLog(str(tmp_path), name),
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
        deadline_s = time.monotonic() + 20
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
        services.calls.ask(services.board.restore([], services._retiring))
        assert (
            msgspec.msgpack.decode(
                services.calls.ask(services.board.poll("actor-3", 0, 0, 0.0)), type=Directive
            ).retire
            == "now"
        )
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


# --- Health, with services that only note ---


class Notes:
    """In place of Services."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.buffer, self.calls = connect_buffer([Local(self)]), Calls(5.0)

    def event(self, text: str) -> None:
        self.told.append(text)

    def error_summary(self) -> tuple[int, int, list[str]]:
        return 30, 64, ["ValueError: raises", "ValueError: raises"]


class Roles:
    """In place of the fleet: who runs, and how many died."""

    def __init__(self, running: list[str], num_deaths: int = 0) -> None:
        self.running, self.num_deaths = running, num_deaths

    def names(self, *states: str) -> list[str]:
        return self.running

    rollout_names = names


def health() -> tuple[Health, Notes]:
    notes = Notes()
    return Health(CONFIG, notes, Path()), notes  # type: ignore[arg-type]


def test_a_buffer_that_dies_five_times_stops_the_run_with_its_last_words(tmp_path: Path) -> None:
    deaths = Deaths(tmp_path)
    cause = Cause("exit code", "its process ended with exit code 1", 1, ("disk I/O error",))
    for number in range(1, SHARD.max_deaths):
        deaths.note(SHARD, f"buffer-{number % 2}", cause)  # All shards count together.
    with pytest.raises(TrainingError, match=r"(?s)replay buffer died 5 times within 5 min; .*disk I/O error"):
        deaths.note(SHARD, "buffer-0", cause)
    assert len(read_deaths(tmp_path)) == deaths.total(SHARD) == SHARD.max_deaths
    assert read_deaths(tmp_path)[-1].done.startswith("the run ends: ")
    assert [ordinal(number) for number in (3, 4, 11, 22)] == ["3rd", "4th", "11th", "22nd"]


def test_a_learner_left_alone_is_told_of_once_and_again_when_it_goes_on() -> None:
    judge, notes = health()
    history = [
        (10.0, 4, Roles([])),  # Still loading: nobody died.
        (11.0, 4, Roles(["actor-0"], 0)),
        (12.0, 5, Roles([], 1)),
        (13.0, 5, Roles([], 1)),
        (14.0, 5, Roles(["actor-0.1"], 1)),
        (14.0, 6, Roles(["actor-0.1"], 1)),
        (14.0, 7, Roles([], 2)),  # It has batches left.
    ]
    for waited_s, step, fleet in history:
        judge._notice_lonely_learner({"buffer/wait_batch_s": waited_s}, step, fleet)  # type: ignore[arg-type]
    assert notes.told == [
        "all actors are dead; the learner waits at step 5 and goes on by itself when one is back",
        "the learner goes on: step 6",
    ]


def judge_until_it_raises(judge: Health, stats: dict[str, float]) -> None:
    """The texts of the errors are asked for, and nobody waits for them."""
    deadline_s = time.monotonic() + 5.0
    while time.monotonic() < deadline_s:
        judge._judge_rewards(stats)
        time.sleep(0.01)


def test_rewards_that_fail_too_often_stop_the_run_with_their_texts_once_each() -> None:
    judge, _ = health()
    # Before this start: the reward is mended.
    judge._judge_rewards({"buffer/samples_error": 500.0, "buffer/samples_total": 500.0})
    judge._judge_rewards({"buffer/samples_error": 530.0, "buffer/samples_total": 560.0})  # Too few to tell.
    with pytest.raises(RewardError) as caught:
        judge_until_it_raises(judge, {"buffer/samples_error": 530.0, "buffer/samples_total": 564.0})
    assert str(caught.value).count("ValueError: raises") == 1
    assert "30 of the last 64 samples got no reward" in str(caught.value)


def test_rewards_that_break_late_in_a_long_run_stop_it_as_soon_as_early_ones() -> None:
    now_s = 0.0
    judge = Health(CONFIG, Notes(), Path(), clock=lambda: now_s)  # type: ignore[arg-type]
    for minute in range(600):
        now_s = 60.0 * minute
        judge._judge_rewards({"buffer/samples_error": 0.0, "buffer/samples_total": 1000.0 * minute})
    now_s += 60.0
    judge._judge_rewards({"buffer/samples_error": 1000.0, "buffer/samples_total": 600_000.0})
    now_s += 60.0
    with pytest.raises(RewardError, match="2000 of the last 5000 samples"):
        judge_until_it_raises(judge, {"buffer/samples_error": 2000.0, "buffer/samples_total": 601_000.0})


def test_slow_rewards_are_judged_over_as_many_samples_as_it_takes() -> None:
    recent = Recent()
    assert [recent.since_then(1000.0 * look, 0.0, 8.0 * look) for look in range(20)][-1] == (0.0, 64.0)


@pytest.mark.parametrize(
    ("actors", "expected"), [({"count": 2}, 9), ({"count": 12}, 13), ({"count": [2, 20]}, 21)]
)
def test_a_local_ray_has_room_for_scaling(actors: dict[str, Any], expected: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert logical_cpus(make_config({"actors": actors})) == expected


# --- The board's word to those who retire ---


def test_a_drain_is_told_once_then_at_every_timeout_and_now_hurries_it() -> None:
    async def scenario() -> None:
        board = Board(CONFIG, 0, lambda result, samples: None)
        await board.publish(b"m", [], 3, evaluate=False)

        async def poll(timeout_s: float = 0.0) -> Directive:
            return msgspec.msgpack.decode(await board.poll("actor-1", 1, 4, timeout_s), type=Directive)

        assert (await poll()).retire == ""
        waiting = asyncio.create_task(poll(5.0))
        await board.retire(["actor-1"], "drain")
        assert (await asyncio.wait_for(waiting, 2)).retire == "drain"
        start_s = time.monotonic()
        again = await poll(0.2)
        assert (again.retire, again.version) == ("drain", 1)  # No newer weights for one that goes.
        assert time.monotonic() - start_s >= 0.2  # An actor that drains does not spin.
        await board.retire(["actor-1"], "now")
        assert (await asyncio.wait_for(poll(5.0), 2)).retire == "now"
        await board.retire(["actor-1"], "drain")
        assert (await poll()).retire == "now"

    asyncio.run(scenario())
