"""Adapters that reach the actors alone: vLLM samples from what the learner computes, and exchanges them
while generations go on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config.checks import SERVED_RANKS, served_rank
from core.errors import ConfigError
from core.records import Sample
from learner.catalogue import parse_config
from learner.policy.lora import adapters_of, weights_of
from tests.support.configs import lora_config
from tests.support.scenarios.adapters_scenario import PROMPT, SLOTS, Report, adapted_model
from tests.support.scenarios.reported import reports_of

TOLERANCE_NATS = 1e-4


class Observed:
    """A scenario's report, and the learner's own model to compare it with."""

    def __init__(self, model_dir: Path, report: Report) -> None:
        self.report = report
        self._models: dict[int, Any] = {version: adapted_model(model_dir, version) for version in (1, 2)}

    @torch.no_grad()
    def errors_nats(self, sample: Sample, version: int) -> torch.Tensor:
        """|engine - learner| of every token, with the adapters of `version`."""
        ids = torch.tensor([PROMPT + sample.token_ids])
        logprobs = self._models[version](ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        return (logprobs.gather(1, ids[0, len(PROMPT) :, None])[:, 0] - torch.tensor(sample.logprobs)).abs()

    def worst_nats(self, phase: str, version: int) -> float:
        return max(float(self.errors_nats(sample, version).max()) for sample in self.report.phases[phase])


@pytest.fixture(scope="module")
def both(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Observed]:
    model_dir, out = tiny_models["tied"], tmp_path_factory.mktemp("adapters")
    runs = [(model_dir, out / f"{parallel}.json", parallel) for parallel in (1, 2)]
    return [Observed(model_dir, report) for report in reports_of("adapters_scenario", Report, runs)]


@pytest.fixture(scope="module", params=[0, 1], ids=["in its process", "divided among two"])
def observed(request: pytest.FixtureRequest, both: list[Observed]) -> Observed:
    return both[request.param]


@pytest.mark.slow
def test_vllm_samples_from_the_learners_policy_and_says_which(observed: Observed) -> None:
    for phase, version in (("first", 1), ("second", 2)):
        samples = observed.report.phases[phase]
        assert len(samples) == 2 * SLOTS
        assert {span.version for sample in samples for span in sample.version_spans} == {version}
        assert observed.worst_nats(phase, version) < TOLERANCE_NATS
        assert observed.worst_nats(phase, 3 - version) > 0.1, (
            "the versions must differ, or this shows nothing"
        )


@pytest.mark.slow
def test_adapters_are_exchanged_under_generations_that_go_on(observed: Observed) -> None:
    samples = observed.report.phases["in flight"]
    crossing = [sample for sample in samples if len(sample.version_spans) == 2]
    assert crossing
    for sample in crossing:
        before, after = sample.version_spans
        assert (before.version, after.version) == (1, 2)
        assert observed.errors_nats(sample, 1)[: before.end].max() < TOLERANCE_NATS
    assert (
        max(
            float(observed.errors_nats(sample, 1)[sample.version_spans[0].end :].max()) for sample in crossing
        )
        > 0.1
    )
    later = [sample for sample in samples if sample.version_spans[0].version == 2]
    assert later
    assert max(float(observed.errors_nats(sample, 2).max()) for sample in later) < TOLERANCE_NATS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a layer of no known kind", "vLLM does not take the adapters of version 3"),
        (
            "layers by another name",
            r"vLLM does not apply \d+ adapters of version 3: "
            r".*language_model.layers.0",
        ),
        ("an A without its B", "vLLM does not take the adapters of version 3"),
    ],
)
def test_adapters_that_vllm_would_not_apply_are_never_sampled_with(
    observed: Observed, what: str, said: str
) -> None:
    assert re.match(said, observed.report.refused[what])
    assert observed.report.version == 2


@pytest.mark.slow
def test_vllm_has_buffers_for_the_ranks_that_the_config_knows(observed: Observed) -> None:
    assert observed.report.ranks == SERVED_RANKS
    assert [served_rank(rank) for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]


@pytest.mark.slow
def test_vllm_makes_room_for_adapters_of_linear_layers_alone(observed: Observed) -> None:
    """With adapters of the LM head it takes no vocabulary above 258,048."""
    kinds = {name.rpartition(".")[2] for name in observed.report.layers}
    assert kinds == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}  # As vLLM packs them.


@pytest.mark.slow
def test_a_snapshot_holds_nothing_else(observed: Observed) -> None:
    model = observed._models[1]
    sizes = [
        sum(weight.value().nbytes for weight in weights)
        for weights in (adapters_of(model), weights_of(model))
    ]
    assert sizes[0] <= observed.report.num_bytes < sizes[0] + 1000 < sizes[1] / 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learner": {"lora_rank": 0}}, "weights.transport = adapters needs learner.lora_rank from 1 to 512"),
        (
            {"learner": {"lora_rank": 1000}},
            "weights.transport = adapters needs learner.lora_rank from 1 to 512",
        ),
    ],
)
def test_what_cannot_be_sent_alone_is_refused(change: dict[str, Any], said: str) -> None:
    tree = lora_config(Path("unused")).model_dump()
    tree["weights"]["transport"] = "adapters"
    assert parse_config(tree).weights.carrier == "snapshot"
    for section, values in change.items():
        tree[section] |= values
    with pytest.raises(ConfigError, match=said):
        parse_config(tree)
