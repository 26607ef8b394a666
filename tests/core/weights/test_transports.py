"""Weights from the learner to the actors by every road: the source, snapshots in the background, and
the actor's end of a push.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from actors.follower import Follower
from cluster.session import without_onlookers
from core.calls import Calls
from core.errors import ConfigError, PeerTimeout, SnapshotError
from core.weights.board import BOARD, KEEP, BoardClient, Directive, ReceiverClient
from core.weights.board import Board as RealBoard
from core.weights.fetching import snapshot_of
from core.weights.snapshots import SnapshotWriter
from core.weights.transports import Sender, load_transport
from core.weights.transports.base import Transport
from learner.policy.source import ZeroSource
from tests.support.clients import events_to
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.configs import make_config
from tests.support.learning.ranks import run_ranks
from tests.support.learning.tiny_families import make_family
from tests.support.scenarios import source_scenario
from tests.support.simulated import Late
from tests.support.weights import Board, Loop, Method, Plain, Store

MIB = 2**20


def snapshots(
    policy: Plain,
    store: Store,
    board: Board,
    *,
    bucket_mib: float = 2**-6,
    timeout_s: float = 60.0,
    full_every: int = 1,
) -> Transport:
    config = make_config({"run": {"timeout_s": timeout_s}, "weights": {"full_every": full_every}})
    source = ZeroSource(policy, int(bucket_mib * MIB))
    return load_transport(
        Sender(0, config, source, BoardClient(board, BOARD), Calls(timeout_s), store, lambda text: None)
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_snapshot_that_cannot_be_had_again_and_again_is_told_once(monkeypatch):
    told, directive = list[str](), msgspec.msgpack.encode(Directive(3, board="b"))
    board = SimpleNamespace(
        poll=Method(lambda *_: (directive, None)),
        snapshot=Method(lambda version: None),
        give_back=Method(lambda name: None),
    )
    monkeypatch.setattr("actors.follower.RETRY_S", 0.01)
    calls = Calls(5.0, events_to(told))
    follower = Follower("actor-0", make_config(), BoardClient(board, BOARD), calls)

    def has_failed_often() -> bool:
        follower.poll(0, is_evaluating=False, room=8)
        return follower.num_failed >= 4

    until(has_failed_often)
    assert told == ["actor-0 keeps its weights: snapshot 3 has been dropped for newer ones"]


class TestDeltas:
    """Versions of which only what has changed since the last whole one is stored."""

    def step(self, policy: Plain, version: int) -> dict[str, torch.Tensor]:
        """Changes a few elements and returns what the policy is now."""
        with torch.no_grad():
            policy.module[0].weight[version % 64, :3] += 1.0
        return policy.copy()

    def sizes(self, store: Store) -> list[int]:
        """Returns the bytes of each bucket stored since the last call."""
        sizes, store.sizes = store.sizes, []
        return sizes

    def test_whoever_reads_a_version_has_it_bit_for_bit_and_only_every_third_is_stored_whole(self):
        policy, board, store = Plain(), Board(), Store()
        transport = snapshots(policy, store, board, full_every=3)
        stored, whole_bytes = [], sum(tensor.nbytes for tensor in policy.copy().values())
        for version in range(8):
            expected = self.step(policy, version)
            transport.publish(version, evaluate=())
            transport.flush()
            assert_same(board.published[version], expected)
            stored.append(sum(self.sizes(store)) / whole_bytes)
        assert [share > 0.9 for share in stored] == [version % 3 == 0 for version in range(8)]
        assert max(share for version, share in enumerate(stored) if version % 3) < 0.1

    def test_a_learner_that_starts_again_begins_with_a_whole_one(self):
        policy, board, store = Plain(), Board(), Store()
        transport = snapshots(policy, store, board, full_every=100)
        for version in range(2):
            self.step(policy, version)
            transport.publish(version, evaluate=())
        transport.flush()
        assert len(board.needs[1]) > len(board.needs[0]), "changes, and what they are changes of"
        again = snapshots(policy, store, board, full_every=100)
        expected = self.step(policy, 1)
        again.publish(1, evaluate=())
        again.flush()
        assert len(board.needs[1]) == len(board.needs[0])
        assert_same(board.published[1], expected)

    def test_a_board_that_was_started_again_gets_changes_with_what_they_are_changes_of(self):
        policy, board, store = Plain(), Board(), Store()
        transport = snapshots(policy, store, board, full_every=100)
        for version in range(6):
            expected = self.step(policy, version)
            transport.publish(version, evaluate=())
        transport.flush()
        board.published = {}
        transport.republish()
        until(lambda: len(board.published) == 2)
        assert 0 not in board.published, "the whole one is held by what has changed since"
        assert_same(board.published[5], expected)

    def test_what_comes_while_a_bucket_is_being_stored_does_not_change_the_base(self):
        policy, board = Plain(), Board()
        transport = snapshots(policy, Store(delay_s=0.01), board, full_every=4)
        expected = {}
        for version in range(9):
            expected[version] = self.step(policy, version)
            transport.publish(version, evaluate=())
            self.step(policy, version + 1)  # The learner goes on at once.
        transport.flush()
        for version, weights in expected.items():
            assert_same(board.published[version], weights)


class TestSnapshotsInTheBackground:
    def test_the_learner_goes_on_while_the_store_is_slow_and_its_changes_are_not_in_the_snapshot(
        self,
    ):
        policy, board = Plain(), Board()
        store = Store(delay_s=0.1)
        transport = snapshots(policy, store, board)
        before = policy.copy()
        store.gate.clear()
        transport.publish(4, evaluate=())  # Which waits for no bucket.
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.zero_()
        assert board.published == {}
        store.gate.set()
        transport.flush()
        assert_same(board.published[4], before)
        assert transport.metrics()["weights/store_s"] >= 0.1

    def test_the_last_publication_is_there_after_a_flush_and_a_flush_of_nothing_does_not_wait(self):
        policy, board, store = Plain(), Board(), Store()
        transport = snapshots(policy, store, board)
        transport.flush()
        store.gate.clear()
        transport.publish(2, evaluate=["held_out"])
        threading.Timer(0.2, store.gate.set).start()
        transport.flush()
        assert_same(board.published[2], policy.copy())

    def test_a_board_that_was_started_again_is_told_what_the_one_before_held_the_oldest_first(self):
        policy, board = Plain(), Board()
        transport = snapshots(policy, Store(), board)
        for version in range(5):
            transport.publish(version, evaluate=["held_out"] if version == 1 else [])
        transport.flush()
        weights, board.published, board.evaluated = board.published, {}, []
        transport.republish()
        until(lambda: len(board.published) == 3)
        assert list(board.published) == [1, 3, 4], "the one under evaluation, and the newest"
        assert board.evaluated == [1]
        assert_same(board.published[4], weights[4])

    def test_a_board_that_dies_in_an_evaluation_is_told_of_it_again_also_after_a_newer_version(self):
        board = Board()
        transport: Any = snapshots(Plain(), Store(), board)
        for version in (49, 50, 51):
            transport.publish(version, evaluate=["held_out"] if version == 50 else [])
        for death in range(3):  # Again and again before anybody has told it what was.
            transport.flush()
            board.board, board.published, board.evaluated = f"again-{death}", {}, []
            transport.publish(52 + death, evaluate=[])
        transport.flush()
        assert list(board.published) == [54]
        transport.republish()
        transport._thread.submit(lambda: None).result(60)
        assert board.evaluated == [50]
        for version in range(55, 70):
            transport.publish(version, evaluate=())
        transport.flush()
        assert sorted(transport._held) == [50, 68, 69], "the one under evaluation, and the newest"
        assert sorted(transport._told) == [50, 68, 69]

    def test_a_board_that_was_started_again_hears_last_of_what_was_pushed_meanwhile(self):
        board, store, told, announced = Board(), Store(), [], [3]
        board.announce = Method(lambda version: told.append((version, sorted(board.published))))
        transport: Any = snapshots(Plain(), store, board)
        store.gate.clear()
        transport.publish(2, evaluate=())
        transport.republish(lambda: announced[0])
        announced[0] = 4  # Pushed before the snapshot is stored.
        store.gate.set()
        until(lambda: told)
        assert told == [(4, [2])]

    def test_a_publication_waits_for_the_one_before_and_uses_its_memory_again(self):
        policy, board, store = Plain(), Board(), Store(delay_s=0.02)
        transport = snapshots(policy, store, board)
        expected = {}
        for version in range(4):
            torch.nn.init.normal_(policy.module[0].weight)
            expected[version] = policy.copy()
            transport.publish(version, evaluate=())
            assert len(board.published) >= version
        transport.flush()
        for version, weights in expected.items():
            assert_same(board.published[version], weights)
        assert store.num_stored in (8, 12, 16)  # Several buckets each time.

    def test_what_goes_wrong_in_the_background_is_raised_in_the_learner(self):
        store = Store()
        transport = snapshots(Plain(), store, Board())
        store.error = "no space left in the object store"
        transport.publish(0, evaluate=())
        with pytest.raises(OSError, match="no space left"):
            transport.publish(2, evaluate=())

    def test_a_snapshot_that_is_stored_at_the_last_moment_is_stored(self):
        transport: Any = snapshots(Plain(), Store(), Board())
        transport._storing = 2, Late()
        transport.flush()
        assert transport._storing is None

    def test_a_store_that_takes_nothing_is_named_after_the_timeout(self):
        store = Store()
        transport = snapshots(Plain(), store, Board(), timeout_s=0.3)
        store.gate.clear()
        transport.publish(6, evaluate=())
        with pytest.raises(
            PeerTimeout,
            match=r"object store or board, for the snapshot of version 6, did "
            r"not answer within 0 s",
        ):
            transport.flush()
        store.gate.set()

    def test_the_stall_is_a_fraction_of_what_it_was_when_the_learner_stored_by_itself(self):
        policy, store = Plain(256), Store(delay_s=0.05)
        transport = snapshots(policy, store, Board())
        start_s = time.perf_counter()
        writer = SnapshotWriter(2**14, store)
        for name, tensor in policy.named_weights(0):
            writer.add(name, tensor)
        writer.finish(0)
        before_s = time.perf_counter() - start_s
        start_s = machine_s()
        transport.publish(1, evaluate=())
        after_s = machine_s() - start_s
        transport.flush()
        assert after_s < before_s / 3


def test_a_source_declares_what_it_yields_without_asking_for_the_weights():
    policy = Plain()
    source = ZeroSource(policy, 100)
    declared = [(name, dtype, shape) for name, dtype, shape in source.metadata()]
    for _ in range(2):
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source] == declared
    assert source.largest_bytes == 64 * 64 * 4


REFUSED = {
    "no GPU at all": ({}, "nccl", "needs none"),
    "an actor without a GPU": ({"learner": {"num_gpus": 1}}, "nccl", "actors.num_gpus = 0"),
    "ipc without a GPU": ({}, "ipc", "weights.transport=snapshot"),
    "ipc with two ranks": (
        {"learner": {"num_gpus": 0.5, "ranks": 2}, "actors": {"num_gpus": 0.5}},
        "ipc",
        "learner.ranks=1",
    ),
    "ipc with a GPU each": (
        {"learner": {"num_gpus": 1}, "actors": {"num_gpus": 1}},
        "ipc",
        "learner.num_gpus=0.5 actors.num_gpus=0.5",
    ),
    "ipc that may grow": (
        {"learner": {"num_gpus": 0.5}, "actors": {"num_gpus": 0.5, "count": [1, 2]}},
        "ipc",
        "2 actors ask for 1.5",
    ),
    "nccl within a GPU": (
        {"learner": {"num_gpus": 0.5}, "actors": {"num_gpus": 0.5}},
        "nccl",
        "weights.transport=ipc",
    ),
    "nccl to an engine in processes of its own": (
        {"learner": {"num_gpus": 1}, "actors": {"num_gpus": 2, "tensor_parallel": 2}},
        "nccl",
        "cannot be told to break off. Set weights.transport=snapshot",
    ),
    "nccl that drains": (
        {"learner": {"num_gpus": 1}, "actors": {"num_gpus": 1, "on_update": "drain"}},
        "nccl",
        "on_update=continue",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_transport_that_the_machines_cannot_have_is_refused_with_a_remedy(case: str):
    sections, transport, remedy = REFUSED[case]
    with pytest.raises(ConfigError, match=remedy):
        make_config({**sections, "weights": {"transport": transport}})


@pytest.mark.parametrize(
    ("transport", "learner", "actors"),
    [
        ("nccl", {"num_gpus": 1, "ranks": 4}, {"num_gpus": 1, "count": [3, 6]}),
        ("ipc", {"num_gpus": 0.5}, {"num_gpus": 0.25, "count": 2}),
    ],
)
def test_a_transport_that_they_can_have_is_not(
    transport: str, learner: dict[str, Any], actors: dict[str, Any]
):
    config = make_config({"learner": learner, "actors": actors, "weights": {"transport": transport}})
    assert config.weights.transport == transport


def test_an_actor_of_a_run_with_snapshots_takes_no_pushes():
    from actors.rollout import RolloutActor

    actor = RolloutActor.__new__(RolloutActor)
    actor._receiver, actor._name, actor._config = None, "actor-0", make_config()
    with pytest.raises(SnapshotError, match=r"weights\.transport = snapshot"):
        actor.receive("start", 1)


@pytest.mark.slow
def test_two_zero_ranks_yield_the_whole_weights_in_the_declared_order_a_bucket_at_a_time(tmp_path: Path):
    """And a snapshot of theirs is of the moment it was published, although the next step changes them before
    it is stored.

    Mixtures of experts, whose files have other names and tensors than the module, come as their files have
    them, persistent buffers too.
    """
    from recipes.arithmetic import make_llama

    # Large enough for ZeRO-3 to partition its matrices: what is below 100,000 elements it keeps whole after
    # the first use.
    make_llama(16, tied=False, hidden=384, layers=2).save_pretrained(tmp_path / "model")
    for family in ("deepseek_v3", "mixtral"):
        make_family(family, tmp_path / family)
    run_ranks(source_scenario.main, 2, tmp_path / "model", tmp_path, tmp_path, timeout_s=120.0)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert report["declared"] == report["yielded"] == report["of the model"]
        assert report["wrong"] == []
        assert report["gathered for metadata"] == 0
        assert report["mixtures"] == {
            family: {"loaded": [], "restored": []} for family in ("deepseek_v3", "mixtral")
        }
        assert 0 < report["peak bytes"] <= report["bound bytes"] < report["model bytes"] / 3
    report = json.loads((tmp_path / "report-0.json").read_text())
    assert report["snapshot wrong"] == []
    assert report["changed since"] is True
    assert report["stall_s"] < report["store_s"]


class PiecewiseActor:
    """As a Ray actor: a loop that looks for orders, in a thread of its own; at the order `dies_at` its
    process ends, once two others have carried that out: each leaves a file of what it has in `done_dir`.
    """

    def __init__(self, name: str, done_dir: Path, dies_at: str = "") -> None:
        self._loop, self._name, self._done_dir, self._dies_at = Loop(), name, done_dir, dies_at

    def me(self) -> Any:
        import ray

        return ray.get_runtime_context().current_actor

    def receive(self, verb: str, number: int, *arguments: Any) -> str:
        if verb == self._dies_at:
            until(lambda: len([*self._done_dir.glob(f"{verb}-*")]) == 2)
            os._exit(1)
        said = self._loop.receiver.order(verb, number, *arguments)
        (self._done_dir / f"{verb}-{self._name}").touch()
        return said

    def seen(self) -> tuple[int, list[str]]:
        return self._loop.engine.version, self._loop.engine.asked


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    with without_onlookers():
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


class Reader:
    """As a Ray actor: what a rollout actor does with a version that the board names."""

    def read(self, board: Any, version: int) -> dict[str, bytes]:
        weights = Calls(60.0).ask(snapshot_of(BoardClient(board, BOARD), version))
        return {name: tensor.numpy().tobytes() for name, tensor in weights}


@pytest.mark.slow
def test_over_ray_what_changes_are_changes_of_is_there_when_the_board_holds_it_no_more(local_ray: None):
    import ray

    config = make_config({"weights": {"full_every": 100}})
    board = ray.remote(RealBoard).options(num_cpus=0).remote(config.run, {}, print)
    reader = ray.remote(Reader).options(num_cpus=0).remote()
    policy, calls = Plain(256), Calls(60.0)
    source = ZeroSource(policy, MIB)
    transport = load_transport(
        Sender(0, config, source, BoardClient(board, BOARD), calls, ray.put, lambda text: None)
    )
    expected = {}
    for version in range(KEEP + 3):
        with torch.no_grad():
            policy.module[0].weight[version, :5] += 1.0
        expected[version] = {name: tensor.numpy().tobytes() for name, tensor in policy.copy().items()}
        transport.publish(version, evaluate=())
    transport.flush()
    del transport  # The learner is gone, and what it held.
    with pytest.raises(SnapshotError, match="snapshot 0 has been dropped"):
        calls.ask(snapshot_of(BoardClient(board, BOARD), 0))
    for version in range(3, KEEP + 3):  # In any order, by whoever has read none before.
        assert ray.get(reader.read.remote(board, version), timeout=60) == expected[version]


@pytest.mark.slow
@pytest.mark.parametrize("coupled", [True, False])
def test_over_ray_a_killed_actor_is_named_at_once_and_costs_the_others_what_the_road_says(
    local_ray: None, coupled: bool, tmp_path: Path
):
    import ray

    from core.weights.transports.client import ActorsClient, GroupBroken

    actor_class = ray.remote(PiecewiseActor).options(num_cpus=0, max_concurrency=4)
    actors = {
        name: actor_class.remote(name, tmp_path, dies_at)
        for name, dies_at in (("actor-0", ""), ("actor-1", "update"), ("actor-2", ""))
    }
    # As they join the board.
    handles = {name: ray.get(actor.me.remote(), timeout=180) for name, actor in actors.items()}
    client = ActorsClient(Calls(20.0), 20.0, ranks_each=2, coupled=coupled)
    client.begin({name: ReceiverClient(handle, name) for name, handle in handles.items()}, 8, {"norm": "x"})
    client.init_weight_transfer_engine({"rank_offset": 1})
    client.start_weight_update()
    start_s = machine_s()
    if coupled:
        with pytest.raises(GroupBroken, match="actor-1: `update` failed"):
            client.update_weights({"names": ["norm"]})
    else:
        client.update_weights({"names": ["norm"]})
        client.finish_weight_update()
    assert machine_s() - start_s < 10
    assert list(client.failed) == ["actor-1"]
    for name in ("actor-0", "actor-2"):
        deadline_s = time.monotonic() + 60
        while (seen := ray.get(actors[name].seen.remote(), timeout=60))[
            0
        ] == 4 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert seen[0] == (-1 if coupled else 8)
        assert seen[1][:4] == ["connect", "use 0", "start", "update"]
        ray.kill(actors[name])  # Its loop's thread would outlive the session.
