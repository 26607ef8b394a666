"""The tests' environment, set before anything else is imported, and models made on the spot."""

import os
import re
import signal

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    # As in the processes of a run; more threads than cores stand in each other's way.
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("WANDB_MODE", "offline")
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # Under nohup. What is ignored, the processes that tests start would ignore too; a handler is theirs no
    # longer.
    signal.signal(signal.SIGHUP, lambda number, frame: None)

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine takes long for any example, and what fails is to fail in every run, not in one of a hundred.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that never names a marker which `-m` requires has no test for it: it is not imported, which
    takes 25 s of CPU time for all of them.
    """
    terms = re.split(r"\s+and\s+", config.option.markexpr)
    required = [term for term in terms if re.fullmatch(r"\w+", term)]
    if not required or not all(re.fullmatch(r"(not )?\w+", term) for term in terms):
        return None
    if not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text()
    return True if any(f"mark.{name}" not in text for name in required) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines, ranks or clusters come first: the worker that had one of them last would be
    waited for.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face directories of a random two-layer Llama over the arithmetic characters: "tied" and
    "untied" embeddings.

    Weights of standard deviation 0.2 make the next token's distribution uneven, with `<eos>` now and then.
    """
    import torch

    from recipes.arithmetic import make_llama, make_tokenizer

    tokenizer = make_tokenizer()
    directories = {}
    for name in ("tied", "untied"):
        model = make_llama(len(tokenizer), tied=name == "tied", hidden=64, layers=2)
        model.config.max_position_embeddings = 512
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.2)
        directories[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(directories[name])
        tokenizer.save_pretrained(directories[name])
    return directories
