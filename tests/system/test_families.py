"""Every family of models that transformers and vLLM share: what actors sample is what the learner computes,
before and after an update, and the exported policy is the trained one. Or the family is refused before
anything starts.

Slow tests take a sample; `make test-families` all of them, and writes docs/models.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cluster.preparation.model_checks import check_model
from core.errors import ConfigError
from learner.checkpoints import export
from learner.policy.function_check import check_function
from learner.policy.lora import persistent_buffers
from learner.policy.zero import _still
from learner.step.packing import TokenLogprobs, TokenSequence, collate
from tests.support import ROOT
from tests.support.configs import make_config
from tests.support.learning.saved import save_checkpoint
from tests.support.learning.tiny_families import FAMILIES, NOT_TRIED, VARIANTS, make_family, stir
from tests.support.scenarios.families_scenario import NEW_TOKENS

MAX_PROMPT_TOKENS = 8
TOLERANCE = 1e-4
"""Nats a token, on average, in float32."""
SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"learner.layout": "padded"},
    {"learner.layout": "padded", "model.attention": "eager"},
)
"""What the learner's own messages recommend, in this order."""


class Prepared(NamedTuple):
    """A family before its engines start. `reason`: of its refusal; with `settings` the learner takes it."""

    name: str
    reason: str = ""
    settings: dict[str, str] = {}  # noqa: RUF012


class Found(NamedTuple):
    """Differences of log-probs, in nats a token on average: of the base, after an update, and of the
    exported policy served.
    """

    base: float
    updated: float
    served: float


def prepare(name: str, root: Path) -> Prepared:
    """Make the family's base and a trained policy of it, exported; refused where a start would refuse it."""
    base = make_family(name, root / name / "base")
    reason = ""
    for settings in SETTINGS:
        try:
            learner(base, settings)
        except ConfigError as error:
            reason = reason or str(error)
            continue
        model = load(base)
        torch.manual_seed(7)
        stir(model, 0.05)
        save_checkpoint(root / name / "run", model, base)
        export.export(root / name / "run", None, root / name / "policy")
        compare_files(root / name, model)
        return Prepared(name, "", settings)
    return Prepared(name, reason)


def learner(base: Path, settings: dict[str, str]) -> Any:
    """`logprobs(sequences)` by the learner's own way, with what a start checks; raises ConfigError as a
    start does.
    """
    attention, layout = settings.get("model.attention", "sdpa"), settings.get("learner.layout", "packed")
    check_model(
        make_config(
            {
                "model": {"path": str(base), "attention": attention},
                "data": {"max_prompt_tokens": MAX_PROMPT_TOKENS},
                "actors": {"max_new_tokens": NEW_TOKENS},
                "learner": {"layout": layout},
            }
        )
    )
    module = load(base, attn_implementation=attention)
    module.config.use_cache = False
    _still(module)
    token_logprobs = TokenLogprobs(module, layout, attention)

    def at(inputs: Any, *, training: bool) -> torch.Tensor:
        module.train(training)
        return token_logprobs(module, inputs, 1.0)

    with torch.no_grad():
        check_function(at, module, layout, longest=MAX_PROMPT_TOKENS + NEW_TOKENS)
    return lambda sequences: at(collate(sequences, layout, 0, torch.device("cpu")), training=False)


def compare_files(directory: Path, model: Any) -> None:
    """The exported directory has the names of the base's, and comes back as the model, buffers too, to
    the last bit.
    """
    from safetensors import safe_open

    names = []
    for part in ("base", "policy"):
        with safe_open(directory / part / "model.safetensors", framework="pt") as file:
            names.append({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118 -- no dict
    assert names[0] == names[1]
    again = load(directory / "policy")
    expected = {**dict(model.named_parameters()), **dict(persistent_buffers(model))}
    found = {**dict(again.named_parameters()), **dict(persistent_buffers(again))}
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


def serve(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Let engines sample for all of them, in as few processes as that takes; the errors."""
    errors: dict[str, str] = {}
    left = list(names)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while left:
        command = [sys.executable, "-m", "tests.support.scenarios.families_scenario", str(root), *left]
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
        )
        done = [name for name in left if (root / name / "served.json").exists()]
        if len(done) == 0 or (len(done) < len(left) and ended.returncode):
            # The process died of the first that has no result: an assertion in C++, for example.
            crashed = next(name for name in left if name not in done)
            errors[crashed] = (
                f"the process ended with {ended.returncode}: {ended.stderr.strip().splitlines()[-1:]}"
            )
            done.append(crashed)
        left = [name for name in left if name not in done]
    for name in names:
        if name not in errors and "error" in (found := json.loads((root / name / "served.json").read_text())):
            errors[name] = found["error"]
    return errors


@torch.no_grad()
def compare(root: Path, prepared: Prepared) -> Found:
    """What the engines sampled against the learner, sequences of unlike lengths together."""
    served = json.loads((root / prepared.name / "served.json").read_text())

    def difference(part: str, directory: str) -> float:
        logprobs = learner(root / prepared.name / directory, prepared.settings)
        sequences = [
            TokenSequence.of_turn(tuple(prompt), tuple(tokens)) for prompt, tokens, _ in served[part]
        ]
        expected = torch.tensor([value for _, _, values in served[part] for value in values])
        return float((logprobs(sequences) - expected).abs().mean())

    return Found(difference("base", "base"), difference("updated", "policy"), difference("served", "policy"))


SAMPLE = (
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gemma4_text",
    "gpt2",
    "phi3",
    "gemma3_text",
    "glm4_moe",
    "llama rope yarn",
    "llama padded vocabulary",
)
"""One of each kind of trouble: renamed and fused experts, a shared expert, latent attention, persistent
buffers, transposed matrices, fused projections, windows, a corrected router, another rope, and an embedding
larger than the tokenizer.
"""


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Prepared], dict[str, str]]:
    root = tmp_path_factory.mktemp("families")
    prepared = {name: prepare(name, root) for name in SAMPLE}
    for part in ("base", "policy"):
        make_family("gpt_oss", root / "gpt_oss" / part)
    return (
        root,
        prepared,
        serve(root, [*(name for name, each in prepared.items() if not each.reason), "gpt_oss"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_actors_and_learner_compute_one_function(
    name: str, examined: tuple[Path, dict[str, Prepared], dict[str, str]]
) -> None:
    root, prepared, errors = examined
    assert not prepared[name].reason
    assert name not in errors, errors.get(name)
    assert max(compare(root, prepared[name])) < TOLERANCE


@pytest.mark.slow
def test_parameters_that_vllm_says_it_loaded_but_kept_are_missing(
    examined: tuple[Path, dict[str, Prepared], dict[str, str]],
) -> None:
    """Its loader of gpt-oss copies experts past the reload: samples would be those of new weights with
    old experts.
    """
    _, _, errors = examined
    assert re.search(
        r"SnapshotError: weights of version 1 lack \d+ parameters of the model: "
        r".*\.experts\.",
        errors["gpt_oss"],
    )


@pytest.mark.slow
def test_every_family_that_both_libraries_have_is_in_the_table(
    examined: tuple[Path, dict[str, Prepared], dict[str, str]],
) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as OURS

    root, _, _ = examined
    theirs = set(json.loads((root / "architectures.json").read_text()))
    shared = {name for name, kind in OURS.items() if (kind if isinstance(kind, str) else kind[0]) in theirs}
    assert shared - FAMILIES.keys() == set(NOT_TRIED)


def test_the_table_in_the_docs_is_of_these_families_and_nothing_in_it_is_wrong() -> None:
    rows = [
        line.split(" | ")
        for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [*FAMILIES, *VARIANTS]
    assert all(row[1] == "exact" or row[1].startswith("refused: ") for row in rows)


# --- all of them: `make test-families` ---

HEAD = """# Model families

Written by `make test-families`, from tiny random models in float32 on a CPU with the pinned transformers and vLLM. "exact": what vLLM
samples from the base, after a weight update, and from the exported policy has the log-probs that the learner computes, to 1e-4 nats a
token on average, and the exported policy has the names of the base's files and comes back bit for bit. "refused": at the start.
What is not listed here is found out on a run's first fresh samples (`mismatch/*`).

| family (`model_type`) or variant | result | set |
|---|---|---|
"""


def examine(names: Sequence[str], root: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """name -> ("exact", settings), ("refused: ...", {}), or what is wrong."""
    table: dict[str, tuple[str, dict[str, str]]] = {}
    ready: dict[str, Prepared] = {}
    for name in names:
        try:
            ready[name] = prepare(name, root)
        except Exception as error:  # noqa: BLE001 -- told in the table
            table[name] = f"WRONG: not prepared: {type(error).__name__}: {_one_line(error)}", {}
            continue
        if ready[name].reason:
            table[name] = f"refused: {_without_path(ready[name].reason)}", {}
    taken = [name for name in ready if name not in table]
    errors = serve(root, taken)
    for name in taken:
        if name in errors:
            table[name] = f"WRONG: vLLM: {errors[name]}", {}
            continue
        found = compare(root, ready[name])
        differs = " ".join(f"{part} {value:.1e}" for part, value in found._asdict().items())
        table[name] = ("exact" if max(found) < TOLERANCE else f"WRONG: {differs}"), ready[name].settings
    return {name: table[name] for name in names}


def _without_path(reason: str) -> str:
    """A refusal without the words that name the tiny model."""
    return re.sub(r"^model\.path = .*? \(\w+\):? ", "", reason)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main() -> int:
    """Examine the families named on the command line, or all of them, for which docs/models.md is written."""
    names = sys.argv[1:] or [*FAMILIES, *VARIANTS]
    with tempfile.TemporaryDirectory(prefix="agro-families-") as directory:
        table = examine(names, Path(directory))
    rows = [
        f"| {name} | {result} | {' '.join(f'`{key}={value}`' for key, value in settings.items())} |"
        for name, (result, settings) in table.items()
    ]
    sys.stdout.write("\n".join(rows) + "\n")
    if not sys.argv[1:]:
        (ROOT / "docs" / "models.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return int(any(result.startswith("WRONG") for result, _ in table.values()))


if __name__ == "__main__":
    sys.exit(main())
