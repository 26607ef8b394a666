"""One rank of tests/learner/policy/test_lora.py, which trains adapters for some steps; rank 0 writes what it
found to DIR/found.pt, and DIR/policy/.
"""

import json
from pathlib import Path
from typing import Any

import torch

SEED = 3
STEPS = 4
BUCKET_BYTES = 20_000


def main(out_dir: Path, rank: int) -> None:
    from learner.catalogue import parse_config
    from learner.objectives import load_objective
    from learner.policy.source import ZeroSource
    from learner.policy.zero import ZeroFrozen, ZeroPolicy, init_process_group
    from learner.policy.zero_adapters import ZeroAdapters
    from learner.step.frozen import frozen_names
    from learner.step.share import Share
    from learner.step.update import Updater
    from tests.support.configs import LR
    from tests.support.learning.updates import random_batches
    from tests.support.scenarios.zero_scenario import meet, partition_everything

    torch.set_num_threads(1)
    config = parse_config(json.loads((out_dir / "config.json").read_text()))
    if config.learner.ranks > 1:
        partition_everything()
    device = init_process_group(
        rank, config.learner.ranks, "127.0.0.1", meet(out_dir, rank), use_gpu=False, timeout_s=120
    )
    torch.manual_seed(100 + rank)  # The adapters are equal on all ranks all the same.
    policy = ZeroPolicy(config.model, config.learner, SEED)
    source = ZeroSource(policy, BUCKET_BYTES)
    found: dict[str, Any] = {
        "metadata": [(each.name, each.shape) for each in source.metadata()],
        "base": whole(source),
    }
    objective = load_objective(config.objective)
    frozen = {name: ZeroAdapters(policy) for name in frozen_names(objective)}
    updater = Updater(config, policy, objective, frozen, pad_id=0, device=device)
    batches = random_batches(policy.module.config.vocab_size)[:STEPS]
    found["metrics"] = [updater.update(Share.of(batch), LR).metrics() for batch in batches]
    found["adapters"] = adapters_of(policy)
    found["published"] = whole(source)
    found["reference"] = of_frozen(ZeroAdapters(policy), batches, config.learner.layout)
    found["frozen"] = of_frozen(ZeroFrozen(config.model, config.learner), batches, config.learner.layout)
    found["again"] = adapters_of(policy)
    if config.learner.ranks > 1:
        assert not any(parameter.numel() for parameter in policy.module.parameters()), (
            "not everything is partitioned between the steps"
        )
    policy.save_pretrained(str(out_dir / "policy"), BUCKET_BYTES)
    found["parts"] = sum(part.values.numel() for part in policy.parts())
    if rank == 0:
        torch.save(found, out_dir / "found.pt")


def whole(source: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in source}


def adapters_of(policy: Any) -> dict[str, torch.Tensor]:
    """What is trained, whole."""
    import deepspeed

    trained = {
        name: parameter for name, parameter in policy.module.named_parameters() if parameter.requires_grad
    }
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().clone() for name, parameter in trained.items()}


def of_frozen(frozen: Any, batches: list[Any], layout: Any) -> torch.Tensor:
    """Log-probs of the first batch's tokens."""
    from learner.step.packing import collate
    from learner.step.samples import sequences_of

    samples = [sample for group in batches[0].groups for sample in group.samples]
    sequences = [segment for sample in samples for segment in sequences_of(sample)]
    values: torch.Tensor = frozen.logprobs(collate(sequences, layout, 0, torch.device("cpu")), 1.0)
    return values
