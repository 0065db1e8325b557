"""LRU: which experts are in the few slots of a cache; the one that was not used for longest makes place."""

from __future__ import annotations

from collections.abc import Iterable


class LRU:
    """Experts in slots 0 .. n_slots - 1.

    Args:
        n_slots: the most that are there at a time.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._slots: dict[int, int] = {}  # of each expert, the least recently used one first

    def __contains__(self, expert: int) -> bool:
        return expert in self._slots

    def take(self, expert: int) -> tuple[int, bool]:
        """The expert's slot, as the most recently used one, and whether the expert is in it already."""
        slot = self._slots.pop(expert, None)
        here = slot is not None
        if slot is None:
            slot = len(self._slots) if len(self._slots) < self.n_slots else self._slots.pop(next(iter(self._slots)))
        self._slots[expert] = slot
        return slot, here

    def waves(self, experts: Iterable[int]) -> list[list[int]]:
        """The experts in parts that fit, those that are here first: so no part takes a slot that it needs itself."""
        ordered = sorted(experts, key=lambda e: (e not in self, e))
        return [ordered[i : i + self.n_slots] for i in range(0, len(ordered), self.n_slots)]

    def clear(self) -> None:
        """No expert is here."""
        self._slots.clear()
