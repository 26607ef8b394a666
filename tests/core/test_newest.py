"""A dict that forgets its oldest."""

from __future__ import annotations

from core.newest import Newest


def test_the_oldest_is_forgotten_and_what_is_put_again_is_new() -> None:
    names: Newest[int] = Newest(2)
    names["a"], names["b"], names["a"], names["c"] = 1, 2, 3, 4
    assert dict(names) == {"a": 3, "c": 4}
    assert names.get("b") is None
