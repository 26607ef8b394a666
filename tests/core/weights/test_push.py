"""Weights pushed by nccl and ipc: vLLM's own engines at both ends and the actors' real loops, on wires for
the CPU (cpu_transfer.py).

Not here: NCCL itself, which nothing has run yet, CUDA's IPC handles and streams. Everything else is the code
of a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fake_engine import PushedWeights
from core.calls import Calls
from core.weights.board import BOARD, BoardClient
from core.weights.transports import Sender, Transport, load_transport
from learner.policy.source import ZeroSource
from tests.support import ROOT
from tests.support.clocks.machine import machine_s
from tests.support.configs import pushing
from tests.support.cpu_transfer import Wires, on_cpu, wait_until
from tests.support.in_process import Answer, Bench, Reference
from tests.support.simulated import SimulatedActor, benches, rows
from tests.support.weights import Plain

pytestmark = pytest.mark.slow

SCENARIO = ROOT / "tests/support/scenarios/transport_scenario.py"

BUCKET_BYTES = 10_000
ANSWER_S = 2.0


@pytest.fixture
def wires() -> Iterator[Wires]:
    import vllm.model_executor.model_loader.mtp_validation  # noqa: F401 -- half of vLLM: an engine has it before its first update

    with on_cpu() as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with benches(tmp_path) as make:
        yield make


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the learner wait for an answer as long as a test has time, where one is to be missing."""
    monkeypatch.setattr("core.weights.transports.client.ANSWER_S", ANSWER_S)


def receiving_engine(transport: str) -> Any:
    """vLLM's worker-side engine, on a model that just keeps what it is given."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0, world_size=1, rank=0), model_config=None
    )
    kind: Any = {"nccl": NCCLWeightTransferEngine, "ipc": IPCWeightTransferEngine}[transport]
    return kind(None, config, torch.device("cpu"), PushedWeights())


class Handle:
    """A Ray actor's handle: `receive` is carried out by one of the actor's other threads."""

    def __init__(self, actor: PushedActor) -> None:
        threads = ThreadPoolExecutor(8, thread_name_prefix="receive")

        class Method:
            @staticmethod
            def remote(verb: str, number: int, *arguments: Any) -> Answer:
                def call() -> str:
                    if verb == actor.dies_at:
                        wait_until(actor.may_die, "the moment to die")
                        raise ConnectionError("the actor died")
                    return actor.receive(verb, number, *arguments)

                return Answer(threads.submit(call))

        self.receive = Method


class PushedActor(SimulatedActor):
    """The real loop, on a simulated engine with vLLM's own receiving end.

    dies_at    the order that it does not survive, once `may_die` is true
    gate       closed: its loop stands still, in a step or, where it has nothing to do, before it looks for orders
    """

    def __init__(self, run: Bench, name: str) -> None:
        self.dies_at, self.gate = "", threading.Event()
        self.may_die: Callable[[], bool] = lambda: True
        self.gate.set()
        super().__init__(run, name, num_tokens=(2, 9), step_s=0.001)
        self.engine.transfer = receiving_engine(run.config.weights.transport)
        step = self.engine.step

        def gated_step() -> Any:
            self.gate.wait(60)
            return step()

        self.engine.step = gated_step

    @property
    def pushed(self) -> dict[str, torch.Tensor]:
        return self.engine.transfer.model.weights

    def _follow_board(self) -> None:
        self.gate.wait(60)
        super()._follow_board()

    def _own_handle(self) -> Any:
        return Handle(self)


class Learner:
    """Rank 0's transport, on a small model that is trained at random."""

    def __init__(self, run: Bench) -> None:
        self.run, self.policy, self.events = run, Plain(), list[str]()
        source = ZeroSource(self.policy, BUCKET_BYTES)
        calls = Calls(run.config.run.timeout_s)

        def store(bucket: np.ndarray) -> Reference:
            return Reference(bucket.copy())

        self.transport: Transport = load_transport(
            Sender(0, run.config, source, BoardClient(run.board, BOARD), calls, store, self.events.append)
        )

    def publish(self, version: int, *, evaluate: Sequence[str] = ()) -> None:
        with torch.no_grad():
            for parameter in self.policy.module.parameters():
                parameter.normal_()
        self.transport.publish(version, evaluate=evaluate)

    @property
    def snapshots(self) -> list[int]:
        """Versions that went to the board."""
        self.transport.flush()
        return [arguments[2] for arguments in self.run.board.asked["publish"]]

    def has(self, actor: PushedActor) -> bool:
        """Whether the actor was pushed just these weights."""
        mine = self.policy.copy()
        return actor.pushed.keys() == mine.keys() and all(
            torch.equal(actor.pushed[name], mine[name]) for name in mine
        )


class Cast:
    """A learner and actors that have loaded its first snapshot."""

    def __init__(self, run: Bench, count: int) -> None:
        self.run, self.learner = run, Learner(run)
        self.learner.publish(0)
        self.actors = [self.join(f"actor-{number}") for number in range(count)]

    def join(self, name: str) -> PushedActor:
        actor = PushedActor(self.run, name)
        self.run.start(actor)
        self.reach(actor, 0)
        return actor

    def reach(self, actor: PushedActor, version: int) -> None:
        wait_until(lambda: actor.engine.version >= version, f"{actor._name} at version {version}")

    @property
    def versions(self) -> list[int]:
        return [actor.engine.version for actor in self.actors]


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_weights_are_pushed_to_all_actors_and_samples_say_so_without_another_snapshot(
    bench, wires: Wires, transport: str
):
    run = bench(pushing(transport))
    cast = Cast(run, 2)
    for version in (2, 4, 6):
        cast.learner.publish(version)
        assert cast.versions == [version, version]
        assert all(cast.learner.has(actor) for actor in cast.actors)
    assert cast.learner.snapshots == [0]
    assert wires.formed == ([3] if transport == "nccl" else [])
    assert cast.learner.transport.metrics()["weights/stale_actors"] == 0
    spans = {
        span.version
        for step in range(24)
        for group in run.train(step, 4)
        for sample in group.samples
        for span in sample.version_spans
    }
    assert 6 in spans <= {0, 2, 4, 6}
    assert run.told.events == cast.learner.events == []


def test_who_joins_takes_a_snapshot_and_is_in_the_group_from_the_next_publication_on(bench, wires: Wires):
    cast = Cast(bench(pushing("nccl")), 1)
    cast.learner.publish(2)
    cast.actors.append(cast.join("actor-1"))
    assert cast.versions == [2, 0]
    cast.learner.publish(4)
    assert cast.versions == [4, 4]
    assert cast.learner.has(cast.actors[1])
    assert wires.formed == [2, 3]


def test_a_snapshot_is_made_before_the_newest_is_too_old_to_generate_with(bench, wires: Wires):
    cast = Cast(bench(pushing("nccl", buffer={"max_staleness": 12})), 1)
    for version in range(2, 16, 2):
        cast.learner.publish(version)
    assert cast.learner.snapshots == [0, 6, 12]
    assert cast.versions == [14]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_laggard_is_named_and_left_out_and_back_once_it_answers(bench, wires: Wires, transport: str):
    cast = Cast(bench(pushing(transport)), 2)
    laggard = cast.actors[1]
    laggard.gate.clear()
    start_s = machine_s()
    cast.learner.publish(2)
    assert machine_s() - start_s < ANSWER_S + 3
    assert cast.versions == [2, 0]
    assert len(cast.learner.events) == 1
    assert (
        "actor-1 keeps its weights, and is left out until it answers again: version 2, it did not answer `"
        in cast.learner.events[0]
    )
    assert cast.learner.transport.metrics()["weights/stale_actors"] == 1
    start_s = machine_s()
    cast.learner.publish(4)
    assert machine_s() - start_s < ANSWER_S  # It is not waited for again.
    assert cast.learner.snapshots == [0, 2, 4]
    laggard.gate.set()
    cast.reach(laggard, 4)  # By the snapshot.
    wait_until(lambda: cast.learner.transport._owing["actor-1"].is_done(), "an answer")
    cast.learner.publish(6)
    assert cast.versions == [6, 6]
    assert "actor-1 answers again" in cast.learner.events[-1]


def test_with_nccl_an_actor_that_dies_while_weights_arrive_costs_the_others_a_snapshot_and_nothing_else(
    bench, wires: Wires
):
    run = bench(pushing("nccl"))
    cast = Cast(run, 3)
    cast.actors[1].dies_at = "update"
    cast.actors[1].may_die = lambda: all(cast.actors[number].engine.is_receiving for number in (0, 2))
    start_s = machine_s()
    cast.learner.publish(2)
    assert machine_s() - start_s < 6
    assert "actor-1 keeps its weights" in cast.learner.events[0]
    assert "the actor died" in cast.learner.events[0]
    wait_until(
        lambda: sum("waits for a snapshot" in event for event in run.told.events) == 2, "both have given up"
    )
    wait_until(lambda: all(version >= 0 for version in cast.versions), "weights again")
    run.board.get("release_actor", "actor-1")  # As the fleet does.
    cast.learner.publish(4)
    assert [cast.actors[0].engine.version, cast.actors[2].engine.version] == [4, 4]
    assert all(cast.learner.has(cast.actors[number]) for number in (0, 2))
    assert wires.formed == [4, 3]
    run.train(0, 4)


def test_with_nccl_an_actor_that_dies_while_the_group_forms_holds_up_nobody(bench, wires: Wires):
    run = bench(pushing("nccl", run={"timeout_s": 30.0}))
    cast = Cast(run, 3)
    cast.actors[1].dies_at = "init"
    cast.actors[1].may_die = lambda: bool(wires.formed)
    start_s = machine_s()
    cast.learner.publish(2)
    assert machine_s() - start_s < 6
    assert "the actor died" in cast.learner.events[0]
    run.train(0, 4)  # The others generate on.
    run.board.get("release_actor", "actor-1")  # As the fleet does.
    cast.learner.publish(4)
    assert [cast.actors[0].engine.version, cast.actors[2].engine.version] == [4, 4]
    assert all(cast.learner.has(cast.actors[number]) for number in (0, 2))
    assert wires.formed == [4, 3]


def test_with_nccl_one_that_never_answers_while_weights_arrive_is_named_after_the_timeout(
    bench, wires: Wires
):
    run = bench(pushing("nccl", run={"timeout_s": 3.0}))
    cast = Cast(run, 2)
    silent = threading.Event()
    update = cast.actors[1].engine.update_transfer

    def stuck(update_info: dict[str, Any]) -> None:
        silent.wait(60)
        update(update_info)

    cast.actors[1].engine.update_transfer = stuck
    cast.learner.publish(2)
    told = " ".join(cast.learner.events)
    assert "actor-1" in told
    assert "did not answer `update` within 3 s" in told
    cast.actors[1].engine.update_transfer = update
    silent.set()
    wait_until(lambda: all(answer.is_done() for answer in cast.learner.transport._owing.values()), "answers")
    wait_until(lambda: all(version >= 0 for version in cast.versions), "weights again")
    cast.learner.publish(4)
    assert cast.versions == [4, 4]


def test_with_ipc_an_actor_that_dies_while_weights_arrive_costs_the_others_nothing(bench, wires: Wires):
    cast = Cast(bench(pushing("ipc")), 3)
    cast.actors[1].dies_at = "update"
    cast.learner.publish(2)
    assert cast.versions == [2, 0, 2]
    assert all(cast.learner.has(cast.actors[number]) for number in (0, 2))
    assert "actor-1 keeps its weights" in cast.learner.events[0]


@pytest.mark.usefixtures("impatient")
def test_with_ipc_who_is_late_is_named_and_left_out_also_where_another_has_failed(bench, wires: Wires):
    cast = Cast(bench(pushing("ipc")), 3)
    cast.actors[1].dies_at = "start"
    use = cast.actors[2].engine.use_connection

    def use_and_stand_still(connection: Any) -> None:
        use(connection)
        cast.actors[2].gate.clear()  # From its next step on.

    cast.actors[2].engine.use_connection = use_and_stand_still
    cast.learner.publish(2)
    assert cast.versions == [2, 0, 0]
    assert cast.learner.has(cast.actors[0])
    named = {event.split()[0]: event for event in cast.learner.events}
    assert named.keys() == {"actor-1", "actor-2"}, cast.learner.events
    assert "the actor died" in named["actor-1"]
    assert "it did not answer `start` within" in named["actor-2"]
    assert cast.learner.transport.metrics()["weights/stale_actors"] == 2
    cast.actors[2].gate.set()


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_weights_that_arrive_damaged_are_not_generated_with(bench, wires: Wires, transport: str):
    run = bench(pushing(transport))
    cast = Cast(run, 2)
    model = cast.actors[1].engine.transfer.model
    load = model.load_weights

    def damaging(pairs: Any) -> None:
        load([(name, tensor + 1 if name == "1.weight" else tensor) for name, tensor in pairs])

    model.load_weights = damaging
    finish = cast.actors[0].engine.finish_transfer

    def slow_finish(version: int, probes: Any) -> int:
        time.sleep(0.3)  # The other has failed long before: it is waited for all the same.
        return finish(version, probes)

    cast.actors[0].engine.finish_transfer = slow_finish
    cast.learner.publish(2)
    assert cast.actors[0].engine.version == 2, (cast.learner.events, run.told.events)
    assert "arrived damaged: 1.weight" in cast.learner.events[0]
    # The newest there is; the next publication makes one.
    wait_until(lambda: cast.actors[1].engine.version == 0, "the snapshot")
    assert 2 not in cast.actors[1].engine.loaded


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_who_evaluates_is_not_disturbed_and_every_evaluation_is_of_its_version(
    bench, wires: Wires, transport: str
):
    run = bench(pushing(transport), eval_rows=rows(4))
    cast = Cast(run, 2)
    cast.learner.publish(2, evaluate=["held_out"])
    for version in range(4, 12, 2):
        cast.learner.publish(version)
    wait_until(lambda: run.evaluations, "the evaluation")
    assert [result.policy_version for result, _ in run.evaluations] == [2]
    cast.learner.publish(12)
    assert 2 in cast.learner.snapshots
    wait_until(lambda: min(cast.versions) >= 10, "newer weights")
    assert not any("left out" in event for event in cast.learner.events)  # To decline is not to fail.


def test_a_learner_that_starts_again_from_an_older_checkpoint_takes_the_actors_back_with_it(
    bench, wires: Wires
):
    run = bench(pushing("nccl"))
    cast = Cast(run, 2)
    for version in (2, 4):
        cast.learner.publish(version)
    run.board.get("forget_snapshots")
    cast.learner = Learner(run)
    cast.learner.publish(3)
    cast.learner.transport.flush()
    wait_until(lambda: cast.versions == [3, 3], "version 3")
    cast.learner.publish(5)
    assert cast.versions == [5, 5]


def test_ranks_that_do_not_send_make_the_whole_pass():
    seen: list[str] = []

    class Counted(Plain):
        def named_weights(
            self, bucket_bytes: int, *, adapters_alone: bool = False
        ) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().named_weights(bucket_bytes):
                seen.append(name)
                yield name, tensor

    policy = Counted()
    transport = load_transport(
        Sender(1, pushing("nccl"), ZeroSource(policy, 1), BoardClient(None, BOARD), Calls(1.0), list, print)
    )
    transport.publish(2, evaluate=["held_out"])
    assert seen == list(policy.copy())
    assert transport.metrics() == {}


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_the_pass_is_a_weight_source_as_vllm_defines_it(transport: str):
    import importlib

    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource

    from core.weights.transports.client import ActorsClient

    module = importlib.import_module(f"core.weights.transports.{transport}")
    policy = Plain()
    begun: list[str] = []
    source = getattr(module, f"{transport.capitalize()}Pass")(
        ZeroSource(policy, 100), lambda: begun.append("begun"), lambda name, tensor: begun.append(name)
    )
    assert isinstance(source, WeightSource)
    groups = [(names, [tuple(tensor.shape) for tensor in tensors]) for names, tensors in source.iter_groups()]
    assert (
        [name for names, _ in groups for name in names]
        == [meta.name for meta in source.metadata()]
        == begun[1:]
    )
    assert isinstance(ActorsClient(Calls(1.0), 1.0, ranks_each=1, coupled=True), VLLMWeightSyncClient)


def test_a_gather_that_fails_ends_the_learner_and_not_as_a_lost_actor(bench, wires: Wires):
    from core.errors import TrainingError

    cast = Cast(bench(pushing("ipc")), 1)

    def failing(bucket_bytes: int, *, adapters_alone: bool) -> Iterator[tuple[str, torch.Tensor]]:
        yield "0.weight", cast.learner.policy.module[0].weight.data
        raise RuntimeError("all-gather timed out")

    cast.learner.policy.named_weights = failing
    with pytest.raises(TrainingError, match="after 1 of 6 parameters"):
        cast.learner.publish(2)
    assert "all-gather timed out" in " ".join(cast.learner.events)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_the_symbols_of_vllm_that_a_transport_uses_are_there(transport: str):
    import importlib
    import operator

    for symbol in importlib.import_module(f"core.weights.transports.{transport}").VLLM_SYMBOLS:
        module, _, name = symbol.partition(":")
        assert operator.attrgetter(name)(importlib.import_module(module)), symbol
