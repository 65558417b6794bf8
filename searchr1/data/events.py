"""What happened to rows while they were read: counted, with the first place of each kind."""

from __future__ import annotations

from collections import Counter


class Events:
    """Counts of what a user should see of rows that were read all the same."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str) -> None:
        """Count one event, said of rows: `have null items among the gold answers`."""
        self._counts[what] += 1
        self._first.setdefault(what, place)

    def sentences(self) -> list[str]:
        """One for each kind."""
        return [f"{count:,} rows {what} (the first: {self._first[what]})" for what, count in self._counts.items()]
