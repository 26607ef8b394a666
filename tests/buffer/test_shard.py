"""The pure half of the buffer: prompt stream, admission, samplers and eviction, each against a slow
obvious model.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter

import msgspec
import numpy as np
import pytest

from buffer.admission import MAX_LOSSES, Admission, LeaseError, work_item
from buffer.replay import Replay, meta_of
from buffer.sampling import SAMPLERS, GroupMeta, View
from buffer.usable import HeldSamples, usable_group
from core.config import BufferConfig
from core.errors import ConfigError, DataError, StalenessError
from core.records import Bits, Float32s, Group, Sample, VersionSpan
from core.staleness import AGELESS


def make_sample(version: int = 0, reward: float | None = 1.0, error: str | None = None) -> Sample:
    return Sample.one_turn(
        (1,), (1, 2), (-0.1, -0.2), version_spans=(VersionSpan(version, 0, 2),), finish_reason="stop", text="x",
        reward=reward, error=error,
    )  # fmt: skip


def make_group(*samples: Sample) -> Group:
    return Group(group_id=0, prompt_index=0, source_row=0, prompt="p", samples=samples, actor="a0")


# The prompt stream


def test_each_epoch_visits_every_prompt_once_in_its_own_order():
    epochs = [
        [work_item(epoch * 50 + i, seed=3, num_prompts=50).prompt_index for i in range(50)]
        for epoch in range(3)
    ]
    assert all(sorted(rows) == list(range(50)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_the_prompt_stream_is_the_same_in_every_process_and_for_ever():
    script = (
        "from buffer.admission import work_item; print([[w.prompt_index, w.seed] for w in (work_item(o, seed=7, "
        "num_prompts=10) for o in range(12))])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    there = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=60,
    )
    here = [
        [item.prompt_index, item.seed]
        for item in (work_item(ordinal, seed=7, num_prompts=10) for ordinal in range(12))
    ]
    assert json.loads(there.stdout) == here
    assert here[:3] == [[6, 1041839916], [3, 184785996], [4, 504589498]], (
        "the stream changed: every run directory out there would continue with other prompts"
    )


def test_seeds_of_items_have_31_bits_and_differ():
    seeds = [work_item(ordinal, seed=1, num_prompts=4).seed for ordinal in range(500)]
    assert len(set(seeds)) == 500
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30
    assert seeds[0] != work_item(0, seed=2, num_prompts=4).seed


# Admission


def test_admission_counts_open_and_unconsumed_items():
    admission = Admission(allowed=5, lease_timeout_s=10)
    assert admission.lease("a", 3, stored_unconsumed=0, now_s=0) == [0, 1, 2]
    assert admission.lease("b", 3, stored_unconsumed=1, now_s=0) == [3]
    assert admission.lease("b", 3, stored_unconsumed=1, now_s=0) == []
    assert admission.end(0)
    assert not admission.end(0)
    assert admission.lease("b", 3, stored_unconsumed=1, now_s=0) == [4]


def test_an_expired_lease_is_issued_again_first_and_ends_once():
    admission = Admission(allowed=4, lease_timeout_s=10)
    admission.lease("slow", 1, 0, now_s=0)
    admission.lease("quick", 1, 0, now_s=5)
    assert admission.next_expiry_s == 10
    assert admission.expire(now_s=9.9) == ([], [])
    assert admission.expire(now_s=10) == ([0], [])
    assert admission.lease("quick", 2, 0, now_s=11) == [0, 2]
    assert admission.holder(0) == "quick"
    assert admission.fail("slow", [0]) == [], "another holds it by now"
    assert admission.end(0), "a late insert of the first holder counts"
    assert not admission.end(0)
    assert +admission.counts == {"reissued": 1, "expired": 1, "ignored_reports": 1}


def test_a_lease_that_its_holder_renews_never_runs_out_and_those_it_does_not_name_do():
    admission = Admission(allowed=4, lease_timeout_s=10)
    admission.lease("busy", 2, 0, now_s=0)
    admission.lease("other", 1, 0, now_s=0)
    for now_s in range(5, 100, 5):
        admission.renew("busy", [0, 2, 77], now_s)
        assert admission.expire(now_s) == (([1, 2], []) if now_s == 10 else ([], [])), (
            "2 is another's, 77 nobody's"
        )
    assert admission.next_expiry_s == 105
    admission.set_state(admission.get_state())
    admission.renew("busy", [0], now_s=200)
    assert admission.next_expiry_s == 210
    assert admission.expire(now_s=210) == ([0], [])


def test_reports_about_items_never_leased_are_errors():
    admission = Admission(allowed=4, lease_timeout_s=10)
    admission.lease("a", 2, 0, now_s=0)
    with pytest.raises(LeaseError, match="group 2 was never leased: shard 0 of 1 has leased 2 items"):
        admission.end(2)
    with pytest.raises(LeaseError, match="never leased"):
        admission.fail("a", [0, 99])
    assert admission.num_open == 2, "nothing of a wrong report is carried out"


class AdmissionModel:
    """One dict from ordinal to "ended", None (waiting) or (actor, start); everything else is counted
    anew each time.
    """

    def __init__(self, allowed: int, timeout_s: float) -> None:
        self.allowed, self.timeout_s = allowed, timeout_s
        self.items: dict[int, object] = {}
        self.losses: Counter[int] = Counter()

    def open_items(self) -> set[int]:
        return {ordinal for ordinal, item in self.items.items() if item != "ended"}

    def held_by(self, actor: str) -> set[int]:
        return {
            ordinal for ordinal, item in self.items.items() if isinstance(item, tuple) and item[0] == actor
        }

    def lease(self, actor: str, count: int, unconsumed: int, now_s: float, got: list[int]) -> None:
        waiting = {ordinal for ordinal, item in self.items.items() if item is None}
        again = [ordinal for ordinal in got if ordinal in waiting]
        new = got[len(again) :]
        assert got[: len(again)] == again, "those to issue again come first"
        assert len(again) == min(count, len(waiting))
        assert new == list(range(len(self.items), len(self.items) + len(new)))
        room = max(0, self.allowed - len(self.open_items()) - unconsumed)
        assert len(new) == min(count - len(again), room)
        self.items.update(dict.fromkeys(got, (actor, now_s)))

    def renew(self, actor: str, ordinals: list[int], now_s: float) -> None:
        self.items.update(dict.fromkeys(self.held_by(actor) & set(ordinals), (actor, now_s)))

    def expire(self, now_s: float, got: tuple[list[int], list[int]]) -> None:
        self.lose(
            {
                o
                for o, item in self.items.items()
                if isinstance(item, tuple) and item[1] + self.timeout_s <= now_s
            },
            got,
        )

    def lose(self, late: set[int], got: tuple[list[int], list[int]]) -> None:
        self.losses.update(late)
        assert set(got[0]) == {ordinal for ordinal in late if self.losses[ordinal] < MAX_LOSSES}
        assert set(got[1]) == {ordinal for ordinal in late if self.losses[ordinal] >= MAX_LOSSES}
        self.items.update(dict.fromkeys(got[0]))
        self.items.update(dict.fromkeys(got[1], "ended"))


@pytest.mark.parametrize("seed", range(20))
def test_admission_agrees_with_an_obvious_model(seed):
    rng = random.Random(seed)
    admission, model = Admission(6, 10.0), AdmissionModel(6, 10.0)
    unconsumed, now_s = 0, 0.0
    for _ in range(400):
        now_s += rng.choice([0.0, 0.5, 3.0])
        actor = rng.choice("abc")
        known = sorted(model.items)[-10:]
        picked = rng.sample(known, min(len(known), 2))
        match rng.choice(
            ["lease", "expire", "end", "fail", "give_back", "release", "consume", "restart", "renew"]
        ):
            case "lease":
                count = rng.randint(0, 4)
                model.lease(actor, count, unconsumed, now_s, admission.lease(actor, count, unconsumed, now_s))
            case "expire":
                model.expire(now_s, admission.expire(now_s))
            case "renew":
                admission.renew(actor, picked, now_s)
                model.renew(actor, picked, now_s)
            case "end":
                for ordinal in picked:
                    ended = admission.end(ordinal)
                    assert ended == (model.items[ordinal] != "ended")
                    unconsumed += ended
                    model.items[ordinal] = "ended"
            case "fail":
                free = {o for o in picked if model.items[o] is None} | (model.held_by(actor) & set(picked))
                assert set(admission.fail(actor, picked)) == free
                model.items.update(dict.fromkeys(free, "ended"))
            case "give_back":
                held = model.held_by(actor) & set(picked)
                assert set(admission.give_back(actor, picked)) == held
                model.items.update(dict.fromkeys(held))
            case "release":
                model.lose(model.held_by(actor), admission.lose_actor(actor))
            case "consume":
                unconsumed = rng.randint(0, unconsumed)
            case "restart" if rng.random() < 0.2:
                state = json.loads(json.dumps(admission.get_state()))
                admission = Admission(6, 10.0)
                admission.set_state(state)
                # Only tells it the time: what is held, is held from now on.
                assert admission.expire(now_s + 100) == ([], [])
                model.items |= {
                    o: (item[0], now_s + 100) for o, item in model.items.items() if isinstance(item, tuple)
                }
                now_s += 100
        assert admission.num_open == len(model.open_items())
        assert admission.num_open + unconsumed <= 6
        assert admission.frontier == len(model.items)
        assert admission.check_valid() == []
    assert admission.frontier > 30


# Samplers


def view_of(groups: list[GroupMeta]) -> View:
    replay = Replay(BufferConfig(capacity=100), 0)
    for group in groups:
        replay.insert(group)
    return replay.view


def test_fresh_takes_the_newest_and_oldest_the_first():
    groups = [GroupMeta(10, 3, 1), GroupMeta(11, 5, 1), GroupMeta(12, 3, 1), GroupMeta(13, 4, 1)]
    rng = np.random.default_rng(0)
    assert SAMPLERS["fresh"](view_of(groups), 3, 8, rng) == [11, 13, 12]
    assert SAMPLERS["oldest"](view_of(groups), 3, 8, rng) == [10, 11, 12]


def test_uniform_takes_every_group_equally_often():
    view = view_of([GroupMeta(group_id, 0, 1) for group_id in range(10)])
    rng = np.random.default_rng(0)
    taken = Counter(group_id for _ in range(4000) for group_id in SAMPLERS["uniform"](view, 3, 0, rng))
    expected, sigma = 4000 * 0.3, (4000 * 0.3 * 0.7) ** 0.5
    assert all(abs(taken[group_id] - expected) < 4.5 * sigma for group_id in range(10))


def test_groups_without_age_are_the_newest_and_never_stale():
    replay = Replay(BufferConfig(sampler="fresh", max_staleness=2, capacity=3, uses_per_group=2), 0)
    for group_id, version in [(0, 1), (1, AGELESS), (2, 7), (3, AGELESS)]:
        replay.insert(GroupMeta(group_id, version, 1))
    assert [group.group_id for group, _ in replay.pop_evicted()] == [0], (
        "for capacity, the oldest with an age"
    )
    assert replay.take(2, step=9) == [3, 1], "newest first, and the later one before the earlier one"
    assert replay.take(3, step=9000) == [], "2 is stale by now"
    assert replay.take(2, step=9001) == [3, 1]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_takes_different_stored_groups(name):
    rng = np.random.default_rng(1)
    for size in range(1, 30):
        groups = [
            GroupMeta(int(group_id), int(rng.integers(4)), 1) for group_id in rng.permutation(100)[:size]
        ]
        for k in range(1, size + 1):
            chosen = SAMPLERS[name](view_of(groups), k, 3, rng)
            assert len(set(chosen)) == k
            assert set(chosen) <= {group.group_id for group in groups}


# Replay


class ReplayModel:
    """A list of [id, version, uses] in order of insertion; all rules by scanning it."""

    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self.rows: list[list[int]] = []
        self.counts: Counter[str] = Counter()

    def insert(self, group_id: int, version: int) -> bool:
        if any(row[0] == group_id for row in self.rows):
            self.counts["duplicates"] += 1
            return False
        self.rows.append([group_id, version, 0])
        self.counts["inserted"] += 1
        unconsumed = [row for row in self.rows if row[2] == 0]
        if len(unconsumed) > self.config.capacity:
            self.rows.remove(min(unconsumed, key=lambda row: row[1]))
            self.counts["evicted_capacity"] += 1
        if len(self.rows) > self.config.uses_per_group * self.config.capacity:
            self.rows.remove(min((row for row in self.rows if row[2]), key=lambda row: row[1]))
            self.counts["evicted_surplus"] += 1
        return True

    def evict_stale(self, step: int) -> None:
        fresh = [row for row in self.rows if step - row[1] <= self.config.max_staleness]
        self.counts["evicted_stale"] += len(self.rows) - len(fresh)
        self.rows = fresh

    def take(self, k: int, step: int, got: list[int]) -> None:
        self.evict_stale(step)
        assert len(got) == (k if len(self.rows) >= k else 0)
        assert len(set(got)) == len(got)
        for row in [row for row in self.rows if row[0] in got]:
            assert step - row[1] <= self.config.max_staleness
            row[2] += 1
            got = [group_id for group_id in got if group_id != row[0]]
            if row[2] == self.config.uses_per_group:
                self.rows.remove(row)
                self.counts["evicted_used"] += 1
        assert got == [], "took a group that is not stored"


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("seed", range(8))
def test_replay_agrees_with_an_obvious_model(sampler, seed):
    rng = random.Random(seed)
    config = BufferConfig(
        sampler=sampler,
        uses_per_group=rng.randint(1, 3),
        max_staleness=rng.randint(0, 5),
        capacity=rng.randint(2, 12),
    )
    replay, model = Replay(config, seed), ReplayModel(config)
    step = 0
    for _ in range(600):
        match rng.choice(["insert", "insert", "insert", "take", "evict", "restart"]):
            case "insert":
                group_id, version = rng.randint(0, 80), max(0, step - rng.randint(0, 4))
                assert replay.insert(GroupMeta(group_id, version, 10)) == model.insert(group_id, version)
            case "take":
                k = rng.randint(1, 5)
                model.take(k, step, replay.take(k, step))
                step += 1
            case "evict":
                replay.evict_stale(step)
                model.evict_stale(step)
            case "restart":
                state = replay.get_state()
                replay = Replay(config, seed)
                replay.set_state(state)
        assert [
            [group.group_id, group.oldest_version, group.uses] for group in replay.get_state()["groups"]
        ] == model.rows
        # tests/buffer/test_sampling.py has a model of that.
        model.counts["strata_short"] = replay.counts["strata_short"]
        assert +replay.counts == +model.counts
        assert replay.num_unconsumed == sum(row[2] == 0 for row in model.rows)
        assert replay.check_valid() == []
    assert step > 50


def test_the_choice_depends_on_seed_step_and_contents_only():
    config = BufferConfig(sampler="uniform", uses_per_group=9)

    def chosen(seed: int, step: int, warm_up: int) -> list[int]:
        replay = Replay(config, seed)
        for group_id in range(20):
            replay.insert(GroupMeta(group_id, 0, 1))
        for earlier in range(warm_up):
            replay.take(2, earlier)
        return replay.take(5, step)

    assert chosen(1, 8, warm_up=0) == chosen(1, 8, warm_up=6)
    assert chosen(1, 8, 0) != chosen(1, 9, 0) != chosen(2, 9, 0)


def test_groups_that_are_used_but_never_used_up_do_not_pile_up():
    replay = Replay(BufferConfig(sampler="fresh", uses_per_group=3, max_staleness=10**6, capacity=2), 0)
    for step in range(50):
        replay.insert(GroupMeta(step, step, 1))
        assert replay.take(1, step) == [step]
        assert len(replay) <= 6
    assert [(group.group_id, reason) for group, reason in replay.pop_evicted()] == [
        (n, "evicted_surplus") for n in range(44)
    ]
    assert replay.check_valid() == []


def test_evictions_are_reported_with_their_reason():
    replay = Replay(BufferConfig(sampler="oldest", uses_per_group=1, max_staleness=2, capacity=2), 0)
    for group_id, version in [(0, 5), (1, 3), (2, 6)]:
        replay.insert(GroupMeta(group_id, version, 1))
    assert replay.take(1, step=8) == [2], "1 went for capacity, 0 is too old"
    assert [(group.group_id, reason) for group, reason in replay.pop_evicted()] == [
        (1, "evicted_capacity"),
        (0, "evicted_stale"),
        (2, "evicted_used"),
    ]
    assert not replay.has_evicted


def test_invariant_3_a_stale_group_that_gets_through_is_an_error(monkeypatch):
    replay = Replay(BufferConfig(max_staleness=2), 0)
    replay.insert(GroupMeta(4, 1, 1))
    monkeypatch.setattr(replay, "evict_stale", lambda step: None)
    with pytest.raises(
        StalenessError, match="group 4 has a token of version 1 at learner step 4: staleness 3"
    ):
        replay.take(1, step=4)
    assert replay[4].uses == 0


def test_a_sampler_that_repeats_itself_is_an_error(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "fresh", lambda view, k, step, rng: [view.by_age(0).group_id] * k)
    replay = Replay(BufferConfig(sampler="fresh"), 0)
    for group_id in range(3):
        replay.insert(GroupMeta(group_id, 0, 1))
    with pytest.raises(ConfigError, match="'fresh' is broken"):
        replay.take(2, step=0)


def test_a_lower_uses_per_group_lets_used_groups_go_on_restart():
    replay = Replay(BufferConfig(uses_per_group=3, sampler="oldest"), 0)
    for group_id in range(2):
        replay.insert(GroupMeta(group_id, 0, 1))
    replay.take(1, 0)
    replay.take(1, 1)
    again = Replay(BufferConfig(uses_per_group=2), 0)
    again.set_state(replay.get_state())
    assert 0 not in again
    assert again.counts["evicted_used"] == 1
    assert again.check_valid() == []


def test_a_state_that_contradicts_itself_is_refused():
    replay = Replay(BufferConfig(), 0)
    with pytest.raises(DataError, match="2 groups inserted, but 1 stored and 0 evicted"):
        replay.set_state({"groups": [GroupMeta(1, 0, 1)], "counts": {"inserted": 2}})


# What is stored of a group


def test_samples_with_an_error_are_left_out_and_their_texts_told():
    failed = make_sample(version=0, reward=None, error="boom")
    kept, errors = usable_group(make_group(make_sample(4), failed, make_sample(3)))
    assert kept.samples == (make_sample(4), make_sample(3))
    assert kept.oldest_version == 3, "the version of a sample that is gone does not count"
    assert errors == ["boom"]


def test_offline_samples_are_usable_and_those_without_tokens_or_with_half_a_past_are_not():
    offline = msgspec.structs.replace(make_sample(), logprobs=Float32s(), version_spans=())
    group = make_group(offline, offline)
    assert usable_group(group) == (group, [])
    assert (group.oldest_version, meta_of(group).version, meta_of(group).oldest_version) == (
        None,
        None,
        AGELESS,
    )
    with pytest.raises(DataError, match="sample 1 has log-probs but no version"):
        usable_group(make_group(offline, msgspec.structs.replace(make_sample(), version_spans=())))
    with pytest.raises(DataError, match="sample 0 has no sampled tokens"):
        usable_group(
            make_group(msgspec.structs.replace(offline, is_sampled=Bits.of([0] * len(offline.tokens))))
        )


# Groups of one


def test_a_held_sample_joins_the_next_group_of_one_of_its_row_unless_it_is_stale():
    held = HeldSamples(max_staleness=3)
    alone, other = make_group(make_sample(version=2)), make_group(make_sample(4))
    large = make_group(make_sample(4), make_sample(4))
    assert held.hold(alone)
    assert held.join(msgspec.structs.replace(other, prompt_index=1), step=4).samples == other.samples, (
        "another prompt"
    )
    assert held.join(make_group(), step=4).samples == (), "a group of which nothing is left takes nothing in"
    assert held.join(large, step=4) == large, "a group that is large enough would only grow older"
    restored = HeldSamples(max_staleness=3)
    restored.set_state(held.get_state())
    assert restored.join(other, step=5).samples == (*other.samples, *alone.samples)
    assert restored.join(other, step=5) == other, "it joins once"
    assert restored.counts == {"held_samples": 1, "joined_samples": 1}
    assert held.join(other, step=6) == other
    assert held.counts == {"held_samples": 1, "held_stale": 1}
    assert held.pop_changed() == [(0, None)]
    assert held.pop_changed() == []


def test_neither_nothing_nor_an_offline_sample_is_held():
    held = HeldSamples(max_staleness=3)
    assert not held.hold(make_group())
    assert not held.hold(
        make_group(msgspec.structs.replace(make_sample(), logprobs=Float32s(), version_spans=()))
    )
    assert held.counts == {}


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_a_sample_without_reward_or_error_is_refused(reward):
    with pytest.raises(DataError, match="scored sample 1"):
        usable_group(make_group(make_sample(), make_sample(reward=reward)))
