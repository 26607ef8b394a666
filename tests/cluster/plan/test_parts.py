"""Step times against cases that were computed by hand: Llama-3-8B on H100, 64 x 8 samples of 900 tokens, 300
of them the prompt, eight learner ranks and eight actors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.plan import parts, rates
from cluster.plan.rates import DEVICES, Rate
from cluster.plan.workload import Machines, Workload
from cluster.preparation.memory import ModelShape

PARAMS = 8_000_000_000
MACHINES = Machines(DEVICES["h100"], gpus_per_node=8, network_bytes_per_s=50e9)


def make_job(**changes: Any) -> Workload:
    job = Workload(
        shape=ModelShape(PARAMS, layers=0, hidden=0, kv_width=0),
        bytes_per_param=2,
        machines=MACHINES,
        ranks=8,
        learner_gpus=1,
        actors=8,
        actor_gpus=1,
        slots=256,
        gpu_memory_share=0.9,
        groups=64,
        group_size=8,
        generated_size=8,
        prompt_tokens=300,
        new_tokens=600,
        max_new_tokens=1024,
        micro_batch_tokens=8192,
        steps=100,
        num_scored=1,
        is_recomputed=True,
        shares_prompts=False,
    )
    return dataclasses.replace(job, **changes)


def always(value: float) -> Rate:
    return Rate(value, value, value, "a test")


def test_tokens_are_those_of_the_batch_with_its_prompts_once_where_a_pass_holds_the_group() -> None:
    assert make_job().trained_tokens == 64 * 8 * 900
    assert make_job(shares_prompts=True).trained_tokens == 64 * (300 + 8 * 600)
    # Two samples of 900 tokens fill a pass of 2,300, for each counts with its prompt.
    assert make_job(shares_prompts=True, micro_batch_tokens=2300).trained_tokens == 64 * (4 * 300 + 8 * 600)
    assert make_job(uses=2).generated_tokens == 64 * 8 * 600 / 2


def test_compute_is_ten_flop_a_parameter_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "TRAIN_SHARE", always(400 / 989))
    assert parts.compute_s(make_job(), "likely") == pytest.approx(10 * 8e9 * 460_800 / (8 * 400e12))
    assert parts.compute_s(make_job(), "likely") == pytest.approx(11.5, abs=0.05)
    plain = make_job(num_scored=0, is_recomputed=False)
    assert parts.compute_s(plain, "likely") == pytest.approx(0.6 * 11.52)
    assert parts.num_passes(make_job(lora_rank=8)) == 4  # No gradient with respect to the weights.
    attending = make_job(shape=ModelShape(PARAMS, layers=32, hidden=4096))
    assert parts.flops_per_token(attending) == 2 * PARAMS + 2 * 32 * 4096 * 900


@pytest.mark.parametrize(
    ("ranks", "shared", "groups_of_the_busiest"),
    [(48, 1, 2), (100, 1, 1), (64, 1, 1), (5, 1, 13), (96, 2, 2)],
)
def test_a_group_stays_whole_on_a_rank(ranks: int, shared: int, groups_of_the_busiest: int) -> None:
    one = parts.compute_s(make_job(ranks=1, groups=1), "likely")
    job = make_job(ranks=ranks, sequence_parallel=shared)
    assert parts.compute_s(job, "likely") == pytest.approx(one * groups_of_the_busiest / shared)


def test_a_group_larger_than_a_micro_batch_takes_a_pass_without_gradient() -> None:
    assert parts.num_passes(make_job()) == 5  # Eight samples of 900 tokens are 7,200 of 8,192.
    assert parts.num_passes(make_job(group_size=16)) == 6
    whole, split = make_job(micro_batch_tokens=7200), make_job(micro_batch_tokens=7199)
    assert parts.compute_s(split, "best") == pytest.approx(parts.compute_s(whole, "best") * 6 / 5)


def test_offline_samples_are_trained_but_not_generated() -> None:
    job = make_job(generated_size=6)
    assert job.generated_tokens == 64 * 6 * 600
    assert job.trained_tokens == make_job().trained_tokens


def test_a_checkpoint_that_is_not_written_when_the_next_is_due_is_waited_for() -> None:
    job = make_job(groups=1, checkpoint_every=1, publish_every=10**9)
    times = parts.learner_times(job, "likely")
    # 12 bytes of a billion parameters: 0.24 s by PCIe, 12 s to the disk.
    between_s = times.compute_s + times.exchange_s + times.optimizer_s
    assert times.checkpoint_s == pytest.approx(12e9 / (64e9 * 0.78) + 12.0 - between_s)
    rarely = dataclasses.replace(job, checkpoint_every=100)
    assert parts.learner_times(rarely, "likely").checkpoint_s == pytest.approx(12e9 / (64e9 * 0.78) / 100)


@pytest.mark.parametrize(
    ("changes", "nodes", "num_pulling"),
    [
        ({"ranks": 5, "actors": 3}, [(5, 3)], 0),
        ({"ranks": 16}, [(8, 0), (8, 0), (0, 8)], 1),
        ({"ranks": 12, "actors": 12}, [(8, 0), (4, 4), (0, 8)], 2),
        ({"ranks": 32, "actors": 4, "actor_gpus": 4}, [(8, 0)] * 4 + [(0, 2)] * 2, 2),
        ({"ranks": 6, "actors": 3, "actor_gpus": 4}, [(6, 0), (0, 2), (0, 1)], 2),
        ({"ranks": 3, "learner_gpus": 0, "actors": 16}, [(2, 8), (1, 8)], 1),
        ({"ranks": 16, "actors": 3, "actor_gpus": 0}, [(8, 2), (8, 1)], 1),
        (
            {"ranks": 2, "actors": 3, "machines": Machines(None), "learner_gpus": 0, "actor_gpus": 0},
            [(2, 3)],
            0,
        ),
    ],
)
def test_nodes_with_actors_pull_but_for_rank_0s(
    changes: dict[str, Any], nodes: list[tuple[int, int]], num_pulling: int
) -> None:
    job = make_job(**changes)
    assert job.nodes == nodes
    assert job.pulling_nodes == num_pulling


def test_four_engines_of_four_cards_pull_70b_on_two_nodes() -> None:
    job = make_job(shape=ModelShape(70_553_706_496), ranks=32, actors=4, actor_gpus=4)
    assert parts.publish_times(job, "likely").pull_s == pytest.approx(2 * 141.1 / 3, abs=0.1)


def test_a_micro_batch_moves_the_model_three_times_within_a_node_or_between_two() -> None:
    assert 3 * parts.gather_s(make_job(), "likely") == pytest.approx(0.14, abs=0.02)
    slow = Machines(DEVICES["h100"], gpus_per_node=4, network_bytes_per_s=12.5e9)
    between_s = 3 * parts.gather_s(make_job(machines=slow), "best")
    assert between_s == pytest.approx(48e9 / 2 / (12.5e9 * 0.95))
    assert parts.gather_s(make_job(ranks=1), "likely") == 0
    assert parts.exchange_s(make_job(ranks=1), "likely") == 0


def test_traffic_that_takes_longer_than_the_computation_shows() -> None:
    slow = Machines(DEVICES["h100"], gpus_per_node=1, network_bytes_per_s=1e9)
    job = make_job(machines=slow, num_scored=0, is_recomputed=False)
    shared = dataclasses.replace(job, sequence_parallel=4)  # Two rows at a time, of four ranks each.
    assert parts.exchange_s(shared, "worst") == pytest.approx(32 * 3 * parts.gather_s(job, "worst"), rel=0.05)
    micro_batches = 8  # 460,800 tokens in eight ranks, 7,373 of 8,192 used.
    traffic_s = micro_batches * 3 * parts.gather_s(job, "best")
    assert parts.exchange_s(job, "best") == pytest.approx(traffic_s - parts.compute_s(job, "best"))


def test_a_version_is_copied_hashed_stored_pulled_and_loaded() -> None:
    one_node = make_job(ranks=4, actors=4)
    publish = parts.publish_times(one_node, "likely")
    assert 0.3 < publish.stall_s < 1.0
    assert publish.background_s == pytest.approx(1.5 + 3.0, abs=0.1)
    assert publish.pull_s == 0
    assert publish.verify_s == pytest.approx(1.5, abs=0.05)
    assert parts.publish_times(one_node, "best").pause_s == 2.0
    assert parts.publish_times(one_node, "worst").pause_s == 4.0
    assert parts.publish_times(make_job(), "likely").pull_s == 8.0  # One other node.
    assert 40 < parts.publish_times(make_job(actors=64), "likely").pull_s < 60  # Eight others.
    assert parts.publish_times(make_job(ranks=4, actors=2, actor_gpus=2), "best").pause_s == 1.0


def test_what_is_pushed_stops_learner_and_engines_for_as_long() -> None:
    near = parts.publish_times(make_job(ranks=4, actors=4, pushes="nccl"), "likely")
    assert near.pause_s == pytest.approx(16e9 / (450e9 * rates.PUSH_SHARE.likely))
    assert near.stall_s == near.pause_s + parts.gather_s(make_job(ranks=4), "likely")
    assert (near.background_s, near.pull_s, near.verify_s) == (0, 0, 0)
    far = parts.publish_times(make_job(pushes="nccl"), "likely")
    assert far.pause_s == pytest.approx(16e9 / (50e9 * rates.PUSH_SHARE.likely))
    within = make_job(ranks=1, actors=1, learner_gpus=0.5, actor_gpus=0.5, pushes="ipc")
    assert parts.publish_times(within, "likely").stall_s == pytest.approx(2 * 16e9 / (3.35e12 * 0.7))


def test_of_versions_that_change_little_little_travels() -> None:
    whole, changed = make_job(actors=64), make_job(actors=64, full_every=8)
    kept = 1 - rates.DELTA_SHARE.likely
    share = (1 + sum(1 - kept**steps for steps in range(1, 8))) / 8
    assert 0.15 < share < 0.25  # docs/performance.md: 12.9 of 63 MB.
    assert changed.travelling_bytes == pytest.approx(share * 16e9)
    before, after = (parts.publish_times(job, "likely") for job in (whole, changed))
    assert after.pull_s == pytest.approx(share * before.pull_s)
    assert after.background_s > before.background_s  # Every byte is compared.
    assert (after.stall_s, after.pause_s) == (before.stall_s, before.pause_s)
    assert make_job(full_every=8, bytes_per_param=4).travelling_bytes == 32e9


def test_evaluations_are_generated_too() -> None:
    evaluating = make_job(evaluated_tokens=64 * 8 * 600, publish_every=10**9)
    plain = make_job(publish_every=10**9)
    assert parts.generation_s(evaluating, "likely") == pytest.approx(2 * parts.generation_s(plain, "likely"))


@pytest.mark.parametrize(
    ("changes", "cards"),
    [
        ({}, 16),
        ({"actor_gpus": 0.3}, 8 + 3),  # Three on a card.
        ({"ranks": 1, "learner_gpus": 0.5, "actors": 1, "actor_gpus": 0.5}, 1),
        ({"ranks": 1, "learner_gpus": 0.5, "actors": 3, "actor_gpus": 0.4}, 1 + 1),
        ({"ranks": 1, "learner_gpus": 0.25, "actors": 1, "actor_gpus": 0}, 1),
        ({"ranks": 1, "learner_gpus": 0, "actors": 2, "actor_gpus": 4}, 8),
        ({"ranks": 3, "learner_gpus": 0, "actors": 3, "actor_gpus": 0.6}, 3),
    ],
)
def test_cards_are_paid_for_as_a_whole(changes: dict[str, Any], cards: int) -> None:
    assert make_job(**changes).num_gpus == cards


def test_background_that_outlasts_the_steps_between_two_versions_is_waited_for() -> None:
    quick = make_job(groups=1)
    between_s = (
        parts.compute_s(quick, "worst")
        + parts.exchange_s(quick, "worst")
        + parts.learner_times(quick, "worst").optimizer_s
    )
    publish = parts.publish_times(quick, "worst")
    waited_s = publish.stall_s + publish.background_s - between_s
    assert parts.learner_times(quick, "worst").publish_s == pytest.approx(waited_s)
    rarely = make_job(groups=1, publish_every=100)
    assert parts.learner_times(rarely, "worst").publish_s == pytest.approx(publish.stall_s / 100)


def test_generation_is_tokens_by_the_actors_rate_and_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "actor_tokens_per_s", lambda job, case: 9000.0)
    assert parts.generation_s(make_job(publish_every=10**9), "likely") == pytest.approx(4.27, abs=0.01)
    assert parts.generation_s(make_job(), "best") == pytest.approx(307_200 / 72_000 + 2.0)


def test_an_engine_step_reads_the_weights_and_the_cache() -> None:
    shape = ModelShape(PARAMS, layers=32, hidden=4096, kv_width=1024)
    job = make_job(shape=shape, prompt_tokens=300, new_tokens=600)
    read = 16e9 + 256 * 600 * 131_072
    at_least_s = rates.ENGINE_STEP_S.likely + read / (3.35e12 * 0.7)
    assert job.cache_bytes_per_token == 131_072
    assert at_least_s < parts.engine_step_s(job, 256, "likely") < at_least_s * 1.1
    # 0.9 of 80 GB, without reserve and weights, hold 53 GB: 674 sequences of 600 tokens.
    assert parts.running_slots(dataclasses.replace(job, slots=4096)) == pytest.approx(53e9 / (600 * 131_072))
    large = dataclasses.replace(job, shape=ModelShape(70_000_000_000, 80, 8192, 0, 1024))
    assert parts.running_slots(large) == 0
    assert parts.actor_tokens_per_s(large, "likely") == 0
    assert parts.running_slots(dataclasses.replace(large, actor_gpus=4)) > 100


def test_a_better_case_is_never_slower() -> None:
    for job in (make_job(), make_job(actors=32, groups=4, publish_every=3), make_job(is_offloaded=True)):
        worst, likely, best = (parts.bound_s(job, case) for case in rates.CASES)
        assert best < likely < worst


def test_a_cpu_has_the_rates_that_were_measured() -> None:
    (small, small_rate), (large, large_rate) = ((333_888, 100.0), (23_072_256, 10.0))
    points = ((small, small_rate), (large, large_rate))
    assert rates._between(points, small) == small_rate
    assert rates._between(points, large) == pytest.approx(large_rate)
    assert large_rate > rates._between(points, 2 * large) > rates._between(points, 4 * large)
    assert rates.cpu_train_tokens_per_s(333_888) > rates.cpu_train_tokens_per_s(23_000_000) > 0
    cpu = make_job(machines=Machines(None), learner_gpus=0, actor_gpus=0, ranks=1, actors=1)
    assert parts.bound_s(cpu, "likely") > 1000


@pytest.mark.parametrize("name", sorted(rates.all_rates()))
def test_every_rate_has_a_source_and_its_cases_in_order(name: str) -> None:
    rate = rates.all_rates()[name]
    assert len(rate.source) > 10
    assert rate.worst <= rate.likely <= rate.best or rate.worst >= rate.likely >= rate.best
