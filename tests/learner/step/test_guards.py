"""Bad numbers, bad batches and bad moments: skipped on all ranks, kept, told, and the run ends only
when it must.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import launch
from benchmarks.studies.lag_lab import PlainPolicy
from core.config.files import dump_config
from core.errors import DataError, TrainingError
from core.metrics import METRICS
from core.records import Batch, Group, Sample, StoredGroup, VersionSpan, encode, encode_batch, index_of
from learner.objectives import load_objective
from learner.step import bad_batch
from learner.step.bad_batch import BadBatch, Skip, read_bad_batch, render, write_bad_batch
from learner.step.batch_metrics import batch_metrics
from learner.step.guards import MIN_SEEN, QUIET_STEPS, WINDOW, Alarms, Guards
from learner.step.share import Share
from tests.support.configs import LR, update_config
from tests.support.learning.ranks import run_ranks
from tests.support.learning.updates import plain_updater, random_batches
from tests.support.scenarios import guards_scenario
from tests.support.scenarios.guards_scenario import STEPS, Spoilt, SpoiltObjective, with_infinite_reward


def sample_of(*versions: int, **changes: Any) -> Sample:
    """One token of each version; offline without any."""
    length = max(1, len(versions))
    known = {
        "prompt": (1, 2),
        "answer": tuple(range(3, 3 + length)),
        "logprobs": (-0.5,) * len(versions),
        "version_spans": tuple(
            VersionSpan(version, place, place + 1) for place, version in enumerate(versions)
        ),
        "finish_reason": "stop",
        "text": "12\n",
        "reward": 1.0,
    }
    return Sample.one_turn(**{**known, **changes})


def batch_of(step: int, *samples: Sample) -> Batch:
    return Batch(
        step, (Group(group_id=7, prompt_index=2, source_row=3, prompt="7+5=", samples=samples, uses=1),)
    )


def payload_of(batch: Batch) -> bytes:
    return encode_batch(batch.step, map(StoredGroup.of, batch.groups))


def alone(value: str) -> str:
    return value


# --- under ZeRO-3 ---


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all_as_if_the_batch_had_never_been(
    num_ranks: int, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments and step counts bit for bit; nothing is left of the gradient; three in a row end
    it with the batch kept.
    """
    config = update_config(str(tiny_models["untied"]), ranks=num_ranks)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    run_ranks(guards_scenario.main, num_ranks, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for step in found["steps"]:
        is_good = step["kind"] == "good"
        assert step["is_unchanged"] != is_good, step
        assert step["is_as_untouched"], step
        assert len({json.dumps(skip) for skip in step["skips"]}) == 1, "every rank knows the same"
        assert (step["skips"][0] is None) == is_good, step
        assert (step["groups"] == 5) == is_good, "no diagnostics of a skipped step"
    by_kind = {step["kind"]: step["skips"][0] for step in found["steps"] if step["kind"] != "good"}
    assert by_kind["gradient"][0] == {}
    reasons = {kind: set(skip[0].values()) for kind, skip in by_kind.items() if kind != "gradient"}
    policy = {"log-probs by the policy"}
    expected = {
        "policy": policy,
        "first pass": policy,
        "reference": {"log-probs by the reference"},
        "loss": {"loss"},
        "reward": {"reward"},
    }
    assert reasons == expected
    stop = STEPS.index("reward")
    assert (found["stopped"]["step"], found["stopped"]["metrics"]["guard/skipped_steps"]) == (stop, 6)
    kept = tmp_path / "bad-batches" / f"step-{stop:06d}.msgpack"
    for error in found["stopped"]["errors"]:
        assert (
            f"3 learner steps in a row were skipped, the last is step {stop}: not finite: reward of group"
            in error
        )
        assert str(kept) in error
    assert len(found["events"]) == 5
    assert "learner step 2 skipped: not finite: log-probs by the policy of group 20" in found["events"][0]
    assert "the gradient norm is inf, with finite log-probs" in found["events"][1]
    assert len(list(kept.parent.iterdir())) == bad_batch.MAX_FILES, "the oldest made room"
    check_mismatch(found["mismatch"])
    assert run_cli("inspect-batch", str(kept)) == 0
    assert "reward !inf" in capsys.readouterr().out


def check_mismatch(found: dict[str, Any]) -> None:
    """What others drew ends the run on all ranks before the step; what the policy drew is told, in
    numbers that all ranks share.
    """
    assert len(set(found["errors"])) == 1
    assert "the actors do not sample from what the learner computes" in found["errors"][0]
    assert all(found["is_unchanged"])
    assert len(found["told"]) == 1
    assert "actors and learner agree at learner step 0" in found["told"][0]
    (metrics, *others) = found["metrics"]
    assert all(other == metrics for other in others)
    assert metrics["mismatch/tokens"] > 50
    assert metrics["mismatch/mean"] < 1e-5
    assert metrics["mismatch/k3"] >= 0


def run_cli(*words: str) -> int:
    before, sys.argv = sys.argv, ["launch.py", *words]
    try:
        return launch.main()
    finally:
        sys.argv = before


# --- in one process ---


@pytest.mark.parametrize("kind", ["policy", "gradient", "first pass", "loss", "reward"])
def test_a_plain_policy_is_not_moved_by_a_skipped_step_either(
    kind: str, tiny_models: dict[str, Path]
) -> None:
    config = update_config(str(tiny_models["tied"]))
    objective = SpoiltObjective(load_objective(config.objective))
    policy, updater = plain_updater(config, objective)
    updater._policy = spoilt = Spoilt(policy, "policy", "gradient", "first pass")
    batch = random_batches(policy.module.config.vocab_size)[0]
    before = weights_of(policy)
    spoilt.start(kind)
    objective.now = kind
    result = updater.update(Share.of(with_infinite_reward(batch) if kind == "reward" else batch), LR)
    assert result.skip is not None
    assert result.by_group("advantage") == {}
    assert not math.isfinite(result.metrics()["optim/grad_norm"])
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(policy).items())
    spoilt.start("good")
    objective.now = "good"
    result = updater.update(Share.of(batch), LR)
    assert result.skip is None
    assert math.isfinite(result.metrics()["optim/grad_norm"])
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(policy).items())


def weights_of(policy: PlainPolicy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.module.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reward": math.inf}, "reward"),
        ({"reward": math.nan}, "reward"),
        ({"reward": None, "error": "timeout"}, "reward"),
        ({"logprobs": (-math.inf,)}, "behaviour log-probs"),
        ({"ref_logprob": math.nan}, "stored reference log-prob"),
    ],
)
def test_a_batch_that_brings_a_bad_number_is_skipped_by_the_name_of_its_group(
    changes: dict[str, Any], reason: str, tiny_models: dict[str, Path]
) -> None:
    config = update_config(str(tiny_models["tied"]))
    policy, updater = plain_updater(config, load_objective(config.objective))
    batch = batch_of(0, sample_of(0), sample_of(0, **changes))
    before = weights_of(policy)
    skip = updater.update(Share.of(batch), LR).skip
    assert skip is not None
    assert skip.reasons == {7: reason}
    assert skip.describe() == f"not finite: {reason} of group 7"
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(policy).items())
    assert math.isfinite(batch_metrics(index_of(batch))["reward/mean"]), (
        "what is told of the batch is not spoilt"
    )


# --- skipped steps ---


SKIP = Skip(reasons={7: "reward"})


def test_only_skips_in_a_row_end_the_run_and_a_checkpoint_carries_their_count(tmp_path: Path) -> None:
    payload = payload_of(batch_of(0, sample_of(0)))

    def guards() -> Guards:
        return Guards(tmp_path, 0, tell=told.append, share=alone)

    told: list[str] = []
    first = guards()
    for step, skip in enumerate([SKIP, SKIP, None, SKIP, SKIP]):
        first.judge(step, payload, {}, skip)
    assert len(told) == 4
    again = guards()
    again.set_state(json.loads(json.dumps(first.get_state())))
    assert again.metrics() == {"guard/skipped_steps": 4.0, "guard/alarms": 0.0}
    with pytest.raises(
        TrainingError,
        match=r"(?s)the last is step 5: not finite: reward of group "
        r"7.*step-000005.msgpack",
    ):
        again.judge(5, payload, {}, SKIP)
    assert set(again.metrics()) <= METRICS.keys()


def test_another_rank_than_the_first_writes_and_tells_nothing_and_ends_with_the_same_words(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    guards = Guards(
        tmp_path / "bad",
        1,
        tell=told.append,
        share=lambda value: value or "its batch is kept in X",
    )
    for step in range(2):
        guards.judge(step, b"", {}, SKIP)
    with pytest.raises(TrainingError, match="its batch is kept in X"):
        guards.judge(2, b"", {}, SKIP)
    assert told == []
    assert not (tmp_path / "bad").exists()


def test_a_full_disk_costs_the_kept_batch_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("learner.step.guards.write_bad_batch", full)
    told: list[str] = []
    Guards(tmp_path, 0, tell=told.append, share=alone).judge(4, b"", {}, SKIP)
    assert "its batch could not be kept: [Errno 28] No space left on device" in told[0]


# --- alarms ---

LOSS, KL = "objective/residual_std", "objective/kl_ref"


def alarms_of(series: list[dict[str, float]]) -> list[tuple[int, str]]:
    alarms = Alarms()
    return [
        (step, event.split(" at ")[0])
        for step, metrics in enumerate(series)
        for event in alarms.observe(step, metrics)
    ]


GROWING_KL = [
    0.0,
    -0.001,
    -0.002,
    0.0,
    -0.002,
    0.005,
    -0.004,
    0.016,
    0.032,
    0.013,
    0.004,
    0.012,
    0.056,
    0.013,
]
GROWING_KL += [0.067, 0.145, 0.139, 0.128, 0.187, 0.191, 0.094, 0.13, 0.181, 0.268, 0.223, 0.218]


def noisy(count: int) -> list[dict[str, float]]:
    return [{LOSS: 1.0 + 0.1 * (step % 5), KL: -2.0 + 0.2 * (step % 3)} for step in range(count)]


SERIES: dict[str, tuple[list[dict[str, float]], list[tuple[int, str]]]] = {
    "steady": (noisy(200), []),
    "one spike": ([*noisy(60), {LOSS: 9.0, KL: -2.0}, *noisy(60)], [(60, "loss spike")]),
    "too early": ([*noisy(MIN_SEEN - 1), {LOSS: 9.0}], []),
    "as early as may be": ([*noisy(MIN_SEEN), {LOSS: 9.0}], [(MIN_SEEN, "loss spike")]),
    "both": ([*noisy(30), {LOSS: 9.0, KL: 5.0}], [(30, "loss spike"), (30, "KL spike")]),
    "down is no spike": ([*noisy(30), {LOSS: 0.0, KL: -50.0}], []),
    "slow growth": ([{LOSS: 1.0 + 0.05 * step} for step in range(200)], []),
    "another level": (
        [*noisy(WINDOW), *({LOSS: 9.0 + 0.1 * (step % 5)} for step in range(100))],
        [(WINDOW, "loss spike")],
    ),
    "spikes in a row are told once in a while": (
        [{LOSS: 9.0 if step >= 30 and step % 5 == 0 else 1.0 + 0.1 * (step % 5)} for step in range(80)],
        [(30, "loss spike"), (30 + QUIET_STEPS, "loss spike")],
    ),
    "hardly any spread": (
        [*({LOSS: 1.0} for _ in range(40)), {LOSS: 1.1}, {LOSS: 1.3}],
        [(41, "loss spike")],
    ),
    "now and then a group whose samples differ, once nearly all agree": (
        [*noisy(30), *([{LOSS: 1e-17}] * 6 + [{LOSS: 0.06}] + [{LOSS: 1e-17}] * 6 + [{LOSS: 0.1}]) * 20],
        [],
    ),
    "a spike once nearly all agree": (
        [*([{LOSS: 0.0}, {LOSS: 0.06}] * 50), {LOSS: 0.9}],
        [(100, "loss spike")],
    ),
    "a KL that grows as the policy learns": ([{KL: 0.3 * (step / 25) ** 4} for step in range(60)], []),
    # As recorded: the first steps of a healthy run of sums.
    "a KL that grows unevenly": ([{KL: value} for value in GROWING_KL], []),
    "a KL that runs away": (
        [*({KL: 0.01} for _ in range(30)), *({KL: 0.01 * 1.5**n} for n in range(9))],
        [(32, "KL spike")],
    ),
    "not finite is left out": (
        [*noisy(30), {LOSS: math.nan, KL: math.inf}, {}, {LOSS: 9.0}],
        [(32, "loss spike")],
    ),
    "gradient norm where nothing is known of the loss": (
        [
            *({LOSS: math.nan, "optim/grad_norm": 1.0 + 0.1 * (step % 5)} for step in range(30)),
            {"optim/grad_norm": 40.0},
        ],
        [(30, "loss spike")],
    ),
}


@pytest.mark.parametrize("name", SERIES)
def test_alarms(name: str) -> None:
    series, expected = SERIES[name]
    assert alarms_of(series) == expected


def test_an_alarm_says_what_and_how_much_and_goes_on_from_its_state() -> None:
    first, again = Alarms(), Alarms()
    for step, metrics in enumerate(noisy(40)):
        first.observe(step, metrics)
    again.set_state(json.loads(json.dumps(first.get_state())))
    (event,) = again.observe(40, {LOSS: 9.0})
    assert event.startswith(
        "loss spike at learner step 40: objective/residual_std = 9, above 2.2, which is the "
        "median of the last 40 steps"
    )
    assert first.observe(40, {LOSS: 9.0}) == [event]
    assert again.observe(50, {LOSS: 99.0}) == [], "quiet for a while"
    assert again.count == 1
    assert first.get_state()["told"] == {"loss spike": 40}


# --- inspect-batch ---


def a_bad_batch(directory: Path, step: int = 12) -> Path:
    samples = (
        sample_of(3, 9),
        sample_of(10, reward=math.inf, ref_logprob=-4.25),
        sample_of(12, logprobs=[math.nan], text="x" * 5000, finish_reason="length"),
        sample_of(reward=None, error="timeout after 5 s"),
    )
    skip = Skip(reasons={7: "reward"}, mean_logprobs={7: (-0.75, math.nan, -1.0, None)})
    path = directory / bad_batch.file_name(step)
    write_bad_batch(path, BadBatch(step=step, skip=skip, batch=payload_of(batch_of(step, *samples))))
    return path


def test_inspect_batch_shows_what_a_reader_looks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_bad_batch(tmp_path)
    assert run_cli("inspect-batch", str(path)) == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "learner step 12, skipped: not finite: reward of group 7"
    assert lines[1] == "1 groups, 4 samples; gradient norm !nan"
    assert lines[3] == "! group 7, row 3, 1 uses: reward"
    assert lines[4] == "prompt      '7+5='"
    assert lines[5].endswith(
        "reward 1, versions 3-9 (staleness 9), mean log-prob -0.5 when sampled, -0.75 "
        "by the policy, 2 tokens, stop"
    )
    assert lines[6] == r"'12\n'"
    assert (
        "reward !inf, version 10 (staleness 2), mean log-prob -0.5 when sampled, !nan by the policy, "
        "reference sum -4.25" in lines[7]
    )
    assert "mean log-prob !nan when sampled" in lines[9]
    assert max(map(len, lines)) < 300
    assert lines[11].endswith(
        "reward -, offline, mean log-prob unknown when sampled, 1 tokens, stop, error 'timeout after 5 s'"
    )


def test_inspect_batch_decodes_with_a_tokenizer(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_bad_batch(tmp_path)
    assert run_cli("inspect-batch", str(path), "--tokenizer", str(tiny_models["tied"])) == 0
    assert r"'12\n'" not in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(dump_config(update_config(tiny_models["tied"])))
    assert run_cli("inspect-batch", str(a_bad_batch(tmp_path / "bad-batches"))) == 0
    assert "tokens that begin" not in (said := capsys.readouterr().out), "the tokenizer of its run reads them"
    assert r"'12\n'" not in said
    assert run_cli("inspect-batch", str(path), "--tokenizer", str(tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("what", ["missing", "torn", "something else", "another format"])
def test_inspect_batch_says_in_one_line_that_a_file_is_no_such_batch(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_bad_batch(tmp_path)
    if what == "missing":
        path.unlink()
    elif what == "torn":
        path.write_bytes(path.read_bytes()[:-20])
    elif what == "something else":
        path.write_bytes(encode(sample_of(1)))
    else:
        bad = BadBatch(step=1, skip=SKIP, batch=b"", format="agro-bad-batch-1")
        path.write_bytes(msgspec.msgpack.encode(bad))
    with pytest.raises(DataError):
        render(path)
    assert run_cli("inspect-batch", str(path)) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


def test_the_newest_five_files_are_kept(tmp_path: Path) -> None:
    paths = [a_bad_batch(tmp_path, step) for step in range(8)]
    assert sorted(tmp_path.iterdir()) == paths[3:]
    assert read_bad_batch(paths[-1])[1].step == 7
