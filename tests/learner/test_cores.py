"""Cores: a rank takes those that nobody uses, and gives them back."""

from __future__ import annotations

import threading

import pytest
import torch

from learner.cores import LOOK_EVERY_S, Clocks, FreeCores, Threads, read_clocks
from tests.support.configs import make_config


class TurnedClocks:
    """The clocks of a node of four cores, as the test turns them."""

    def __init__(self):
        self.now = Clocks(0.0, 0.0, 0.0)

    def run(self, used, idle, seconds=LOOK_EVERY_S):
        """Lets time pass in which the rank used so many cores, and so many idled."""
        time_s, used_s, idle_s = self.now
        self.now = Clocks(time_s + seconds, used_s + used * seconds, idle_s + idle * seconds)

    def show(self):
        return self.now


def counted(clocks, ranks, *loads):
    cores, counts = FreeCores(ranks, 4, clocks.show), []
    for load in loads:
        clocks.run(*load)
        counts.append(cores.count())
    return counts


def test_a_rank_takes_the_cores_that_idle_beside_its_own():
    assert counted(TurnedClocks(), 1, (1.0, 3.0), (3.9, 0.1), (3.0, 0.0)) == [4, 4, 3]


def test_a_rank_gives_a_core_back_to_an_actor_that_works_again():
    # Two threads on the core that is left get what one gets.
    assert counted(TurnedClocks(), 1, (2.0, 0.0), (1.1, 0.0), (1.0, 0.0)) == [2, 1, 1]


def test_a_core_that_idles_half_of_the_time_is_taken_one_that_hardly_does_is_not():
    assert counted(TurnedClocks(), 1, (1.0, 0.6), (1.0, 0.4)) == [2, 1]


def test_a_rank_that_waits_itself_wants_no_second_core():
    assert counted(TurnedClocks(), 1, (0.2, 0.9), (0.0, 0.1)) == [1, 1]


def test_ranks_of_a_node_share_what_idles():
    assert counted(TurnedClocks(), 2, (1.0, 2.0), (1.0, 0.5)) == [2, 1]


def test_there_are_never_more_than_the_machine_has():
    assert counted(TurnedClocks(), 1, (1.0, 63.0)) == [4]


def test_short_looks_say_nothing():
    clocks = TurnedClocks()
    cores = FreeCores(1, 4, clocks.show)
    clocks.run(1.0, 3.0, seconds=LOOK_EVERY_S / 4)
    assert cores.count() == 1
    clocks.run(1.0, 3.0)
    assert cores.count() == 4


def test_the_machines_clocks_go_forward():
    before, after = read_clocks(), read_clocks()
    assert all(later >= earlier for earlier, later in zip(before, after, strict=True))


def threads_of(**sections):
    """What torch computes with in a thread that follows this config, and what it says it does."""
    found = []

    def follow():
        followed = Threads(make_config(**sections)).follow()
        found.extend((followed, torch.get_num_threads()))

    before = torch.get_num_threads()
    thread = threading.Thread(target=follow)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    return tuple(found)


def test_a_number_of_cpus_is_so_many_threads_and_a_deterministic_run_has_one():
    assert threads_of(learner={"num_cpus": 2.5}) == (2, 2)
    assert threads_of(learner={"num_cpus": 0.5}) == (1, 1)
    assert threads_of(learner={"num_cpus": 3}, run={"deterministic": True}) == (1, 1)
    assert threads_of(learner={"num_cpus": "auto"}, run={"deterministic": True}) == (1, 1)
    assert threads_of(learner={"num_cpus": "auto"}) == (1, 1)


@pytest.mark.parametrize(
    ("num_cores", "num_nodes", "looks"),
    [(2, 1, False), (3, 1, True), (2, 2, True)],
    ids=["one each", "one more", "actors elsewhere"],
)
def test_auto_looks_for_cores_where_there_are_more_than_actors_and_ranks(
    monkeypatch, num_cores, num_nodes, looks
):
    looked = []
    monkeypatch.setattr("learner.cores.available_cpus", lambda: num_cores)
    monkeypatch.setattr("learner.cores.FreeCores", lambda *_: looked.append(True))
    Threads(make_config(learner={"num_cpus": "auto"}, actors={"count": 1}), num_nodes)
    assert bool(looked) == looks


def test_half_a_core_is_one_thread(monkeypatch):
    monkeypatch.setattr("learner.cores.available_cpus", lambda: 0.5)
    threads = Threads(make_config(learner={"num_cpus": "auto"}, actors={"count": 1}), num_nodes=2)
    threads._cores._last = Clocks(0.0, 0.0, 0.0)  # A look is due.
    assert threads.follow() == 1
