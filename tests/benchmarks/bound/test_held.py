import threading

from benchmarks.bound.held import Moments


def test_who_waits_for_moments_is_told_at_once_how_many_there_are() -> None:
    moments = Moments()
    moments.add(2)
    assert moments.until(2) == 2
    adds = threading.Timer(0.0, lambda: moments.add(3))
    adds.start()
    adds.join()
    assert moments.until(5) == 5
    assert moments.until(6) == 5, "after a second, so that who died is looked for"
    since_s = moments.since(2)
    assert len(since_s) == 3
    assert since_s == sorted(since_s)
