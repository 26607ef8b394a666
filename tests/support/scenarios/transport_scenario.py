"""A process of tests/core/weights/test_push.py: a real vLLM engine takes weights by `nccl` or `ipc`.

python transport_scenario.py MODEL_DIR DIR ROAD, which writes DIR/report.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
os.environ["OMP_NUM_THREADS"] = "1"

import torch


class Rig:
    """A real engine, its receiver with a loop that generates, and a learner's transport; all in this
    process.
    """

    def __init__(self, model_dir: Path, road: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from actors.engine import Engine
        from actors.receiver import Receiver
        from core.config import ActorsConfig, ModelConfig
        from tests.support.in_process import Answer

        self.model_dir = model_dir
        config = ActorsConfig(slots=8, max_new_tokens=12, engine_memory=1 / 64)
        self.engine = Engine(ModelConfig(path=str(model_dir)), config, max_model_len=64, transport=road)
        self.told: list[str] = []
        self.confirmed: list[int] = []
        finish = self.engine.finish_transfer

        def noting(version: int, probes: Any) -> int:
            self.confirmed.append(finish(version, probes))
            return self.confirmed[-1]

        self.engine.finish_transfer = noting  # type: ignore[method-assign]
        callbacks: Any = {
            "may_start": lambda: "",
            "on_updated": lambda _: None,
            "beat": lambda: None,
            "tell": self.told.append,
        }
        self.receiver = Receiver(self.engine, 60.0, **callbacks)
        threads = ThreadPoolExecutor(4)

        class Method:
            @staticmethod
            def remote(*order: Any) -> Answer:
                return Answer(threads.submit(self.receiver.order, *order))

        self.receive = Method
        self.finished: dict[str, Any] = {}
        self.num_submitted = 0

    def submit(self, count: int) -> list[str]:
        ids = [f"request-{self.num_submitted + number}" for number in range(count)]
        self.num_submitted += count
        for request_id in ids:
            self.engine.submit(request_id, PROMPT)
        return ids

    def generate(self, ids: list[str]) -> list[Any]:
        while not all(request_id in self.finished for request_id in ids):
            self.receiver.poll()
            self.finished |= dict(self.engine.step())
        return [self.finished[request_id] for request_id in ids]

    def during(self, work: Any) -> Any:
        """`work` in a thread while the loop turns; requests under way go on between its orders."""
        from concurrent.futures import ThreadPoolExecutor

        working = ThreadPoolExecutor(1).submit(work)
        while not working.done():
            self.receiver.poll()
            if self.engine.num_unfinished:
                self.finished |= dict(self.engine.step())
        self.receiver.poll()
        return working.result()


PROMPT = (4, 13, 5, 14, 7)


def worst_difference(model: Any, samples: list[Any]) -> dict[str, float]:
    """Of the samples' log-probs to transformers'."""
    worst = 0.0
    for sample in samples:
        tokens = torch.tensor([[*PROMPT, *sample.tokens.numpy().tolist()]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0, len(PROMPT) - 1 : -1].float(), -1)
        expected = logprobs.gather(1, tokens[0, len(PROMPT) :, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(sample.logprobs.numpy())).abs().max()))
    return {"samples": len(samples), "worst": worst}


class Stage:
    """A rig, the learner's policy (`module`, `named_weights`) and its transport, and what was found so
    far.
    """

    def __init__(self, rig: Rig, model_dir: Path, road: str) -> None:
        from transformers import AutoModelForCausalLM

        from core.weights.board import ReceiverClient
        from tests.support.weights import Board

        self.road, self.rig = road, rig
        self.module = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.report: dict[str, Any] = {"versions": {}}
        board = Board()
        board.actors["actor-0"] = ReceiverClient(self.rig, "actor-0")
        self.transport = make_transport(self, board, road)

    def named_weights(self, bucket_bytes: int, *, adapters_alone: bool = False) -> Any:
        return ((name, parameter.data) for name, parameter in self.module.named_parameters())

    def retrain(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def publish(self, version: int, *, evaluate: tuple[str, ...] = ()) -> None:
        self.rig.during(lambda: self.transport.publish(version, evaluate=evaluate))

    def note(self, what: str) -> None:
        """The engine's version by now."""
        self.report["versions"][what] = self.rig.engine.version

    def judge_fresh(self, what: str) -> list[Any]:
        """Fresh samples, compared with the model."""
        fresh = self.rig.generate(self.rig.submit(16))
        self.report[what] = worst_difference(self.module, fresh)
        return fresh


def push(stage: Stage) -> None:
    """To an idle engine, then to one with requests under way."""
    rig = stage.rig
    stage.retrain(1)
    stage.publish(1)
    stage.note("pushed")
    pushed = stage.judge_fresh("pushed")

    in_flight = rig.submit(16)
    for _ in range(3):
        rig.finished |= dict(rig.engine.step())
    stage.retrain(2)
    stage.report["of the version before"] = worst_difference(stage.module, pushed)
    stage.publish(2)
    stage.note("in flight")
    rig.generate(in_flight)
    stage.judge_fresh("pushed in flight")
    stage.report["confirmed"] = list(rig.confirmed)


def break_off_before_weights_arrive(stage: Stage) -> None:
    """The engine goes on with those it has."""
    client, receiver = stage.transport.client, stage.rig.receiver
    client.begin({}, 3, {})
    stage.rig.during(
        lambda: [
            receiver.order(*order) for order in (("start", client.number), ("abort", client.number, "cut"))
        ]
    )
    stage.note("undone")
    stage.judge_fresh("undone")


def break_off_in_the_middle(stage: Stage) -> None:
    """The engine has none, until a snapshot comes."""
    engine = stage.rig.engine
    load = engine.update_transfer

    def broken(update_info: Any) -> None:
        if stage.road == "nccl":  # vLLM fails in the middle; with ipc, the actor after the first chunk.
            update_info["dtype_names"][-1] = "no_dtype"
        load(update_info)
        raise ConnectionError("cut")

    stage.retrain(3)
    engine.update_transfer = broken  # type: ignore[method-assign]
    stage.publish(3, evaluate=("held_out",))
    engine.update_transfer = load  # type: ignore[method-assign]
    stage.note("lost")
    stage.transport.flush()
    engine.load_weights(
        3, ((name, parameter.detach().clone()) for name, parameter in stage.module.named_parameters())
    )
    stage.note("snapshot")
    stage.judge_fresh("lost, then a snapshot")
    stage.transport._owing = {}


def damage(stage: Stage) -> None:
    """What arrived is not what was sent, by its checksums."""
    engine = stage.rig.engine
    confirm = engine.finish_transfer
    engine.finish_transfer = lambda version, probes: confirm(
        version, {**probes, "model.norm.weight": "other"}
    )  # type: ignore[method-assign]
    stage.publish(4)
    stage.report["damage"] = " ".join(stage.transport.client.failed.values())


def main(model_dir: Path, out_dir: Path, road: str) -> None:
    """Pushes to a real engine: idle, in flight, broken off before and after weights arrived, damaged."""
    from tests.support.cpu_transfer import on_cpu

    rig = Rig(model_dir, road)
    with on_cpu():
        stage = Stage(rig, model_dir, road)
        for part in (push, break_off_before_weights_arrive, break_off_in_the_middle, damage):
            part(stage)
    (out_dir / "report.json").write_text(json.dumps(stage.report))


def make_transport(policy: Any, board: Any, road: str) -> Any:
    from core.calls import Calls
    from core.weights.board import BOARD, BoardClient
    from core.weights.transports import Sender, load_transport
    from learner.policy.source import ZeroSource
    from tests.support.configs import pushing

    config = pushing(road, run={"timeout_s": 60.0}, buffer={"max_staleness": 100})
    return load_transport(
        Sender(
            0,
            config,
            ZeroSource(policy, 20_000),
            BoardClient(board, BOARD),
            Calls(60.0),
            lambda bucket: bucket.copy(),
            print,
        )
    )


if __name__ == "__main__":
    model, out, road = sys.argv[1:]
    main(Path(model), Path(out), road)
    # An order sent after the loop's last look has a thread that waits two minutes for its answer.
    os._exit(0)
