"""The rollout actor's own bookkeeping; its loop is in tests/actors/test_rollout_loop.py, its engine in
tests/actors/test_engine.py.
"""

from concurrent.futures import Future
from typing import Any

from actors.rollout import RolloutActor


class LateFuture(Future[Any]):
    """Done a moment after it was first asked, as a reward worker's answer may arrive between two looks."""

    asked = 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def result(self, timeout: float | None = None) -> Any:
        return ["late"]


def test_a_reward_that_arrives_while_the_actor_looks_is_not_lost() -> None:
    actor = RolloutActor.__new__(RolloutActor)
    ready: Future[Any] = Future()
    ready.set_result(["ready"])
    actor._scoring = [("a", ready), ("b", LateFuture()), ("c", ready)]  # type: ignore[list-item]
    assert actor._take_scored() == [("a", ["ready"]), ("c", ["ready"])]
    assert actor._take_scored() == [("b", ["late"])]
    assert actor._scoring == []
