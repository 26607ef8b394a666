"""Keeps stored groups in two orders at once, by insertion and by age; every operation is O(log n)."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

from sortedcontainers import SortedKeyList, SortedList


class Entry(NamedTuple):
    """A group's place in the orders. Entries compare by age: the oldest version first, of equals the one
    inserted earlier.

    `sequence` rises with every insertion.
    """

    oldest_version: int
    sequence: int
    group_id: int


class Order:
    """Gives entries by rank: `order.by_insertion[0]` is the first that came, `order.by_age[0]` the oldest.

    order.add(Entry(oldest_version=3, sequence=0, group_id=7))
    order.num_older(4)                      # 1
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.by_age = SortedList(entries)
        self.by_insertion = SortedKeyList(self.by_age, key=attrgetter("sequence"))

    def __len__(self) -> int:
        return len(self.by_age)

    def add(self, entry: Entry) -> None:
        """Adds an entry that is not here yet."""
        self.by_age.add(entry)
        self.by_insertion.add(entry)

    def remove(self, entry: Entry) -> None:
        """Removes an entry. Raises ValueError when it is not here."""
        self.by_age.remove(entry)
        self.by_insertion.remove(entry)

    def num_older(self, version: int) -> int:
        """Returns how many entries are older than `version`: the age rank of the first that is not."""
        return self.by_age.bisect_left((version,))  # A shorter tuple sorts before all of that version.

    def between(self, start: int | None, stop: int) -> list[Entry]:
        """Returns the entries with `start <= oldest_version < stop`, oldest first; from the oldest on when
        `start` is None.

        It costs O(log n) and their number.
        """
        return list(self.by_age.irange(None if start is None else (start,), (stop,)))
