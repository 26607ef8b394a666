"""The prompt stream and admission, the latter against a slow obvious model."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from buffer.admission import MAX_LOSSES, Admission, LeaseError, work_item
from buffer.sources import Part


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


@pytest.mark.parametrize("parts", [(), (Part(7, 2), Part(23, 1), Part(20, 1))])
@pytest.mark.parametrize("num_shards", [2, 3])
def test_a_prompt_may_belong_to_one_shard_whose_epochs_visit_each_of_its_prompts_once(parts, num_shards):
    seen: dict[int, set[int]] = {}
    for shard in range(num_shards):
        mine = [
            work_item(turn * num_shards + shard, seed=3, num_prompts=50, parts=parts, num_shards=num_shards)
            for turn in range(400)
        ]
        seen[shard] = {item.prompt_index for item in mine}
        if not parts:
            size = len(seen[shard])
            for epoch in range(3):
                rows = [item.prompt_index for item in mine[epoch * size : (epoch + 1) * size]]
                assert set(rows) == seen[shard]
    assert sum(map(len, seen.values())) == 50, "all of them, each at one shard"
    assert set().union(*seen.values()) == set(range(50))


def test_admission_counts_open_and_unconsumed_items():
    admission = Admission(allowed=5, lease_timeout_s=10)
    assert admission.lease("a", 3, stored_unconsumed=0, now_s=0) == [0, 1, 2]
    assert admission.lease("b", 3, stored_unconsumed=1, now_s=0) == [3]
    assert admission.lease("b", 3, stored_unconsumed=1, now_s=0) == []
    assert admission.end(0)
    assert not admission.end(0)
    assert admission.lease("b", 3, stored_unconsumed=1, now_s=0) == [4]


def test_items_are_leased_in_portions_once_nothing_was_left():
    admission = Admission(allowed=12, lease_timeout_s=10, batch=4)
    made = admission.lease("a", 99, stored_unconsumed=0, now_s=0)
    assert len(made) == 12, "nothing is held back before"
    for ordinal in made:
        admission.end(ordinal)
    assert admission.num_leasable(stored_unconsumed=12) == 0
    assert admission.lease("a", 99, stored_unconsumed=8, now_s=0) == [], "one batch less: they are held back"
    assert admission.lease("a", 3, stored_unconsumed=4, now_s=0) == [12, 13, 14]
    assert admission.lease("b", 99, stored_unconsumed=4, now_s=0) == [15, 16, 17, 18, 19], "and the others"


@pytest.mark.parametrize(("stored", "leased"), [(4, []), (3, [12])], ids=["a batch lies there", "less"])
def test_items_are_held_back_only_while_a_batch_lies_stored(stored, leased):
    admission = Admission(allowed=12, lease_timeout_s=10, batch=4)
    for ordinal in admission.lease("a", 99, stored_unconsumed=0, now_s=0)[: stored + 1]:
        admission.end(ordinal)
    assert admission.lease("a", 99, stored_unconsumed=stored, now_s=0) == leased
    admission.give_back("a", [11])
    assert admission.lease("b", 99, stored_unconsumed=stored, now_s=0) == [11], "what is issued again is not"


def test_nothing_is_held_back_where_less_than_three_batches_are_admitted():
    admission = Admission(allowed=11, lease_timeout_s=10, batch=4)
    admission.end(admission.lease("a", 99, stored_unconsumed=4, now_s=0)[0])
    assert admission.lease("a", 99, stored_unconsumed=4, now_s=0) == [7]


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

    def __init__(self, allowed: int, timeout_s: float, resting: set[int]) -> None:
        self.allowed, self.timeout_s, self.resting = allowed, timeout_s, resting
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
        last = max(new, default=len(self.items) - 1)
        passed = [ordinal for ordinal in range(len(self.items), last + 1) if ordinal in self.resting]
        assert sorted(new + passed) == list(range(len(self.items), last + 1)), "in turn"
        assert not self.resting & set(new)
        self.items.update(dict.fromkeys(passed, "ended"))
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
    resting = {ordinal for ordinal in range(5000) if rng.random() < 0.3}

    def made() -> Admission:
        return Admission(6, 10.0, passes_over=lambda ordinal: ordinal in resting)

    admission, model = made(), AdmissionModel(6, 10.0, resting)
    unconsumed, now_s, rested = 0, 0.0, list[int]()
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
                admission = made()
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
        rested += admission.pop_passed_over()
        assert set(rested) == resting & set(range(admission.frontier))
        assert admission.check_valid() == []
    assert admission.frontier > 30
