"""Passes as CUDA graphs: when one is captured, and what is timed where none can be. A stand-in plays the card."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.measuring import replay
from benchmarks.measuring.timing import Run


class Card:
    """What happens, in order; ``waits`` and ``fails`` say what a call does wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.happened: list[str] = []
        self.mode, self.waits, self.fails = "default", False, False
        for name in ("set_sync_debug_mode", "synchronize", "current_stream", "empty_cache", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    def synchronize(self) -> None:
        self.happened.append("wait")

    def empty_cache(self) -> None:
        pass

    def current_stream(self) -> str:
        return "a stream"

    def CUDAGraph(self) -> Card:
        return self

    def replay(self) -> None:
        self.happened.append("replay")

    @contextlib.contextmanager
    def graph(self, graph: Card, stream: str) -> Iterator[None]:
        assert (graph, stream) == (self, "a stream")
        self.happened.append("capture")
        yield
        self.happened.append("captured")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def call(self) -> None:
        if self.waits and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.happened.append("call")

    @property
    def run(self) -> Run:
        return Run(lambda: self.happened.append("prepare"), self.call)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def of(happened: list[str], call: Callable[[], object]) -> list[str]:
    happened.clear()
    call()
    return list(happened)


def test_a_call_that_never_waits_is_captured_once_and_replayed(card: Card) -> None:
    found = replay.captured(card.run)
    assert found is not None
    # each call with gradients of its own, the captured one included
    assert card.happened == ["prepare", "call"] * 4 + ["prepare", "wait", "capture", "call", "captured"]
    assert of(card.happened, found.prepare) == []
    assert of(card.happened, found.call) == ["replay"]


def test_one_that_waits_is_never_tried(card: Card) -> None:
    card.waits = True
    assert replay.captured(card.run) is None
    assert card.happened == ["prepare"]
    assert card.mode == "default"


def test_one_whose_capture_fails_is_timed_as_it_is(card: Card) -> None:
    card.fails = True
    assert replay.captured(card.run) is None
    assert card.happened[-5:] == ["call", "captured", "wait", "capture", "captured"]  # the second of nothing


def test_graphs_leave_the_memory_that_a_pass_by_itself_needs(card: Card) -> None:
    left = iter((1000, 500, 390))  # a graph of 100 needs as much, and twice the 150 that the largest pass takes
    runs, peaks = dict.fromkeys("abc", card.run), {"a": 150, "b": 100, "c": 100}
    assert replay.graphs(runs, peaks, lambda: next(left)).keys() == {"a", "b"}


def test_the_hosts_time_is_that_until_a_call_returns(card: Card) -> None:
    found = replay.host_seconds(card.run, samples=3)
    assert card.happened == ["prepare", "wait", "call"] * 3 + ["wait"]
    assert found.rounds == 3
    assert found.low >= 0
