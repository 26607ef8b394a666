"""Health, with services that only note."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from buffer.client import connect_buffer
from cluster.deaths import SHARD, Deaths, read_deaths
from cluster.health import Health, Recent
from cluster.services import ordinal
from core.calls import Calls, Local
from core.causes import Cause
from core.errors import RewardError, TrainingError
from tests.support.configs import make_config

pytestmark = pytest.mark.timed

CONFIG = make_config({"run": {"timeout_s": 30.0}})


class Notes:
    """In place of Services."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.texts = {"ValueError: raises": 30}
        self.buffer, self.calls = connect_buffer([Local(self)]), Calls(5.0)

    def event(self, text: str) -> None:
        self.told.append(text)

    def error_summary(self) -> tuple[int, int, dict[str, int]]:
        return 30, 64, self.texts


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
    deadline_s = time.monotonic() + 60
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


def test_each_kind_of_failure_is_told_once_and_of_many_the_first_ten() -> None:
    judge, notes = health()

    def judge_until_told(num_errors: float) -> None:
        judge._judge_rewards({"buffer/samples_error": num_errors, "buffer/samples_total": 10_000.0})
        deadline_s = time.monotonic() + 60
        while judge.failures.is_asked and time.monotonic() < deadline_s:
            judge.failures.poll()
            time.sleep(0.01)

    judge_until_told(0.0)
    assert notes.told == []
    notes.texts = {"f raised ValueError: no number in 'a' after 12": 1}
    judge_until_told(1.0)
    notes.texts = {"f raised ValueError: no number in 'b' after 3": 7}
    judge_until_told(7.0)
    assert notes.told == ["1 sample got no reward: f raised ValueError: no number in 'a' after 12"]
    notes.texts = {f"f raised {letter * 3}": 2 for letter in "abcdefghijklmnop"}
    judge_until_told(40.0)
    assert notes.told[1] == "2 samples got no reward: f raised aaa"
    assert len(notes.told) == 11
    assert "more than 10 reasons" in notes.told[-1]
    assert judge.failures.texts == notes.texts


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
