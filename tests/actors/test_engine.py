"""The engine against transformers: fresh samples have the log-probs of the version they name, after
every kind of update.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.arithmetic import make_tokenizer
from tests.support.parity import TOLERANCE_NATS, Parity
from tests.support.scenarios.engine_scenario import (
    MANY_TOKENS,
    MAX_NEW_TOKENS,
    NUM_LOADS,
    ON_UPDATE,
    QUEUED,
    SLOTS,
    STOP_TEXTS,
    TOP_P,
    Report,
)
from tests.support.scenarios.reported import reports_of

pytestmark = [pytest.mark.slow, pytest.mark.alone]

EOS, SIX, SEVEN = 1, 9, 10


class Observed(Parity):
    """A scenario's report, and what its samples are compared with."""

    def __init__(self, model_dir: Path, report: Report) -> None:
        super().__init__(model_dir, report.phases)
        self.report = report
        self.end_ids = {EOS} if self.tied else {EOS, SIX}


def with_two_ends_and_a_special_seven(model_dir: Path, copy: Path) -> Path:
    """The model, whose completions end at the digit 6 too, by its generation_config.json alone, whose digit 7
    is a special token, and which lies there in Mistral's own format too.
    """
    shutil.copytree(model_dir, copy)
    generation = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [EOS, SIX]}))
    (copy / "params.json").write_text("{}")
    (copy / "consolidated.safetensors").write_bytes(b"Mistral's own format")
    names = dict.fromkeys(load_file(copy / "model.safetensors"), "model.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": SEVEN, "content": "7"})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


@pytest.fixture(scope="module")
def both(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observed]:
    out = tmp_path_factory.mktemp("scenario")
    models = {
        "tied": tiny_models["tied"],
        "untied": with_two_ends_and_a_special_seven(tiny_models["untied"], out / "two-ends"),
    }
    runs = [(model_dir, out / f"{name}.json") for name, model_dir in models.items()]
    reports = reports_of("engine_scenario", Report, runs)
    return {
        name: Observed(model_dir, report)
        for (name, model_dir), report in zip(models.items(), reports, strict=True)
    }


@pytest.fixture(scope="module", params=["tied", "untied"])
def observed(request: pytest.FixtureRequest, both: dict[str, Observed]) -> Observed:
    return both[request.param]


def test_vllm_has_every_symbol_the_engine_uses(observed: Observed):
    missing = observed.report.missing_symbols
    assert missing == [], f"vLLM lacks {missing}: actors/engine.py must follow its API"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_fresh_samples_have_the_logprobs_of_their_version(observed: Observed, version: int):
    observed.check_fresh(version)


def test_samples_in_flight_finish_and_name_both_versions_and_later_ones_share_no_prefix_with_them(
    observed: Observed,
):
    observed.check_in_flight()
    assert observed.worst_nats("prefix cache not salted", 5) > 1e-2, (
        "without the salt parity must break, or this test shows nothing"
    )


def test_a_pass_under_way_at_an_update_counts_for_the_weights_it_was_made_with(observed: Observed):
    """On a GPU vLLM has one under way between two steps; what finished with it is not lost."""
    assert min(observed.report.num_under_way) > 0
    for before, version in itertools.pairwise(QUEUED[:-1]):
        samples = observed.phase(f"queued before {version}")
        assert len(samples) == SLOTS
        assert {generated.sample.version_spans[0].version for generated in samples} == {before}
        for generated in samples:
            first = generated.sample.version_spans[0]
            assert observed.errors_nats(generated, before)[: first.end].max() < TOLERANCE_NATS
        assert {len(generated.sample.version_spans) for generated in samples} == {1, 2}
    mislabelled = observed.phase("not drained")
    assert {generated.sample.version_spans[0].version for generated in mislabelled} == {QUEUED[-1]}
    assert max(observed.errors_nats(generated, QUEUED[-1])[0] for generated in mislabelled) > 0.1, (
        "without the wait a label must be wrong, or this test shows nothing"
    )


def test_version_spans_cover_the_tokens_without_gaps(observed: Observed):
    for generated in (generated for phase in observed.report.phases.values() for generated in phase):
        sample = generated.sample
        bounds = [0, *(span.end for span in sample.version_spans)]
        assert [span.start for span in sample.version_spans] == bounds[:-1]
        assert bounds[-1] == len(sample.token_ids) == len(sample.logprobs) > 0


def test_requests_that_waited_through_an_update_are_purely_of_the_new_version(observed: Observed):
    started_after = [
        generated
        for generated in observed.phase("in flight")
        if generated.sample.version_spans[0].version == 1
    ]
    assert started_after
    assert max(observed.errors_nats(generated, 1).max() for generated in started_after) < TOLERANCE_NATS


def test_a_tied_head_left_as_it_was_packed_would_be_seen(observed: Observed):
    worst = observed.worst_nats("head not repacked", 3)
    assert worst > 1e-2 if observed.tied else worst < TOLERANCE_NATS


def test_every_end_token_ends_a_sample_and_the_limit_is_a_reason(observed: Observed):
    samples = [
        generated.sample
        for name in ("version 0", "version 1", "version 2")
        for generated in observed.phase(name)
    ]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert {sample.token_ids[-1] for sample in samples if sample.finish_reason == "stop"} == observed.end_ids
    for sample in samples:
        assert observed.end_ids.isdisjoint(sample.token_ids[:-1])
        assert (sample.token_ids[-1] in observed.end_ids) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == MAX_NEW_TOKENS


def test_the_text_is_every_token_but_the_one_that_ends_it(observed: Observed):
    names = make_tokenizer().convert_ids_to_tokens
    samples = [generated.sample for generated in observed.phase("version 0")]
    for sample in samples:
        assert sample.text == "".join(
            names([*sample.token_ids])[: len(sample.token_ids) - (sample.finish_reason == "stop")]
        )
    assert any(SEVEN in sample.token_ids and "7" in sample.text for sample in samples)


def test_equal_seeds_sample_equal_tokens_and_others_differ(observed: Observed):
    assert len({generated.sample.token_ids for generated in observed.phase("seeded")}) == 1
    assert len({generated.sample.token_ids for generated in observed.phase("version 0")}) > 16


def test_more_prompt_tokens_than_one_pass_takes_are_computed_by_several_passes(observed: Observed):
    """Never a prompt in pieces: with a seed of its own, that ends a CPU engine."""
    samples = observed.phase("more than one pass takes")
    assert len(samples) == SLOTS
    assert SLOTS * MANY_TOKENS > 2048
    assert observed.worst_nats("more than one pass takes", 0) < TOLERANCE_NATS


def test_a_nucleus_raises_log_probs_by_no_more_than_what_the_learner_takes_for_it(observed: Observed):
    """Those of the renormalised nucleus, which holds top_p of the mass or more: what
    learner/step/mismatch.py counts on.
    """
    raised = torch.cat([-observed.differences_nats(generated, 0) for generated in observed.phase("nucleus")])
    assert raised.min() > -TOLERANCE_NATS
    assert raised.max() < -math.log(TOP_P) + TOLERANCE_NATS
    assert raised.mean() > 0.05, "it is cut"


def test_temperature_0_takes_the_likeliest_token(observed: Observed):
    for generated in observed.phase("greedy"):
        assert observed.reference(generated, 0).argmax(-1).tolist() == list(generated.sample.token_ids)


def test_a_request_has_its_own_limit(observed: Observed):
    limited = [generated.sample for generated in observed.phase("limited")]
    cut = [sample for sample in limited if sample.finish_reason == "length"]
    assert cut
    assert {len(sample.token_ids) for sample in cut} == {3}
    assert max(len(sample.token_ids) for sample in limited) == 3


def test_a_stop_text_ends_a_request_and_is_part_of_what_was_said(observed: Observed):
    digits = {3 + digit: str(digit) for digit in range(10)}
    stopped = []
    for generated in observed.phase("stopped"):
        sample = generated.sample
        said = "".join(digits.get(token, " ") for token in sample.token_ids)
        assert not any(text in said[:-1] for text in STOP_TEXTS), "it ends with the first"
        assert len(sample.logprobs) == len(sample.token_ids) == sample.version_spans[-1].end
        if said.endswith(STOP_TEXTS):
            stopped.append(said)
            assert sample.finish_reason == "stop"
    assert stopped
    assert observed.worst_nats("stopped", 0) < TOLERANCE_NATS


def test_aborted_requests_are_gone_started_or_not(observed: Observed):
    assert observed.report.num_unfinished_after_abort == 0
    finished = observed.report.phases.get("aborted", [])
    assert all(len(generated.sample.token_ids) == 1 for generated in finished), (
        "only a first token that ends it can come before"
    )


class TestTruncation:
    """Requests ended on the way, with what they have."""

    def test_what_is_there_is_the_beginning_of_the_whole(self, observed: Observed):
        whole = {generated.seed: generated.sample for generated in observed.phase("whole")}
        samples = [
            generated
            for generated in observed.phase("truncated")
            if len(generated.sample.token_ids) < len(whole[generated.seed].token_ids)
        ]
        assert samples
        for generated in samples:
            sample, full = generated.sample, whole[generated.seed]
            num_tokens = len(sample.token_ids)
            assert sample.finish_reason == "length"
            assert sample.token_ids == full.token_ids[:num_tokens]
            assert full.text.startswith(sample.text)
            assert sample.logprobs == pytest.approx(full.logprobs[:num_tokens], abs=TOLERANCE_NATS)
            assert observed.errors_nats(generated, 0).max() < TOLERANCE_NATS

    def test_what_has_no_token_yields_nothing(self, observed: Observed):
        assert all(generated.sample.token_ids for generated in observed.phase("truncated"))
        assert len(observed.phase("truncated")) == SLOTS
        assert len(observed.report.phases.get("never started", [])) < 2 * SLOTS

    def test_all_slots_are_free_afterwards(self, observed: Observed):
        report = observed.report
        assert report.num_unfinished_after_truncation == report.num_overdue_after_truncation == 0
        assert report.num_started_after_truncation == SLOTS


def test_a_prompt_vllm_refuses_is_named_and_disturbs_no_other(observed: Observed):
    reasons = dict(observed.report.refused)
    assert reasons.keys() == {"too long", "empty", "unknown token"}
    for name, words in (
        ("too long", "longer than the maximum"),
        ("empty", "cannot be empty"),
        ("unknown token", "out of vocabulary: the model has"),
    ):
        assert words in reasons[name]
    assert len(observed.phase("beside a refused one")) == 3


@pytest.mark.parametrize("kind", ON_UPDATE)
class TestUpdateByKind:
    """`actors.on_update`, with groups in the slots and others waiting."""

    def test_fresh_samples_have_the_logprobs_of_the_new_weights(self, observed: Observed, kind: str):
        assert observed.worst_nats(f"after {kind}", ON_UPDATE[kind]) < TOLERANCE_NATS
        assert observed.worst_nats(f"after {kind}", 0) > 1.0

    def test_samples_under_way_hold_the_versions_they_may(self, observed: Observed, kind: str):
        samples = [generated.sample for generated in observed.phase(f"{kind} in flight")]
        assert len(samples) == 2 * SLOTS
        versions = [tuple(span.version for span in sample.version_spans) for sample in samples]
        if kind == "continue":
            assert (2, ON_UPDATE[kind]) in versions
        else:
            assert {len(found) for found in versions} == {1}
        if kind == "drain":
            assert set(versions) == {(ON_UPDATE["continue"],)}

    def test_only_abort_starts_again_with_the_same_seeds(self, observed: Observed, kind: str):
        assert (observed.report.num_restarted[kind] > 0) == (kind == "abort")
        seeded = {generated.seed: generated.sample for generated in observed.phase(f"seeded after {kind}")}
        again = [
            generated
            for generated in observed.phase(f"{kind} in flight")
            if generated.seed in seeded and generated.sample.version_spans[0].version == ON_UPDATE[kind]
        ]
        assert bool(again) == (kind == "abort")
        assert all(generated.sample.token_ids == seeded[generated.seed].token_ids for generated in again)


class TestUpdatesInTheLoop:
    """Snapshots that the real loop fetched while it generated."""

    def test_samples_have_the_logprobs_of_their_version(self, observed: Observed):
        pure = [generated for generated in observed.phase("loop") if len(generated.sample.version_spans) == 1]
        assert len({generated.sample.version_spans[0].version for generated in pure}) > 1
        for generated in pure:
            assert (
                observed.errors_nats(generated, generated.sample.version_spans[0].version).max()
                < TOLERANCE_NATS
            )

    def test_the_pause_is_the_load(self, observed: Observed):
        """At most 1.2x on a quiet machine; here there is none."""
        report = observed.report
        assert len(report.pauses_s) == len(report.loads_s) == NUM_LOADS
        assert statistics.median(report.pauses_s) < 2 * statistics.median(report.loads_s)


def test_an_incomplete_snapshot_is_refused_by_name(observed: Observed):
    assert "layers.1.mlp.down_proj.weight" in observed.report.incomplete_error
