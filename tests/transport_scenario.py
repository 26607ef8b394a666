"""A process of tests/test_pushes.py: a real vLLM engine takes weights by `nccl` or `ipc`.

python transport_scenario.py MODEL_DIR DIR ROAD, which writes DIR/report.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch


class Rig:
    """A real engine, its receiver with a loop that generates, and a learner's transport; all in this process."""

    def __init__(self, model_dir: Path, road: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from actors.engine import Engine
        from actors.receiver import Receiver
        from cluster.config import ActorsConfig, ModelConfig
        from tests.in_process import Answer

        self.model_dir = model_dir
        config = ActorsConfig(slots=8, max_new_tokens=12, kv_cache_gib=1 / 64)
        self.engine = Engine(ModelConfig(path=str(model_dir)), config, max_model_len=64, transport=road)
        self.told: list[str] = []
        self.confirmed: list[int] = []
        finish = self.engine.finish_transfer

        def noting(version: int, probes: Any) -> int:
            self.confirmed.append(finish(version, probes))
            return self.confirmed[-1]

        self.engine.finish_transfer = noting  # type: ignore[method-assign]
        callbacks: Any = {"may_start": lambda: "", "on_updated": lambda _: None, "beat": lambda: None, "tell": self.told.append}
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
            self.receiver.look()
            self.finished |= dict(self.engine.step())
        return [self.finished[request_id] for request_id in ids]

    def during(self, work: Any) -> Any:
        """`work` in a thread while the loop turns; requests under way go on between its orders."""
        from concurrent.futures import ThreadPoolExecutor

        working = ThreadPoolExecutor(1).submit(work)
        while not working.done():
            self.receiver.look()
            if self.engine.num_unfinished:
                self.finished |= dict(self.engine.step())
        self.receiver.look()
        return working.result()


PROMPT = (4, 13, 5, 14, 7)


def worst_difference(model: Any, samples: list[Any]) -> dict[str, float]:
    """Of the samples' log-probs to transformers'."""
    worst = 0.0
    for sample in samples:
        tokens = torch.tensor([PROMPT + sample.token_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0, len(PROMPT) - 1 : -1].float(), -1)
        expected = logprobs.gather(1, tokens[0, len(PROMPT) :, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(sample.logprobs)).abs().max()))
    return {"samples": len(samples), "worst": worst}


def engine(model_dir: Path, out_dir: Path, road: str) -> None:
    """Pushes to a real engine: idle, in flight, broken off before and after weights arrived, damaged."""
    from transformers import AutoModelForCausalLM

    from tests.cpu_transfer import on_cpu
    from tests.test_transports import Board

    rig = Rig(model_dir, road)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    report: dict[str, Any] = {"versions": {}}

    class Policy:
        module = model

        def named_weights(self, bucket_bytes: int, *, adapters_alone: bool = False) -> Any:
            return ((name, parameter.data) for name, parameter in model.named_parameters())

    def retrain(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    with on_cpu():
        board = Board()
        board.actors["actor-0"] = rig
        transport = make_transport(Policy(), board, road)
        retrain(1)
        rig.during(lambda: transport.publish(1, evaluate=False))
        report["versions"]["pushed"] = rig.engine.version
        pushed = rig.generate(rig.submit(16))
        report["pushed"] = worst_difference(model, pushed)

        in_flight = rig.submit(16)
        for _ in range(3):
            rig.finished |= dict(rig.engine.step())
        retrain(2)
        report["of the version before"] = worst_difference(model, pushed)
        rig.during(lambda: transport.publish(2, evaluate=False))
        report["versions"]["in flight"] = rig.engine.version
        rig.generate(in_flight)
        report["pushed in flight"] = worst_difference(model, rig.generate(rig.submit(16)))
        report["confirmed"] = list(rig.confirmed)

        client = transport.client
        client.begin({}, 3, {})
        rig.during(lambda: [rig.receiver.order(*order) for order in (("start", client.number), ("abort", client.number, "cut"))])
        report["versions"]["undone"] = rig.engine.version
        report["undone"] = worst_difference(model, rig.generate(rig.submit(16)))

        load = rig.engine.update_transfer

        def broken(update_info: Any) -> None:
            if road == "nccl":  # vLLM fails in the middle; with ipc, the actor after the first chunk.
                update_info["dtype_names"][-1] = "no_dtype"
            load(update_info)
            raise ConnectionError("cut")

        retrain(3)
        rig.engine.update_transfer = broken  # type: ignore[method-assign]
        rig.during(lambda: transport.publish(3, evaluate=True))
        rig.engine.update_transfer = load  # type: ignore[method-assign]
        report["versions"]["lost"] = rig.engine.version
        transport.flush()
        rig.engine.load_weights(3, ((name, parameter.detach().clone()) for name, parameter in model.named_parameters()))
        report["versions"]["snapshot"] = rig.engine.version
        report["lost, then a snapshot"] = worst_difference(model, rig.generate(rig.submit(16)))
        transport._owing = {}

        confirm = rig.engine.finish_transfer
        rig.engine.finish_transfer = lambda version, probes: confirm(version, {**probes, "model.norm.weight": "other"})  # type: ignore[method-assign]
        rig.during(lambda: transport.publish(4, evaluate=False))
        report["damage"] = " ".join(client.failed.values())
    (out_dir / "report.json").write_text(json.dumps(report))


def make_transport(policy: Any, board: Any, road: str) -> Any:
    from cluster.peers import Calls
    from cluster.transports import Sender, ZeroSource, load_transport
    from tests.test_pushes import pushing

    config = pushing(road, run={"timeout_s": 60.0}, buffer={"max_staleness": 100})
    return load_transport(Sender(0, config, ZeroSource(policy, 20_000), board, Calls(60.0), lambda bucket: bucket.copy(), print))


if __name__ == "__main__":
    model, out, road = sys.argv[1:]
    engine(Path(model), Path(out), road)
    # An order sent after the loop's last look has a thread that waits two minutes for its answer.
    os._exit(0)
