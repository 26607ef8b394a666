"""An agent of the `openai` package with a real engine, in processes as in a run: every sampled token has the
log-prob that transformers gives it after what stands before it in its segment.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.records import Group, Sample, decode_group
from recipes.arithmetic import make_llama
from tests.support import ROOT
from tests.support.dialogues.harnesses import FAMILY, TOKENIZER

pytestmark = pytest.mark.slow

TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights over bytes, with a chat template that shows tools."""
    directory = tmp_path_factory.mktemp("bytes")
    model = make_llama(len(TOKENIZER), hidden=64, layers=2)
    model.config.max_position_embeddings = 1024
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def groups(model_dir: Path) -> list[Group]:
    out = model_dir / "groups"
    command = [sys.executable, "-m", "tests.support.scenarios.harness_scenario", str(model_dir), str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [decode_group(bytes.fromhex(line)) for line in out.read_text().splitlines()]


def segments(sample: Sample) -> Iterator[tuple[list[int], list[bool], list[float]]]:
    """Tokens, which of them were sampled, and the log-probs of those, of each segment."""
    bounds = (0, *sample.segments, len(sample.tokens))
    sampled, logprobs = sample.is_sampled.numpy(), sample.logprobs.numpy().tolist()
    for first, last in itertools.pairwise(bounds):
        before, here = int(sampled[:first].sum()), int(sampled[first:last].sum())
        yield (
            sample.tokens.numpy()[first:last].tolist(),
            sampled[first:last].tolist(),
            logprobs[before : before + here],
        )


def texts(sample: Sample) -> list[str]:
    return [TOKENIZER.decode(tokens) for tokens, _, _ in segments(sample)]


def test_the_agent_trains_unchanged(groups):
    assert [len(group.samples) for group in groups] == [4] * 4
    samples = [sample for group in groups for sample in group.samples]
    assert [sample.error for sample in samples] == [None] * 16
    assert all(sample.reward for sample in samples)


def test_sampled_tokens_have_the_log_probs_of_their_segment(groups, model_dir):
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    worst = 0.0
    for sample in (sample for group in groups for sample in group.samples):
        for tokens, sampled, logprobs in segments(sample):
            assert not sampled[0]
            with torch.no_grad():
                reference = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(tokens[1:])
            found = reference.gather(1, targets[:, None])[:, 0][torch.tensor(sampled[1:])]
            worst = max(worst, (found - torch.tensor(logprobs)).abs().max().item())
    assert worst < TOLERANCE_NATS


def test_a_conversation_that_goes_on_is_one_segment_and_a_second_try_another(groups):
    for sample in groups[0].samples:
        assert sample.turns == 4
        first, second = texts(sample)
        assert "Sure?" in first
        assert "Really?" in second
        assert first.split("Sure?")[0] == second.split("Really?")[0]
        assert sum(map(num_last_said, segments(sample))) == sample.reward


def num_last_said(segment: tuple[list[int], list[bool], list[float]]) -> int:
    """How many tokens the last answer of a segment has, as the agent counted them."""
    _, sampled, _ = segment
    return sampled[::-1].index(False)


def test_an_item_played_again_is_the_same(groups):
    first, again = groups[0], groups[1]
    for one, two in zip(first.samples, again.samples, strict=True):
        assert one.tokens.numpy().tolist() == two.tokens.numpy().tolist()
        assert (one.segments, one.reward) == (two.segments, two.reward)


def test_the_stop_texts_of_a_call_end_it(groups):
    ended = 0
    for sample in groups[0].samples:
        first = texts(sample)[0]
        second = first.split("<|im_start|>assistant\n")[2].split(FAMILY.end)[0]
        assert not any(stop in second[:-1] for stop in ("e", "\n"))
        ended += second.endswith(("e", "\n"))
    assert ended


def test_calls_at_once_are_segments(groups):
    for sample in groups[2].samples:
        assert len(sample.segments) == 2
        asked = {text.split("2+3? ")[1][0] for text in texts(sample)}
        assert asked == {"0", "1", "2"}
        assert sample.turns == 3


def test_versions_of_an_update_in_the_middle_are_in_the_spans(groups):
    versions = {span.version for sample in groups[3].samples for span in sample.version_spans}
    assert len(versions) > 1
