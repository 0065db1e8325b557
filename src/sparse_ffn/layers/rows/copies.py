"""Copies of experts from host memory into the slots of a cache: at once, or on a stream beside the computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Copies:
    """Copies that are done when they are asked for.

    Args:
        hosts: tensors [E, ...] of all experts.
        tables: for each of them the slots, [n_slots, ...].
    """

    def __init__(self, hosts: list[Tensor], tables: list[Tensor]) -> None:
        self.pairs = list(zip(hosts, tables, strict=True))

    def start(self, places: list[tuple[int, int]]) -> None:
        """Begin to copy experts into slots that nothing will use any more: pairs of a slot and an expert."""
        for slot, expert in places:
            self._copy(slot, expert)

    def wait(self, slots: list[int]) -> None:
        """What is computed from here on finds the experts in these slots."""

    def used(self) -> None:
        """What was computed up to here has read its slots: copies that begin later may overwrite them."""

    def _copy(self, slot: int, expert: int) -> None:
        for host, table in self.pairs:
            table[slot].copy_(host[expert], non_blocking=True)


class StreamedCopies(Copies):
    """Copies on a CUDA stream of their own. Only events order them against the streams that compute."""

    def __init__(self, hosts: list[Tensor], tables: list[Tensor]) -> None:
        super().__init__(hosts, tables)
        self._stream: Any = None
        self._arrived: dict[int, Any] = {}

    def start(self, places: list[tuple[int, int]]) -> None:
        """See ``Copies``."""
        stream = self._side()
        with torch.cuda.stream(stream):
            for slot, expert in places:
                self._copy(slot, expert)
                self._arrived[slot] = stream.record_event()

    def wait(self, slots: list[int]) -> None:
        """See ``Copies``."""
        stream = self._current()
        for slot in slots:
            if slot in self._arrived:  # also if another stream has waited for it
                stream.wait_event(self._arrived[slot])

    def used(self) -> None:
        """See ``Copies``."""
        self._side().wait_stream(self._current())

    def _current(self) -> Any:
        return torch.cuda.current_stream(self.pairs[0][1].device)

    def _side(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.pairs[0][1].device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(self._current())  # which has made the tables
            for _, table in self.pairs:
                table.record_stream(self._stream)  # memory that is given back may still be written
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have a stream of their own: all that was begun is done."""
        if self._stream is not None:
            self._current().wait_stream(self._stream)
        return {**self.__dict__, "_stream": None, "_arrived": {}}
