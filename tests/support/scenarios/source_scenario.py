"""One of two ranks of tests/core/weights/test_transports.py: what a ZeRO-3 source yields, and a snapshot of
it. Writes DIR/report-RANK.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

BUCKET_BYTES = 1_500_000
STORE_S = 0.2


def main(model_dir: Path, families_dir: Path, out_dir: Path, rank: int) -> None:
    """What the source declares, yields, and holds at a time; against the model's files. Then the same
    of mixtures of experts.
    """
    from safetensors.torch import load_file

    from learner.policy.source import ZeroSource
    from learner.policy.zero import ZeroPolicy, init_process_group
    from tests.support.configs import make_config
    from tests.support.scenarios.zero_scenario import meet

    torch.set_num_threads(1)
    config = make_config(model={"path": str(model_dir)}, learner={"ranks": 2})
    init_process_group(rank, 2, "127.0.0.1", meet(out_dir, rank), use_gpu=False, timeout_s=60)
    policy = ZeroPolicy(config.model, config.learner)
    weights = ZeroSource(policy, BUCKET_BYTES)
    expected = load_file(model_dir / "model.safetensors")
    report = yields(policy, weights, expected) | snapshot(config, policy, weights, expected, rank)
    report["mixtures"] = {
        "deepseek_v3": mixture(families_dir / "deepseek_v3"),
        "mixtral": mixture(families_dir / "mixtral", lora_rank=2),
    }
    (out_dir / f"report-{rank}.json").write_text(json.dumps(report))


def yields(policy: Any, weights: Any, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the source declares and yields, and how much of the model is gathered meanwhile."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = dict(policy.module.named_parameters())

    def gathered() -> int:
        # Parameters below ZeRO-3's threshold stay gathered after their first use: they are not the source's.
        held = [
            p for p in parameters.values() if p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist
        ]
        return sum(p.ds_numel * p.element_size() for p in held)

    report: dict[str, Any] = {
        "declared": [(name, str(dtype), list(shape)) for name, dtype, shape in weights.metadata()],
        "gathered for metadata": gathered(),
        "wrong": [],
        "yielded": [],
        "peak bytes": 0,
    }
    for name, tensor in weights:
        report["yielded"].append((name, str(tensor.dtype), list(tensor.shape)))
        report["peak bytes"] = max(report["peak bytes"], gathered())
        if not torch.equal(tensor, expected[name]):
            report["wrong"].append(name)
    report["of the model"] = [
        (name, str(expected[name].dtype), list(expected[name].shape)) for name in parameters
    ]
    report["bound bytes"] = weights.largest_bytes
    report["model bytes"] = sum(tensor.nbytes for tensor in expected.values())
    return report


def snapshot(
    config: Any, policy: Any, weights: Any, expected: dict[str, torch.Tensor], rank: int
) -> dict[str, Any]:
    """A snapshot in the background, while the policy changes as a step changes it."""
    from core.calls import Calls
    from core.weights.board import BOARD, BoardClient
    from core.weights.transports import Sender, load_transport
    from tests.support.weights import Board

    def slow_store(bucket: Any) -> Any:
        time.sleep(STORE_S)
        return bucket.copy()

    board, report = Board(), {}
    sender = Sender(rank, config, weights, BoardClient(board, BOARD), Calls(60), slow_store, print)
    transport = load_transport(sender)
    start_s = time.perf_counter()
    transport.publish(1, evaluate=())
    report["stall_s"] = time.perf_counter() - start_s
    parameters = list(policy.module.parameters())
    for parameter in parameters:
        parameter.ds_tensor.zero_()  # As a step changes them: in place.
    for parameter in parameters:
        if parameter.ds_persist:
            parameter.partition()
    report["changed since"] = all(bool((tensor == 0).all()) for _, tensor in weights)
    transport.flush()
    if rank == 0:
        published = board.published[1]
        report["store_s"] = transport.metrics()["weights/store_s"]
        report["snapshot wrong"] = [
            name for name in expected if not torch.equal(published[name], expected[name])
        ]
    return report


def mixture(model_dir: Path, **learner: Any) -> dict[str, list[str]]:
    """Names in which the source of a policy just loaded differs from its files; and in which one does
    that was restored from its parts.
    """
    import torch.distributed as dist
    from safetensors.torch import load_file

    from core.config import LearnerConfig, ModelConfig
    from learner.policy.lora import persistent_buffers
    from learner.policy.source import ZeroSource
    from learner.policy.zero import ZeroPolicy

    policy = ZeroPolicy(ModelConfig(path=str(model_dir)), LearnerConfig(ranks=2, **learner))
    source, expected = ZeroSource(policy, 20_000), load_file(model_dir / "model.safetensors")

    def wrong() -> list[str]:
        found = {name: tensor.clone() for name, tensor in source}
        assert [(name, tuple(tensor.shape)) for name, tensor in found.items()] == [
            (each.name, each.shape) for each in source.metadata()
        ]
        odd = found.keys() ^ expected.keys()
        return sorted(
            odd
            | {name for name in found if name in expected and not torch.equal(found[name], expected[name])}
        )

    report = {"loaded": wrong()}
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, {part.key: part.values.clone() for part in policy.parts()})
    for _, buffer in persistent_buffers(policy.module):
        buffer.zero_()
    policy.restore(
        lambda key, start, stop: torch.cat([part[key] for part in parts])[start:stop], adam_steps=0
    )
    return report | {"restored": wrong()}
