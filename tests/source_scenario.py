"""One of two ranks of tests/test_transports.py: what a ZeRO-3 source yields, and a snapshot of it. Writes DIR/report-RANK.json."""

import json
import time
from pathlib import Path
from typing import Any

import torch

BUCKET_BYTES = 1_500_000
STORE_S = 0.2


def main(model_dir: Path, out_dir: Path, rank: int) -> None:
    """What the source declares, yields, and holds at a time; against the model's files."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from safetensors.torch import load_file

    from cluster.config_file import parse_config
    from cluster.peers import Calls
    from cluster.transports import Sender, ZeroSource, load_transport
    from learner.zero import ZeroPolicy, init_process_group
    from tests.test_transports import Board
    from tests.zero_scenario import meet

    torch.set_num_threads(1)
    tree: dict[str, Any] = {"model": {"path": str(model_dir)}, "data": {"path": "none"}, "learner": {"ranks": 2}}
    config = parse_config(tree | {"rewards": {"functions": [{"name": "exact_match"}]}, "weights": {"bucket_mib": BUCKET_BYTES / 2**20}})
    init_process_group(rank, 2, "127.0.0.1", meet(out_dir, rank), use_gpu=False, timeout_s=60)
    policy = ZeroPolicy(config.model, config.learner)
    weights = ZeroSource(policy, BUCKET_BYTES)
    expected = load_file(model_dir / "model.safetensors")
    parameters = dict(policy.module.named_parameters())

    def gathered() -> int:
        # Parameters below ZeRO-3's threshold stay gathered after their first use: they are not the source's.
        held = [p for p in parameters.values() if p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist]
        return sum(p.ds_numel * p.element_size() for p in held)

    declared = [(name, str(dtype), list(shape)) for name, dtype, shape in weights.metadata()]
    report: dict[str, Any] = {"declared": declared, "gathered for metadata": gathered(), "wrong": [], "yielded": [], "peak bytes": 0}
    for name, tensor in weights:
        report["yielded"].append((name, str(tensor.dtype), list(tensor.shape)))
        report["peak bytes"] = max(report["peak bytes"], gathered())
        if not torch.equal(tensor, expected[name]):
            report["wrong"].append(name)
    report["of the model"] = [(name, str(expected[name].dtype), list(expected[name].shape)) for name in parameters]
    report["bound bytes"], report["model bytes"] = weights.largest_bytes, sum(tensor.nbytes for tensor in expected.values())

    def slow_store(bucket: Any) -> Any:
        time.sleep(STORE_S)
        return bucket.copy()

    board = Board()
    transport = load_transport(Sender(rank, config, weights, board, Calls(60), slow_store, print))
    start_s = time.perf_counter()
    transport.publish(1, evaluate=False)
    report["stall_s"] = time.perf_counter() - start_s
    for parameter in parameters.values():
        parameter.ds_tensor.zero_()  # As a step changes them: in place.
    for parameter in parameters.values():
        if parameter.ds_persist:
            parameter.partition()
    report["changed since"] = all(bool((tensor == 0).all()) for _, tensor in weights)
    transport.flush()
    if rank == 0:
        published = board.published[1]
        report["store_s"] = transport.metrics()["weights/store_s"]
        report["snapshot wrong"] = [name for name in expected if not torch.equal(published[name], expected[name])]
    (out_dir / f"report-{rank}.json").write_text(json.dumps(report))
