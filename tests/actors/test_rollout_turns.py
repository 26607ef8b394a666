"""The actor's real loop with episodes of several turns, whose environments answer when a test wants."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import actors.groups
from benchmarks.fake_engine import EOS
from core.records import Group, Sample
from environments import EnvironmentFailure, Turn
from tests.support.clocks.simulated import TurnedClock, set_clock
from tests.support.clocks.waits import until
from tests.support.configs import actor_config
from tests.support.in_process import Bench
from tests.support.playing import Asked, Behaviour, turns
from tests.support.simulated import STEP_S, SimulatedActor, benches, ledger, played_rows, rows

pytestmark = pytest.mark.timed


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with benches(tmp_path) as make:
        yield make


def playing_config(**actors: Any) -> Any:
    functions = {"functions": {"environment": 1.0}}
    return actor_config(environments="tests.support.playing:Game", actors=actors, rewards=functions)


def started(
    make: Callable[..., Bench],
    behave: Behaviour,
    *,
    num_tokens: Any = (2, 5),
    step_s: float = 0.001,
    **actors: Any,
) -> tuple[Bench, SimulatedActor]:
    run = make(playing_config(**actors), rows=played_rows())
    actor = SimulatedActor(run, behave=behave, num_tokens=num_tokens, step_s=step_s)
    run.publish(0)
    run.start(actor)
    return run, actor


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def counters(actor: SimulatedActor) -> dict[str, float]:
    return actor._all_counters()


def test_groups_of_several_turns_are_stored_with_their_own_rewards(bench):
    run, actor = started(bench, turns(3, reward=0.75, first="99", shown="45"))
    groups = run.train(0, 4)
    for sample in samples_of(groups):
        assert (sample.turns, sample.reward, sample.error, sample.finish_reason) == (3, 0.75, None, "stop")
        tokens, mask = sample.tokens.numpy().tolist(), sample.is_sampled.numpy().tolist()
        assert tokens[:3] == [5, 12, 12]
        assert sum(not sampled for sampled in mask) == 3 + 2 * 2
        assert [place for place, token in enumerate(tokens) if token == EOS and mask[place]][-1] == len(
            tokens
        ) - 1
        assert sample.version_spans[-1].end == sample.num_sampled
    for group in groups:
        shown, *others = group.samples
        assert [role for role, _ in shown.transcript] == ["user", "assistant"] * 3
        assert shown.text == shown.transcript[-1][1]
        assert not any(sample.transcript or sample.text for sample in others)
    found = counters(actor)
    assert found["turns"] >= 3 * 16
    assert found["environment_answers"] >= 4 * 16
    assert actor.places is not None
    until(lambda: actor.places.num_open <= 2 * actor._config.actors.slots)


def test_the_samples_of_a_group_meet_the_same_environment_and_draw_differently(bench):
    run, actor = started(bench, turns(2))
    group = run.train(0, 4)[0]
    assert len({sample.tokens for sample in group.samples}) > 1
    seeds = [place.seed for place in actor.places.places]
    assert all(seeds[start : start + 4] == seeds[start : start + 1] * 4 for start in (0, 4, 8))
    assert len(set(seeds)) > 1


def test_an_item_gives_the_same_episodes_whoever_plays_it(bench):
    """The seed of a turn is a function of the item's, the sample's number and the turn, whatever came
    between.
    """

    def behave(asked: Asked) -> tuple[float, Turn]:
        delay_s = random.choice([0, 0.002, 0.01])
        return delay_s, turns(asked.seed % 3 + 1)(asked)[1]

    found: list[dict[int, Group]] = []
    for _ in range(2):
        run, _actor = started(bench, behave)
        found.append({group.group_id: group for step in range(4) for group in run.train(step, 4)})
    same = found[0].keys() & found[1].keys()
    assert len(same) >= 8
    for group_id in same:
        first, second = found[0][group_id], found[1][group_id]
        assert [sample.tokens for sample in first.samples] == [sample.tokens for sample in second.samples]
        assert [sample.turns for sample in first.samples] == [first.samples[0].turns] * 4


def test_a_waiting_environment_frees_its_slot_and_other_groups_start_meanwhile(bench):
    """Two slots, and environments that take ten times as long as an answer: four episodes are open."""
    _, actor = started(bench, turns(2, delay_s=0.05), slots=2, group_size=2, step_s=0.002)
    until(lambda: actor.places.places)
    before_s = counters(actor)["wait_admission_s"]
    until(lambda: counters(actor)["groups"] >= 12)
    bound = 2 * actors.groups.EPISODES_PER_SLOT
    assert bound <= actor.places.most_open < bound + 2, "a group is begun as a whole"
    assert counters(actor)["wait_environment_s"] > 0
    assert counters(actor)["wait_admission_s"] - before_s < counters(actor)["wait_environment_s"]


def test_environments_that_hang_in_their_reset_keep_no_slot(bench):
    def behave(asked: Asked) -> tuple[float, Turn]:
        return (3600.0 if asked.what == "reset" and asked.place < 2 else 0.0), turns(2)(asked)[1]

    run, actor = started(bench, behave, slots=2, group_size=2)
    run.train(0, 4)
    run.train(1, 4)
    assert not actor.places.places[0].is_closed


def test_the_engine_never_waits_for_an_environment(bench):
    """One of four environments hangs: the others' groups go on, none of them slower for it."""

    def behave(asked: Asked) -> tuple[float, Turn]:
        hangs = asked.what == "act" and asked.row["row"] == 0
        return (3600.0 if hangs else 0.0), turns(2)(asked)[1]

    run = bench(playing_config(), rows=_numbered())
    actor = SimulatedActor(run, behave=behave, num_tokens=(2, 5), step_s=0.001)
    run.publish(0)
    run.start(actor)
    trained = [group for step in range(6) for group in run.train(step, 4)]
    assert all(group.prompt_index != 0 for group in trained)
    assert counters(actor)["busy_s"] > 0


def _numbered() -> list[Any]:
    import dataclasses

    return [dataclasses.replace(row, columns={"answer": "1", "row": row.source_row}) for row in played_rows()]


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "cut", "num_turns"),
        [
            ({"max_turns": 2}, "max_turns", 2),
            ({"max_new_tokens": 3}, "max_new_tokens", 1),
            ({"max_sequence_tokens": 16}, "max_sequence_tokens", None),
        ],
    )
    def test_what_a_limit_cut_is_kept_and_counted_by_that_limit(self, bench, limits, cut, num_turns):
        run, actor = started(bench, turns(99, shown="4" * 5), num_tokens=(4, 4), **limits)
        for sample in samples_of(run.train(0, 4)):
            assert sample.finish_reason == "length"
            assert sample.reward == 0.0
            assert sample.num_tokens <= run.config.max_sequence_tokens
            assert num_turns in (None, sample.turns)
        found = {name: value for name, value in counters(actor).items() if name.startswith("cut_at")}
        assert found.pop(f"cut_at_{cut}") >= 16
        assert set(found.values()) == {0.0}


class TestFailures:
    @pytest.mark.parametrize(
        ("kind", "counter"),
        [("raised", "errors"), ("timeout", "timeouts"), ("crash", "crashes"), ("memory", "crashes")],
    )
    @pytest.mark.parametrize("when", ["reset", "act"])
    def test_a_failure_is_an_error_of_its_sample_and_the_group_goes_on(self, bench, kind, counter, when):
        def behave(asked: Asked) -> tuple[float, Turn | EnvironmentFailure]:
            is_hit = asked.what == when and asked.place % 4 == 0
            if is_hit:
                return 0.01, EnvironmentFailure(kind, "it broke")
            return 0.01, turns(2)(asked)[1]

        run = bench(playing_config(), rows=played_rows())
        actor = SimulatedActor(run, behave=behave, num_tokens=(2, 5), step_s=0.001)
        run.publish(0)
        run.start(actor)
        groups = run.train(0, 4) + run.train(1, 4)
        until(lambda: counters(actor)[f"environment_{counter}"])
        assert all(sample.error is None and sample.reward == 1.0 for sample in samples_of(groups))
        until(lambda: run.stats()["samples_error"] > 0)
        _, _, texts = run.buffer.get("error_summary")
        assert "environment game: it broke" in texts
        until(lambda: counters(actor)["errors"])


class TestUpdates:
    @staticmethod
    def slow(asked: Asked) -> tuple[float, Turn]:
        return 0.02, turns(3)(asked)[1]

    def published(self, bench: Callable[..., Bench], on_update: str) -> tuple[Bench, SimulatedActor]:
        run, actor = started(bench, self.slow, on_update=on_update, step_s=STEP_S)
        until(lambda: counters(actor)["environment_answers"] > 8)
        run.publish(1)
        until(lambda: actor.engine.version == 1)
        return run, actor

    def test_continue_lets_an_episode_span_versions_and_says_which_said_what(self, bench):
        run, _ = self.published(bench, "continue")
        samples = samples_of(run.train(0, 4) + run.train(1, 4))

        def crossing() -> list[Sample]:
            return [s for s in samples if {span.version for span in s.version_spans} == {0, 1}]

        for step in range(2, 10):
            if not crossing():
                samples += samples_of(run.train(step, 4))
        assert crossing()
        for sample in samples:
            versions = [span.version for span in sample.version_spans]
            assert versions == sorted(versions)
            assert sample.oldest_version == versions[0]
            assert sample.version_spans[-1].end == sample.num_sampled

    def test_drain_waits_for_open_episodes_in_their_environments_too(self, bench):
        run, actor = self.published(bench, "drain")
        samples = samples_of(run.train(0, 4) + run.train(1, 4))
        assert {len({span.version for span in sample.version_spans}) for sample in samples} == {1}
        assert actor.unfinished_at_load == [0, 0]
        assert counters(actor)["samples_restarted"] == 0

    def test_abort_plays_again_from_the_reset_with_the_same_seeds(self, bench):
        run, actor = self.published(bench, "abort")
        samples = samples_of(run.train(0, 4) + run.train(1, 4))
        assert {len({span.version for span in sample.version_spans}) for sample in samples} == {1}
        assert {sample.turns for sample in samples} == {3}
        assert counters(actor)["samples_restarted"] > 0
        seeds: dict[str, set[int]] = {}
        for request_id, seed in actor.engine.submitted:
            seeds.setdefault(request_id, set()).add(seed)
        assert {len(found) for found in seeds.values()} == {1}
        until(lambda: actor.places.num_open <= 2 * actor._config.actors.slots)


class TestDeadlines:
    """Their clock moves on when nothing is open but what hangs: no other episode can be late."""

    @staticmethod
    def turn_while_all_hang(
        monkeypatch: pytest.MonkeyPatch, actor: SimulatedActor, hangs: Callable[[Asked], bool]
    ) -> None:
        clock, wait = TurnedClock(), actor._groups.wait
        set_clock(monkeypatch, actor, clock)

        def waits(*arguments: Any) -> None:
            # Of the loop itself, with nothing to generate: nothing begins meanwhile.
            if all(hangs(place.asked[-1]) for place in actor.places.places if not place.is_closed):
                clock.now_s += 1.5
            wait(*arguments)

        monkeypatch.setattr(actor._groups, "wait", waits)

    def test_a_sample_past_its_deadline_is_cut_wherever_it_is(self, bench, monkeypatch):
        def hangs(asked: Asked) -> bool:
            return asked.what == "act" and asked.seed % 2 == 0

        def behave(asked: Asked) -> tuple[float, Turn]:
            return (3600.0 if hangs(asked) else 0.005), turns(2)(asked)[1]

        config = playing_config(straggler_timeouts_s=(1.0, None))
        run = bench(config.model_copy(update={"rewards": actor_config().rewards}), rows=played_rows())
        actor = SimulatedActor(run, behave=behave, num_tokens=(2, 5), step_s=0.001)
        self.turn_while_all_hang(monkeypatch, actor, hangs)
        run.publish(0)
        run.start(actor)
        samples = samples_of([group for step in range(4) for group in run.train(step, 4)])
        late = [sample for sample in samples if sample.finish_reason == "length"]
        assert late
        assert {sample.turns for sample in late} == {1}
        until(lambda: counters(actor)["samples_truncated_late"] >= len(late))

    def test_a_group_does_not_wait_longer_for_an_environment(self, bench, monkeypatch):
        def hangs(asked: Asked) -> bool:
            return asked.what == "reset" and asked.place % 4 == 0

        def behave(asked: Asked) -> tuple[float, Turn]:
            return (3600.0 if hangs(asked) else 0.005), turns(2)(asked)[1]

        run = bench(playing_config(straggler_timeouts_s=(None, 1.0)), rows=played_rows())
        actor = SimulatedActor(run, behave=behave, num_tokens=(2, 5), step_s=0.001)
        self.turn_while_all_hang(monkeypatch, actor, hangs)
        run.publish(0)
        run.start(actor)
        assert {len(group.samples) for group in run.train(0, 4)} == {3}
        assert counters(actor)["samples_dropped"] >= 4
        assert counters(actor)["groups_partial"] >= 4


def test_an_evaluation_plays_episodes_of_its_version(bench):
    run = bench(playing_config(), rows=played_rows(), eval_rows=played_rows(3))
    run.publish(0, evaluate=True)
    actor = SimulatedActor(run, behave=turns(2, reward=0.5, delay_s=0.02), num_tokens=(2, 5), step_s=STEP_S)
    run.start(actor)
    until(lambda: len(actor._evaluating))
    run.publish(1)
    until(lambda: run.evaluations)
    result, _ = run.evaluations[0]
    assert (result.policy_version, result.num_problems, result.num_errors) == (0, 3, 0)
    assert result.solve_rate == 0.5


@pytest.mark.parametrize("phase", ["reset", "act"])
def test_retired_now_in_the_middle_of_episodes_nothing_is_left_open_and_another_plays_them_again(
    bench, phase
):
    def behave(asked: Asked) -> tuple[float, Turn]:
        return (3600.0 if asked.what == phase else 0), turns(2)(asked)[1]

    run, actor = started(bench, behave)
    until(lambda: actor.places.num_open >= 8 and actor._groups.is_waiting)
    before = [place.seed for place in actor.places.places]
    run.board.get("retire", ["actor-0"], "now")
    run._running["actor-0"].result(60)
    assert actor.places.num_open == 0
    other = SimulatedActor(run, "actor-1", behave=turns(2), num_tokens=(2, 5), step_s=0.001)
    run.start(other)
    assert len(run.train(0, 4)) == 4
    until(lambda: {place.seed for place in other.places.places} >= set(before))


def test_prompts_without_an_environment_are_answered_in_one_turn_beside_the_others(bench):
    mixed = [*played_rows(4), *rows(4)]
    run = bench(playing_config().model_copy(update={"rewards": actor_config().rewards}), rows=mixed)
    actor = SimulatedActor(run, behave=turns(2), num_tokens=(2, 5), step_s=0.001)
    run.publish(0)
    run.start(actor)
    groups = [group for step in range(3) for group in run.train(step, 4)]
    assert {sample.turns for sample in samples_of(groups)} == {1, 2}
    assert all(entry for entry in ledger(run))
