"""What the checks of benchmarks/gpu would see, on models of this process in place of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from actors.episode import Generation
from benchmarks.gpu.checks import TOLERANCE_NATS, judge_flying
from benchmarks.gpu.engines import changed, load_module, shape_of
from benchmarks.learner.gpu import save_model
from core.arrays import Float32s, Int32s
from core.records import VersionSpan

PROMPT = (3, 14, 15, 92, 65)
NUM_BEFORE, NUM_AFTER = 4, 5


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Any]:
    directory = tmp_path_factory.mktemp("model")
    save_model(shape_of("1.5B", on_gpu=False), str(directory))
    found = {version: load_module(str(directory), "float32") for version in (0, 1)}
    found[1].load_state_dict(dict(changed(found[0])))
    return found


@torch.no_grad()
def flying(modules: Mapping[int, Any], first: int, num_old: int) -> Generation:
    """Tokens of which the weights of version 0 made `num_old`, a pass each, and the labels say NUM_BEFORE."""
    cache, fed, said, logprobs = None, [*PROMPT], [], []
    for number in range(NUM_BEFORE + NUM_AFTER):
        module = modules[int(number >= num_old)]
        out = module(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, (first + 17 * number) % 90
        logprobs.append(float(out.logits[0, -1].log_softmax(-1)[token]))
        said.append(token)
        fed = [token]
    spans = (VersionSpan(0, 0, NUM_BEFORE), VersionSpan(1, NUM_BEFORE, NUM_BEFORE + NUM_AFTER))
    return Generation(Int32s.of(said), Float32s.of(logprobs), spans, "length", "")


def test_an_update_that_waited_for_the_pass_under_way_is_told_from_one_that_did_not(
    modules: Mapping[int, Any],
) -> None:
    tolerance = TOLERANCE_NATS["float32"]
    waited = judge_flying(modules, PROMPT, [flying(modules, first, NUM_BEFORE) for first in range(8)])
    assert waited["worst_nats"] < tolerance < waited["from_old_nats"]
    missed = judge_flying(modules, PROMPT, [flying(modules, first, NUM_BEFORE + 1) for first in range(8)])
    assert missed["from_old_nats"] < tolerance < missed["worst_nats"]


def test_where_nothing_was_under_way_at_the_update_nothing_is_shown(modules: Mapping[int, Any]) -> None:
    whole = flying(modules, 1, NUM_BEFORE + NUM_AFTER)._replace(version_spans=(VersionSpan(0, 0, 9),))
    found = judge_flying(modules, PROMPT, [whole])
    assert found["worst_nats"] < TOLERANCE_NATS["float32"]
    assert found["from_old_nats"] == 0
