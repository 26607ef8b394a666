"""An engine whose model is divided among two worker processes, against transformers: before and after
updates, and when one of the two is killed.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from actors.engine import WorkerLost
from core.errors import AgroError
from tests.support.parity import Parity
from tests.support.scenarios.parallel_scenario import Report
from tests.support.scenarios.reported import reports_of

pytestmark = pytest.mark.slow


class Observed(Parity):
    """A scenario's report, and what its samples are compared with."""

    def __init__(self, model_dir: Path, report: Report) -> None:
        super().__init__(model_dir, report.phases)
        self.report = report


@pytest.fixture(scope="module")
def observed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Observed:
    model_dir, out = tiny_models["untied"], tmp_path_factory.mktemp("scenario") / "report.json"
    (report,) = reports_of("parallel_scenario", Report, [(model_dir, out)])
    return Observed(model_dir, report)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_fresh_samples_have_the_logprobs_of_their_version(observed: Observed, version: int):
    assert observed.report.num_workers == 2
    observed.check_fresh(version)


def test_generation_under_way_goes_on_with_the_new_weights_and_says_from_which_token(observed: Observed):
    observed.check_in_flight()


def test_equal_seeds_sample_equal_tokens(observed: Observed):
    said = [
        {generated.seed: generated.sample.token_ids for generated in observed.phase(name)}
        for name in ("seeded", "seeded again")
    ]
    assert said[0] == said[1]
    assert len({*said[0].values()}) > 1


def test_weights_that_lack_a_layer_are_refused_and_a_part_that_is_but_padding_lacks_nothing(
    observed: Observed,
):
    """The vocabulary is so small that the second worker's part of it is padding."""
    assert "lack 2 parameters of the model: model.layers.1.mlp" in observed.report.incomplete_error


def test_the_memory_that_weights_are_shared_in_is_gone_once_they_are_loaded(observed: Observed):
    assert observed.report.memory_names == []


def test_a_killed_worker_is_the_end_of_the_engine_and_no_error_that_ends_the_run(observed: Observed):
    assert observed.report.death.startswith("WorkerLost: of the 2 worker processes of the engine one is gone")
    assert "SIGKILL" in observed.report.death
    assert observed.report.num_left == 0
    assert not issubclass(WorkerLost, AgroError)


def test_the_kernel_ends_the_workers_with_their_actor_also_where_they_are_stopped(observed: Observed):
    assert observed.report.death_signals == [signal.SIGKILL] * 2
