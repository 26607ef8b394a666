"""The actors' side of tests/system/test_families.py, in a process of its own: `python -m
tests.support.scenarios.families_scenario DIR NAME...`.

Of each family, engines on DIR/NAME/base and on DIR/NAME/policy sample; the first also with policy's weights,
as a snapshot brings them. DIR/NAME/served.json: {"base" | "updated" | "served": [[prompt, tokens, log-probs],
...]}, or {"error": ...}, with which the process ends, since vLLM's state is then whatever it is.
DIR/architectures.json: what vLLM knows.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = ((4, 13, 5, 14), (3, 4, 13, 6, 7, 14), (12, 13, 11, 14))
NEW_TOKENS = 12


def main(root: Path, names: list[str]) -> None:
    from actors.engine_settings import set_engine_environment

    actors = actors_config()
    set_engine_environment(actors)
    import torch
    from safetensors.torch import load_file
    from vllm.model_executor.models import registry

    torch.set_num_threads(1)
    # vLLM would look at each class in a process of its own, ten seconds each; here they are imported anyway.
    registry._LazyRegisteredModel.inspect_model_cls = lambda lazy: registry._ModelInfo.from_model_cls(
        lazy.load_model_cls()
    )
    (root / "architectures.json").write_text(json.dumps(sorted(registry.ModelRegistry.get_supported_archs())))
    for name in names:
        found: dict[str, Any] = {}
        try:
            engine = engine_on(root / name / "base")
            found["base"] = sampled(engine)
            engine.load_weights(1, list(load_file(root / name / "policy" / "model.safetensors").items()))
            found["updated"] = sampled(engine)
            del engine
            gc.collect()
            found["served"] = sampled(engine_on(root / name / "policy"))
            gc.collect()
        except Exception as error:  # noqa: BLE001 -- the edge of a process: it is what the test reads
            found["error"] = f"{type(error).__name__}: {str(error)[:600]}"
        (root / name / "served.tmp").write_text(json.dumps(found))
        (root / name / "served.tmp").rename(root / name / "served.json")
        print(name, found.get("error", "served"), flush=True)
        if "error" in found:
            return


def actors_config() -> Any:
    from core.config import ActorsConfig

    return ActorsConfig(slots=8, max_new_tokens=NEW_TOKENS, engine_memory=1 / 16, num_cpus=1)


def engine_on(path: Path) -> Any:
    from actors.engine import Engine
    from core.config import ModelConfig

    return Engine(ModelConfig(path=str(path)), actors_config(), max_model_len=32)


def sampled(engine: Any) -> list[Any]:
    """[prompt, tokens, log-probs] of two samples a prompt."""
    requests = {
        f"{number}-{seed}-{engine.version}": (prompt, seed)
        for number, prompt in enumerate(PROMPTS)
        for seed in range(2)
    }
    for request_id, (prompt, seed) in requests.items():
        engine.submit(request_id, prompt, seed=seed)
    samples = []
    while engine.num_unfinished:
        samples += engine.step()
    return [
        [list(requests[request_id][0]), sample.tokens.numpy().tolist(), sample.logprobs.numpy().tolist()]
        for request_id, sample in samples
    ]


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main(Path(sys.argv[1]), sys.argv[2:])
