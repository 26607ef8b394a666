"""Groups without signal stay out, at a bounded price: the budget against an obvious model, and what of it is
durable.
"""

from __future__ import annotations

import json
import logging
import random

import pytest

from buffer.band import Band
from buffer.equal_rewards import MAX_SKIPPED_BATCHES, EqualRewards
from buffer.ledger import audit
from buffer.server import ReplayBuffer
from tests.support.buffers import (
    LEDGER_NAME,
    NUM_PROMPTS,
    check_sums,
    ids_of,
    make_payload,
    ordinals_of,
    scenario,
)
from tests.support.configs import buffer_config

EQUAL, MIXED = (1.0, 1.0), (1.0, 0.0)


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_agrees_with_an_obvious_model(seed):
    """The model counts, back from each group, what was skipped and what paid for it."""
    rng = random.Random(seed)
    groups_per_step, share = rng.randint(1, 5), rng.choice([0.0, 0.02, 0.1, 0.3, 0.9])
    skipping, budget, skipped, with_signal = EqualRewards(True, groups_per_step), 0, 0, 0
    budget = full = MAX_SKIPPED_BATCHES * groups_per_step
    for _ in range(600):
        if rng.random() < 0.05:  # A restart.
            again = EqualRewards(True, groups_per_step)
            again.set_state(json.loads(json.dumps(skipping.get_state())))
            skipping = again
        rewards = MIXED if rng.random() < share else (rng.choice([0.0, 0.5, 1.0]),) * 2
        has_signal = rewards == MIXED
        expected = not has_signal and budget > 0
        let_through = skipping.let_through
        assert skipping.skips(rewards) == expected
        assert skipping.let_through - let_through == (not has_signal and not expected)
        budget = min(full, budget + MAX_SKIPPED_BATCHES) if has_signal else max(0, budget - 1)
        skipped, with_signal = skipped + expected, with_signal + has_signal
        assert skipped <= full + MAX_SKIPPED_BATCHES * with_signal, "a batch costs at most so many"


def test_nothing_is_skipped_where_it_is_off():
    skipping = EqualRewards(False, 2)
    assert not any(skipping.skips(EQUAL) for _ in range(100))
    assert (skipping.let_through, skipping.pop_warning()) == (0, "")


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([0.0], "every sample so far has the reward 0: all are solved, or none is"),
        (
            [0.0, 1.0, 1.0, 0.4],
            "4 of them all solved (reward 1, the highest so far), 2 not at all (0, the lowest), 2 in",
        ),
    ],
)
def test_a_task_without_signal_is_told_once(rewards, words):
    skipping, told = EqualRewards(True, 1), []
    for number in range(200):
        skipping.skips([rewards[number % len(rewards)]] * 3)
        told.append(skipping.pop_warning())
    first = told.index(next(filter(None, told)))
    assert first == MAX_SKIPPED_BATCHES - 1, "as soon as the budget is spent"
    assert words in told[first]
    assert sum(map(bool, told)) == 1
    assert "8 groups 8 had the same reward" in told[first]
    for _ in range(3 * MAX_SKIPPED_BATCHES):
        skipping.skips(MIXED)
    for _ in range(MAX_SKIPPED_BATCHES):
        skipping.skips(EQUAL)
    assert skipping.pop_warning(), "it had signal meanwhile"


@scenario
async def test_a_group_of_equal_rewards_takes_no_place_and_frees_its_slot_at_once(run_dir):
    config = buffer_config(capacity=4, skip_equal_rewards=True)
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    assert ordinals_of(await buffer.lease("a", 9, 0.0)) == [0, 1, 2, 3]
    assert await buffer.lease("a", 1, 0.0) == []
    assert await buffer.insert("a", [make_payload(0, rewards=EQUAL), make_payload(1)]) == [0, 1]
    assert await buffer.insert("a", [make_payload(0, rewards=EQUAL)]) == [0], "sent again, it is a duplicate"
    assert ordinals_of(await buffer.lease("a", 9, 0.0)) == [4]
    assert await buffer.insert("a", [make_payload(2, rewards=(0.5, None, 0.5)), make_payload(3)]) == [2, 3]
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["evicted_equal"], stats["groups"], stats["duplicates"]) == (4, 2, 2, 1)
    await buffer.close()
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    assert (await check_sums(buffer))["evicted_equal"] == 2
    assert sorted(ids_of(await buffer.sample(0, 2, 1.0))) == [1, 3]
    await buffer.close()
    found = audit(f"{run_dir}/{LEDGER_NAME}")
    assert (found["violations"], found["evictions"]) == ([], {"evicted_equal": 2, "evicted_used": 2})


@scenario
async def test_a_hopeless_task_says_so_and_is_trained_all_the_same(run_dir, caplog):
    config = buffer_config(capacity=4, skip_equal_rewards=True)
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            while not (batch := await buffer.sample(step, 2, 0.0)):
                for ordinal in ordinals_of(await buffer.lease("a", 3, 0.0)):
                    await buffer.insert("a", [make_payload(ordinal, step, rewards=(0.0, 0.0))])
            assert len(ids_of(batch)) == 2
            if step == 1:
                await buffer.close()
                buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    stats = await check_sums(buffer)
    assert stats["evicted_equal"] == 2 * MAX_SKIPPED_BATCHES, "the budget is spent once, also over a restart"
    assert stats["equal_let_through"] == stats["inserted"] - stats["evicted_equal"] >= 8
    (warning,) = [record.message for record in caplog.records]
    assert "the task gives hardly any signal: of the last 16 groups 16" in warning


@scenario
async def test_the_band_is_one_of_groups_that_are_there(run_dir):
    """Two entries a group at most, and at least one: what was left out counts for neither side."""
    config = buffer_config(
        capacity=4, skip_equal_rewards=True, uses_per_group=2, samples_per_insert=(1.0, 2.0), sampler="oldest"
    )
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.lease("a", 4, 0.0)
    await buffer.insert("a", [make_payload(0), make_payload(1)])
    await buffer.insert("a", [make_payload(number, rewards=EQUAL) for number in (2, 3)])
    assert ordinals_of(await buffer.lease("a", 9, 0.0)) == [4, 5], "two are stored and wanted once each"
    assert [ids_of(await buffer.sample(step, 2, 0.0)) for step in (0, 1)] == [[0, 1], [0, 1]]
    assert await buffer.sample(2, 2, 0.0) is None
    await check_sums(buffer)


def test_a_band_counts_what_will_never_be_used():
    band = Band((1.5, 3.0))
    assert [band.forgone(uses) for uses in range(4)] == [2, 1, 0, 0]
    assert band.blocking(2, stored=10, taken=3, forgone=0) == 8
    assert band.exceeds(taken=29, num_groups=2, stored=10)
    assert not band.exceeds(taken=28, num_groups=2, stored=10)
    assert Band(None).blocking(2, stored=10, taken=0, forgone=0) == 2
