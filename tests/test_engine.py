"""The engine against transformers: fresh samples have the log-probs of the version they name, after every kind of update."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine_scenario import MAX_NEW_TOKENS, Generated, Report, weights

pytestmark = pytest.mark.slow

EOS = 1
TOLERANCE_NATS = 1e-4


class Observed:
    """A scenario's report, and transformers on the same weights to compare it with."""

    def __init__(self, model_dir: Path, report: Report) -> None:
        self.report = report
        self._model_dir = model_dir
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.tied = self._model.config.tie_word_embeddings

    def phase(self, name: str) -> list[Generated]:
        return self.report.phases[name]

    @torch.no_grad()
    def reference(self, generated: Generated, version: int) -> torch.Tensor:
        """Log-probs [tokens, V] by transformers with the weights of `version` at the sample's temperature."""
        self._model.load_state_dict(weights(self._model_dir, version), strict=not self.tied)
        ids = (*generated.prompt_ids, *generated.sample.token_ids)
        logits = self._model(torch.tensor([ids])).logits[0, len(generated.prompt_ids) - 1 : -1]
        return (logits / (generated.temperature or 1.0)).log_softmax(-1)

    def errors_nats(self, generated: Generated, version: int) -> torch.Tensor:
        """|engine - transformers| of every sampled token."""
        token_ids = torch.tensor(generated.sample.token_ids)
        reference = self.reference(generated, version).gather(1, token_ids[:, None])[:, 0]
        return (reference - torch.tensor(generated.sample.logprobs)).abs()

    def worst_nats(self, phase: str, version: int) -> float:
        return max(self.errors_nats(generated, version).max().item() for generated in self.phase(phase))


@pytest.fixture(scope="module", params=["tied", "untied"])
def observed(request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Observed:
    model_dir = tiny_models[request.param]
    out = tmp_path_factory.mktemp("scenario") / "report.json"
    command = [sys.executable, "-m", "tests.engine_scenario", str(model_dir), str(out)]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return Observed(model_dir, msgspec.json.decode(out.read_bytes(), type=Report))


def test_vllm_has_every_symbol_the_engine_uses(observed: Observed):
    missing = observed.report.missing_symbols
    assert missing == [], f"vLLM lacks {missing}: actors/engine.py must follow its API"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_fresh_samples_have_the_logprobs_of_their_version(observed: Observed, version: int):
    samples = observed.phase(f"version {version}")
    assert {generated.temperature for generated in samples} == {1.0, 0.7}
    assert {span.version for generated in samples for span in generated.sample.version_spans} == {version}
    assert observed.worst_nats(f"version {version}", version) < TOLERANCE_NATS


def test_the_versions_differ_so_that_parity_means_something(observed: Observed):
    for version in (1, 2):
        assert observed.worst_nats(f"version {version}", version - 1) > 1.0


def test_samples_in_flight_finish_and_name_both_versions(observed: Observed):
    samples = observed.phase("in flight")
    crossing = [generated for generated in samples if len(generated.sample.version_spans) == 2]
    assert len(samples) == 16
    assert crossing
    for generated in crossing:
        before, after = generated.sample.version_spans
        assert (before.version, after.version) == (0, 1)
        assert observed.errors_nats(generated, 0)[: before.end].max() < TOLERANCE_NATS


def test_version_spans_cover_the_tokens_without_gaps(observed: Observed):
    for generated in (generated for phase in observed.report.phases.values() for generated in phase):
        sample = generated.sample
        bounds = [0, *(span.end for span in sample.version_spans)]
        assert [span.start for span in sample.version_spans] == bounds[:-1]
        assert bounds[-1] == len(sample.token_ids) == len(sample.logprobs) > 0


def test_requests_that_waited_through_an_update_are_purely_of_the_new_version(observed: Observed):
    started_after = [generated for generated in observed.phase("in flight") if generated.sample.version_spans[0].version == 1]
    assert started_after
    assert max(observed.errors_nats(generated, 1).max() for generated in started_after) < TOLERANCE_NATS


def test_new_requests_share_no_prefix_with_older_weights_even_while_those_are_in_flight(observed: Observed):
    samples = observed.phase("after an update in flight")
    assert all(generated.version == 1 for generated in samples)
    assert observed.worst_nats("after an update in flight", 1) < TOLERANCE_NATS
    assert observed.worst_nats("prefix cache not salted", 5) > 1e-2, "without the salt parity must break, or this test shows nothing"


def test_a_tied_head_left_as_it_was_packed_would_be_seen(observed: Observed):
    worst = observed.worst_nats("head not repacked", 3)
    assert worst > 1e-2 if observed.tied else worst < TOLERANCE_NATS


def test_eos_is_a_token_and_the_limit_is_a_reason(observed: Observed):
    samples = [generated.sample for name in ("version 0", "version 1", "version 2") for generated in observed.phase(name)]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert EOS not in sample.token_ids[:-1]
        assert (sample.token_ids[-1] == EOS) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == MAX_NEW_TOKENS


def test_equal_seeds_sample_equal_tokens_and_others_differ(observed: Observed):
    assert len({generated.sample.token_ids for generated in observed.phase("seeded")}) == 1
    assert len({generated.sample.token_ids for generated in observed.phase("version 0")}) > 16


def test_temperature_0_takes_the_likeliest_token(observed: Observed):
    for generated in observed.phase("greedy"):
        assert observed.reference(generated, 0).argmax(-1).tolist() == list(generated.sample.token_ids)


def test_aborted_requests_are_gone_started_or_not(observed: Observed):
    assert observed.report.num_unfinished_after_abort == 0
    finished = observed.report.phases.get("aborted", [])
    assert all(len(generated.sample.token_ids) == 1 for generated in finished), "only a first token that ends it can come before"


def test_an_incomplete_snapshot_is_refused_by_name(observed: Observed):
    assert "layers.1.mlp.down_proj.weight" in observed.report.incomplete_error
