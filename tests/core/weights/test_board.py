"""The board: snapshots are pulled at the actors' pace, and an evaluation belongs to exactly one policy
version.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from core.config.evaluation import HELD_OUT
from core.evaluation.open_evaluation import SuiteSize
from core.evaluation.records import EvalItem, EvalSample, Evaluation
from core.records import VersionSpan
from core.weights.board import KEEP, Board, Directive
from tests.support.configs import make_config

CONFIG = make_config()


def result(item: EvalItem, reward: float | None, version: int | None = None) -> EvalSample:
    span = VersionSpan(item.policy_version if version is None else version, 0, 1)
    error = None if reward is not None else "failed"
    return EvalSample(
        item=item,
        prompt="p",
        texts=("t",),
        rewards=(reward,),
        errors=(error,),
        version_spans=((span,),),
        lengths=(1,),
        truncated=(False,),
        answer_ids=(7,),
    )


class Bench:
    """A board with `num_prompts` held-out prompts of each suite, and what it told about evaluations."""

    def __init__(self, num_prompts: int, *suites: str, **more: Any) -> None:
        suites = suites or (HELD_OUT,)
        self.told: list[Evaluation] = []
        sizes = {suite: SuiteSize(num_prompts, 1) for suite in suites}
        self.board = Board(
            CONFIG.run, sizes, lambda evaluation, samples: self.told.append(evaluation), **more
        )

    async def poll(self, actor: str, version: int, max_items: int = 10, timeout_s: float = 0.05) -> Directive:
        payload, _ = await self.board.poll(actor, version, max_items, timeout_s)
        return msgspec.msgpack.decode(payload, type=Directive)

    async def finish(self, *samples: EvalSample) -> None:
        await self.board.finish(msgspec.msgpack.encode(list(samples)))


def run(scenario: Any) -> None:
    asyncio.run(scenario())


def test_a_poll_waits_for_the_first_snapshot_and_then_names_the_newest() -> None:
    async def scenario() -> None:
        bench = Bench(0)
        waiting = asyncio.create_task(bench.poll("a", -1, timeout_s=5.0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await bench.board.publish(b"m0", ["r0"], 0, evaluate=())
        assert (await waiting).version == 0
        await bench.board.publish(b"m2", ["r2"], 2, evaluate=())
        await bench.board.publish(b"m4", ["r4"], 4, evaluate=())
        assert (await bench.poll("a", 0)).version == 4
        assert (await bench.board.poll("a", 0, 1, 0.0))[1] == (b"m4", ["r4"])
        assert (await bench.board.poll("a", 4, 1, 0.0))[1] is None, "it has that one"
        assert (await bench.poll("a", 4)).version == 4  # Nothing new: after the timeout, its own version.
        assert await bench.board.snapshot(4) == (b"m4", ["r4"])

    run(scenario)


def test_old_snapshots_are_dropped_but_not_the_one_under_evaluation() -> None:
    async def scenario() -> None:
        bench = Bench(1)
        await bench.board.publish(b"m", [], 0, evaluate=[HELD_OUT])
        for version in range(1, 10):
            await bench.board.publish(b"m", [], version, evaluate=())
        held = [version for version in range(10) if await bench.board.snapshot(version) is not None]
        assert held == [0, *range(10 - KEEP, 10)]
        directive = await bench.poll("a", 9)
        assert (directive.version, [item.policy_version for item in directive.eval_items]) == (0, [0])
        await bench.finish(result(directive.eval_items[0], 1.0))
        assert await bench.board.snapshot(0) is None

    run(scenario)


def test_an_evaluation_is_shared_by_the_actors_and_counts_failures_apart() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        await bench.board.publish(b"m", [], 6, evaluate=[HELD_OUT])
        first, second = await bench.poll("a", 6, max_items=2), await bench.poll("b", 6, max_items=2)
        assert sorted(item.prompt_index for item in (*first.eval_items, *second.eval_items)) == [0, 1, 2, 3]
        await bench.finish(*(result(item, 1.0) for item in first.eval_items))
        assert bench.told == []
        await bench.finish(result(second.eval_items[0], 0.0), result(second.eval_items[1], None))
        (evaluation,) = bench.told
        assert (evaluation.policy_version, evaluation.num_problems, evaluation.num_errors) == (6, 4, 1)
        assert evaluation.solve_rate == 2 / 3
        assert (await bench.board.evaluations())[0] == []

    run(scenario)


def test_results_by_another_version_are_generated_again() -> None:
    async def scenario() -> None:
        bench = Bench(1)
        await bench.board.publish(b"m", [], 2, evaluate=[HELD_OUT])
        (item,) = (await bench.poll("a", 2)).eval_items
        await bench.finish(result(item, 1.0, version=3))
        assert bench.told == []
        assert (await bench.poll("a", 2)).eval_items == (item,)

    run(scenario)


def test_items_of_an_actor_that_died_are_handed_out_again_once() -> None:
    async def scenario() -> None:
        bench = Bench(3)
        await bench.board.publish(b"m", [], 0, evaluate=[HELD_OUT])
        items = (await bench.poll("a", 0)).eval_items
        await bench.finish(result(items[0], 1.0))
        await bench.board.release_actor("a")
        assert (await bench.poll("a", 0)).retire  # A call of it that comes late takes nothing with it.
        again = (await bench.poll("b", 0)).eval_items
        assert sorted(item.prompt_index for item in again) == [1, 2]
        # The dead actor's answer came after all.
        await bench.finish(*(result(item, 0.0) for item in again), result(items[1], 1.0))
        assert len(bench.told) == 1

    run(scenario)


def test_a_retired_actor_is_told_so_at_its_next_poll() -> None:
    async def scenario() -> None:
        bench = Bench(0)
        await bench.board.publish(b"m", [], 0, evaluate=())
        waiting = asyncio.create_task(bench.poll("a", 0, timeout_s=5.0))
        await asyncio.sleep(0.01)
        await bench.board.retire(["a"])
        assert (await waiting).retire
        assert not (await bench.poll("b", 0)).retire

    run(scenario)


def test_a_board_that_was_started_again_evaluates_what_was_open_and_not_what_is_done_and_keeps_who_ends() -> (
    None
):
    async def scenario() -> None:
        before, again = Bench(4), Bench(4)
        done = Evaluation(
            suite=HELD_OUT,
            policy_version=0,
            solve_rate=0.5,
            num_problems=4,
            num_samples=4,
            num_errors=0,
            metrics={},
        )
        await again.board.restore([done], {"actor-1": "drain", "actor-2": "now"})
        first = await again.board.publish(b"m", [], 0, evaluate=[HELD_OUT])
        assert first.versions == [0]
        assert await again.board.publish(b"m", [], 4, evaluate=[HELD_OUT]) == (first.board, [0, 4])
        directive = await again.poll("actor-0", 0, 2)
        assert (directive.version, len(directive.eval_items)) == (4, 2)
        assert directive.board != (await before.poll("actor-0", 0)).board, (
            "whoever follows sees that it is another"
        )
        assert [(await again.poll(name, 4)).retire for name in ("actor-1", "actor-2", "actor-3")] == [
            "drain",
            "now",
            "",
        ]
        assert await again.board.evaluations() == ([(HELD_OUT, 4)], [done])

    run(scenario)


def test_only_results_that_are_new_are_sent_also_by_a_board_that_was_started_again() -> None:
    async def scenario() -> None:
        bench = Bench(1)
        for version in (0, 1):
            await bench.board.publish(b"m", [], version, evaluate=[HELD_OUT])
            await bench.finish(result((await bench.poll("a", version)).eval_items[0], 1.0))
        first, second = (await bench.board.evaluations())[1]
        assert await bench.board.evaluations(1) == ([], [second])
        assert await bench.board.evaluations(2) == ([], [])
        again = Bench(1)
        await again.board.publish(b"m", [], 2, evaluate=[HELD_OUT])
        await again.finish(result((await again.poll("a", 2)).eval_items[0], 1.0))
        assert (await again.board.evaluations(2))[1] == []  # It does not know yet what was done.
        await again.board.restore([first, second], {})
        assert [each.policy_version for each in (await again.board.evaluations(2))[1]] == [2]

    run(scenario)


def test_what_a_board_started_again_evaluates_before_it_is_told_of_it_is_not_held_for_ever() -> None:
    async def scenario() -> None:
        before = Bench(1, "math", kept_suite="math")
        for version in (10, 12, 14):
            await before.board.publish(b"m", [], version, evaluate=["math"])
            await before.finish(result((await before.poll("a", version)).eval_items[0], 1.0))
        results = (await before.board.evaluations())[1]
        again = Bench(1, "math", kept_suite="math")
        for version in (10, 12, 14):  # The learner publishes again before the driver has told it anything.
            await again.board.publish(b"m", [], version, evaluate=["math"])
        late = (await again.poll("a", 10)).eval_items[0]
        await again.finish(result((await again.poll("b", 12)).eval_items[0], 1.0))
        await again.board.restore(results, {}, [14])
        await again.finish(result(late, 1.0))
        assert await again.board.evaluations() == ([], results)
        for version in range(15, 19):
            held = await again.board.publish(b"m", [], version, evaluate=())
        assert held.versions == [14, 16, 17, 18], "the driver still needs 14"

    run(scenario)


def test_a_version_that_a_board_started_again_is_told_of_once_more_is_evaluated_once() -> None:
    async def scenario() -> None:
        again = Bench(1)
        await again.board.publish(b"m", [], 4, evaluate=[HELD_OUT])
        for version in (2, 4):
            await again.board.publish(b"m", [], version, evaluate=[HELD_OUT] if version == 4 else [])
        assert await again.board.evaluations() == ([(HELD_OUT, 4)], [])
        dropped = EvalSample(
            item=EvalItem(HELD_OUT, 2, 0, 0),
            prompt="p",
            texts=("",),
            rewards=(None,),
            errors=("late",),
            version_spans=((),),
            lengths=(0,),
            truncated=(True,),
            answer_ids=(None,),
        )
        await again.finish(dropped)
        assert await again.board.evaluations() == ([(HELD_OUT, 4)], []), "the answer to another board's item"
        await again.finish(result((await again.poll("a", 4)).eval_items[0], 1.0))
        assert [(each.policy_version, each.solve_rate) for each in again.told] == [(4, 1.0)]

    run(scenario)


def test_suites_are_evaluated_side_by_side_each_by_itself() -> None:
    async def scenario() -> None:
        bench = Bench(2, "math", "words")
        await bench.board.publish(b"m", [], 0, evaluate=["math", "words", "unknown"])
        first = (await bench.poll("a", 0)).eval_items
        second = (await bench.poll("b", 0)).eval_items
        assert [{item.suite for item in items} for items in (first, second)] == [{"math"}, {"words"}]
        await bench.finish(*(result(item, 1.0) for item in first))
        await bench.board.publish(b"m", [], 2, evaluate=["words"])
        assert [(each.suite, each.policy_version) for each in bench.told] == [("math", 0)]
        assert (await bench.board.evaluations())[0] == [("words", 0), ("words", 2)]
        await bench.finish(*(result(item, 0.0) for item in second))
        assert [(each.suite, each.solve_rate) for each in bench.told] == [("math", 1.0), ("words", 0.0)]

    run(scenario)


def test_one_that_evaluates_is_given_more_of_its_version_at_once_and_nothing_else() -> None:
    async def scenario() -> None:
        bench = Bench(2, "math", "words")
        await bench.board.publish(b"m", [], 0, evaluate=["math", "words"])
        await bench.board.publish(b"m", [], 2, evaluate=["math"])
        assert {item.suite for item in (await bench.poll("a", 0, 2)).eval_items} == {"math"}
        more, _ = await bench.board.poll("a", 0, 2, 9.0, True)
        assert {item.suite for item in msgspec.msgpack.decode(more, type=Directive).eval_items} == {"words"}
        payload, _ = await bench.board.poll("a", 0, 2, 9.0, True)
        nothing = msgspec.msgpack.decode(payload, type=Directive)
        assert (nothing.version, nothing.eval_items) == (0, ()), "neither version 2 nor its items"
        assert {item.policy_version for item in (await bench.poll("b", 0, 1)).eval_items} == {2}

    run(scenario)


def test_an_item_is_done_once_whoever_says_so_and_is_not_handed_out_again() -> None:
    async def scenario() -> None:
        bench = Bench(2)
        await bench.board.publish(b"m", [], 0, evaluate=[HELD_OUT])
        items = (await bench.poll("a", 0)).eval_items
        await bench.board.give_back("a")
        await bench.finish(result(items[0], 1.0))  # Its holder was slow, not dead.
        left = (await bench.poll("b", 0)).eval_items
        assert [item.prompt_index for item in left] == [1]
        await bench.finish(result(items[0], 0.0), result(left[0], 1.0), result(left[0], 0.0))
        assert [(each.solve_rate, each.num_samples) for each in bench.told] == [(1.0, 2)]

    run(scenario)


def test_a_board_started_again_in_the_middle_of_suites_takes_what_was_under_way_and_repeats_nothing() -> None:
    async def scenario() -> None:
        before = Bench(1, "math", "words")
        await before.board.publish(b"m", [], 4, evaluate=["math", "words"])
        (math,) = (await before.poll("a", 4)).eval_items
        (words,) = (await before.poll("a", 4)).eval_items
        await before.finish(result(math, 1.0))
        again = Bench(1, "math", "words")
        await again.board.restore(before.told, {})
        await again.board.publish(b"m", [], 4, evaluate=["math", "words"])
        assert (await again.board.evaluations())[0] == [("words", 4)]
        await again.finish(result(words, 0.5))
        assert [(each.suite, each.solve_rate) for each in again.told] == [("words", 0.5)]
        assert (await again.poll("b", 4)).eval_items == ()

    run(scenario)


def test_a_snapshot_of_the_kept_suite_is_held_until_it_is_let_go() -> None:
    async def scenario() -> None:
        bench = Bench(1, "math", "words", kept_suite="math")
        await bench.board.publish(b"m0", [], 0, evaluate=["math", "words"])
        for _ in range(2):
            await bench.finish(*(result(item, 1.0) for item in (await bench.poll("a", 0)).eval_items))
        for version in range(1, KEEP + 3):
            await bench.board.publish(b"m", [], version, evaluate=["words"] if version == 1 else [])
        await bench.finish(*(result(item, 1.0) for item in (await bench.poll("a", 1)).eval_items))
        assert await bench.board.snapshot(0) is not None
        assert await bench.board.snapshot(1) is None, "of another suite"
        await bench.board.let_go([0])
        assert await bench.board.snapshot(0) is None

    run(scenario)


def test_what_a_learner_left_undone_is_made_up_for_with_the_version_that_comes_next() -> None:
    async def scenario() -> None:
        bench = Bench(1, "math", "words")
        await bench.board.publish(b"m", [], 4, evaluate=["math", "words"])
        first = [item for _ in range(2) for item in (await bench.poll("a", 4)).eval_items]
        await bench.finish(*(result(item, 1.0) for item in first if item.suite == "words"))
        assert await bench.board.forget_snapshots() == [4]
        await bench.board.owe({"math": 4, "words": 4})
        await bench.board.publish(b"m", [], 6, evaluate=[])  # It goes on from there.
        assert (await bench.board.evaluations())[0] == [("math", 6)]
        await bench.board.publish(b"m", [], 8, evaluate=[])
        assert (await bench.board.evaluations())[0] == [("math", 6)], "once"

    run(scenario)
