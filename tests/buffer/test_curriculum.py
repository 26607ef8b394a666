"""Solved prompts rest: the rule against a slow obvious model, and what of it outlives a process."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from buffer.curriculum import LONGEST_REST, MOST_RESTING, Curriculum
from buffer.ledger import audit_run
from buffer.server import ReplayBuffer
from buffer.sources import Part
from buffer.stream import PromptStream
from core.errors import ConfigError
from tests.support.buffers import check_sums, make_payload, ordinals_of, scenario
from tests.support.configs import buffer_config, make_config

SOLVED, MIXED = (1.0, 1.0), (1.0, 0.0)


class CurriculumModel:
    """All visits of all prompts since the highest reward rose, as a list; everything else is told from it."""

    def __init__(self, num_visits: int, bound: float | None, num_prompts: int) -> None:
        self.num_visits, self.bound, self.most = num_visits, bound, int(MOST_RESTING * num_prompts)
        self.rewards: list[float] = []
        self.rows: dict[int, list[int]] = {}  # By prompt: how long each solved visit in a row let it rest.
        self.left: Counter[int] = Counter()

    def observe(self, prompt: int, rewards: tuple[float, ...]) -> None:
        if self.bound is None and self.rewards and max(rewards) > max(self.rewards):
            self.rows, self.left = {}, Counter()
        self.rewards += rewards
        bound = self.bound
        if bound is None:
            bound = max(self.rewards) if max(self.rewards) > min(self.rewards) else float("inf")
        if any(reward < bound for reward in rewards):
            self.rows.pop(prompt, None)
            self.left.pop(prompt, None)
            return
        row = self.rows.setdefault(prompt, [])
        if len(row) + 1 < self.num_visits:
            row.append(0)
        elif self.left[prompt] or self.num_resting() < self.most:
            rest = min(LONGEST_REST, max(1, 2 * max(row, default=0)))
            row.append(rest)
            self.left[prompt] = max(self.left[prompt], rest)

    def num_resting(self) -> int:
        return sum(left > 0 for left in self.left.values())

    def passes_over(self, prompt: int) -> bool:
        rests = self.left[prompt] > 0
        self.left[prompt] -= rests
        return rests


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_agrees_with_an_obvious_model(seed):
    rng = random.Random(seed)
    settings = rng.randint(1, 3), rng.choice([None, 0.5]), rng.choice([1, 3, 12])
    curriculum, model = Curriculum(*settings), CurriculumModel(*settings)
    table: dict[int, tuple[int, int]] = {}
    highest, seen = 1.0, Counter[str]()
    for _ in range(800):
        prompt = rng.randrange(settings[2])
        match rng.choice(["solved"] * 4 + ["mixed", "none", "passes", "passes", "restart", "higher"]):
            case "solved":
                rewards = (highest,) * 3
            case "mixed":
                rewards = (highest, rng.random() / 3, highest)
            case "none":
                rewards = (0.0, 0.0, 0.0)
            case "higher" if rng.random() < 0.1:
                highest += 1
                rewards = (highest, 0.0, 0.0)
            case "restart":
                keep = json.loads(json.dumps(curriculum.get_state()["range"]))
                curriculum = Curriculum(*settings)
                curriculum.set_state({"visits": dict(table), "range": keep})
                continue
            case _:
                rests = curriculum.passes_over(prompt)
                assert rests == model.passes_over(prompt)
                seen["rested"] += rests
                rewards = ()
        if rewards:
            curriculum.observe(prompt, rewards)
            model.observe(prompt, rewards)
        is_cleared, changed = curriculum.pop_changed()
        table = {} if is_cleared else table
        table.update(changed)
        table = {index: visits for index, visits in table.items() if visits != (0, 0)}
        assert table == curriculum.get_state()["visits"], "the disk is told of every change"
        assert curriculum.num_resting == model.num_resting() <= model.most
        assert curriculum.check_valid() == []
    assert seen["rested"] > 10 or settings[2] == 1, "a lone prompt never rests"


def test_a_prompt_rests_for_a_growing_number_of_epochs_until_it_fails():
    curriculum, visited = Curriculum(2, None, 10), []
    curriculum.observe(0, MIXED)
    for epoch in range(60):
        if not curriculum.passes_over(7):
            visited.append(epoch)
            curriculum.observe(7, SOLVED)
    assert visited == [0, 1, 3, 6, 11, 20, 29, 38, 47, 56], "1, 2, 4, 8, 8, ... epochs in between"
    curriculum.observe(7, MIXED)
    assert not curriculum.passes_over(7)
    curriculum.observe(7, SOLVED)
    assert not curriculum.passes_over(7), "it takes two again"


def test_what_is_solved_is_told_by_the_highest_reward_once_there_was_a_lower_one():
    curriculum = Curriculum(1, None, 10)
    curriculum.observe(1, (0.1, 0.1))
    assert curriculum.num_resting == 0, "nobody knows yet whether 0.1 is much"
    curriculum.observe(2, (0.1, 0.0))
    curriculum.observe(1, (0.1, 0.1))
    assert curriculum.num_resting == 1
    curriculum.observe(3, (-5.0, 2.0))
    assert curriculum.num_resting == 0, "0.1 was not much"
    curriculum.observe(1, (0.1, 0.1))
    curriculum.observe(3, (2.0, 2.0))
    assert (curriculum.passes_over(1), curriculum.passes_over(3)) == (False, True)


def test_with_a_reward_given_no_other_counts():
    curriculum = Curriculum(1, 0.9, 10)
    curriculum.observe(1, (0.9, 0.95))
    curriculum.observe(2, (0.89, 7.0))
    assert (curriculum.passes_over(1), curriculum.passes_over(2)) == (True, False)


@pytest.mark.parametrize("num_shards", [1, 3])
@scenario
async def test_the_stream_passes_over_what_rests_and_goes_on_so_after_a_kill(run_dir, num_shards):
    """One life without a kill and one with many see the same prompts in the same order."""
    streams = []
    for kills in (False, True):
        config = buffer_config(capacity=6, curriculum=1, num_shards=num_shards)
        directory = f"{run_dir}/{kills}"
        shards = [ReplayBuffer(config, directory, 13, shard) for shard in range(num_shards)]
        stream, seen = PromptStream.of(config, 13), []
        for turn in range(90):
            number = turn % num_shards
            (ordinal,) = ordinals_of(await shards[number].lease("a", 1, 0.0))
            prompt = stream.item(ordinal).prompt_index
            assert prompt % num_shards == number or num_shards == 1
            seen.append((ordinal, prompt))
            rewards = MIXED if turn < 3 or prompt in (4, 5, 6) else SOLVED
            await shards[number].insert("a", [make_payload(ordinal, turn, rewards)])
            await shards[number].sample(turn, 1, 0.0)
            if kills and turn % 7 == 0:
                shards[number]._shard.store.close()  # What was not acknowledged is gone.
                shards[number] = ReplayBuffer(config, directory, 13, number)
        stats = [await check_sums(shard) for shard in shards]
        for shard in shards:
            await shard.close()
        found = audit_run(directory)
        assert found["violations"] == []
        assert found["status"]["rested"] == sum(each["rested"] for each in stats) > 90
        assert f"; {found['status']['rested']} passed over" in found["balance"]
        assert sum(each["resting"] for each in stats) >= 8
        visits = Counter(prompt for _, prompt in seen)
        assert min(visits[prompt] for prompt in (4, 5, 6)) > 2 * max(visits[prompt] for prompt in (0, 1, 2))
        streams.append(seen)
    assert streams[0] == streams[1]


@scenario
async def test_without_a_curriculum_nothing_rests_that_did_before_the_run_went_on(run_dir):
    before = ReplayBuffer(buffer_config(capacity=6, curriculum=1), run_dir, 4)
    for turn in range(8):
        (ordinal,) = ordinals_of(await before.lease("a", 1, 0.0))
        await before.insert("a", [make_payload(ordinal, turn, MIXED if turn < 1 else SOLVED)])
        await before.sample(turn, 1, 0.0)
    rested = await check_sums(before)
    assert rested["resting"] > 0
    await before.close()
    after = ReplayBuffer(buffer_config(capacity=6), run_dir, 4)
    for turn in range(8, 20):
        (ordinal,) = ordinals_of(await after.lease("a", 1, 0.0))
        await after.insert("a", [make_payload(ordinal, turn, SOLVED)])
        await after.sample(turn, 1, 0.0)
    found = await check_sums(after)
    await after.close()
    assert (found["resting"], found["rested"]) == (0, rested["rested"])
    assert audit_run(run_dir)["violations"] == []


@scenario
async def test_a_prompt_whose_samples_failed_was_not_visited(run_dir):
    buffer = ReplayBuffer(buffer_config(curriculum=1), run_dir, 4)
    ordinals = ordinals_of(await buffer.lease("a", 4, 0.0))
    await buffer.insert("a", [make_payload(ordinals[0], rewards=MIXED)])
    await buffer.insert("a", [make_payload(ordinals[1], rewards=(None, 1.0))])
    await buffer.fail("a", ordinals[2:], "no reason")
    assert (await check_sums(buffer))["resting"] == 0
    await buffer.close()


def test_a_shard_without_a_prompt_is_refused_and_so_is_another_partition(tmp_path):
    config = buffer_config(curriculum=2, num_shards=3)
    with pytest.raises(ConfigError, match=r"num_shards = 3 needs at least as many prompts .*; one has 2"):
        PromptStream.of(config, 20, (Part(18, 1), Part(2, 1)))
    dealt = PromptStream.of(config, 21, (Part(5, 1), Part(5, 1), Part(11, 1)))
    assert [dealt.num_prompts_at(shard) for shard in range(3)] == [2 + 2 + 4, 2 + 2 + 4, 1 + 1 + 3]
    assert PromptStream.of(config, 3).state != PromptStream.of(buffer_config(num_shards=3), 3).state
    assert PromptStream.of(buffer_config(curriculum=2), 3).state == PromptStream.of(buffer_config(), 3).state


@pytest.mark.parametrize(
    "value", [0, -1, True, "x", "2?reward=", "2?reward=nan", "2?level=1", "0?reward=1", 1.5]
)
def test_a_curriculum_is_a_number_of_visits(value):
    with pytest.raises(ConfigError, match=r"data\.curriculum = .*expected a number of visits"):
        make_config(data={"curriculum": value})


def test_a_curriculum_is_read():
    data = make_config(data={"curriculum": "3?reward=-0.5"}).data
    assert (data.curriculum_visits, data.curriculum_reward) == (3, -0.5)
    data = make_config(data={"curriculum": 2}).data
    assert (data.curriculum_visits, data.curriculum_reward) == (2, None)
    with pytest.raises(ConfigError, match="what a log has solved stays so"):
        make_config(data={"curriculum": 2, "offline": "log.jsonl"}, objective={"importance_weight": "none"})
