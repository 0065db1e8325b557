"""Threads of Python, and `backend` blocks that overlap."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.backends.choice import explain

from .feature import feature
from .layers import assert_near, build, step, tokens

Results = dict[str, Tensor]


def _at_once(*calls: Callable[[], Results]) -> Results:
    """Each in a thread of its own, which has the blocks around this call."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return _joined(pool.map(lambda each: each[0].run(each[1]), [(contextvars.copy_context(), c) for c in calls]))


def _joined(results: Iterable[Results]) -> Results:
    return {f"{i}: {key}": t for i, found in enumerate(results) for key, t in found.items()}


@feature("threads that train")
def training(name: str) -> None:
    """Two at once, a layer each, one of them on the reference: gradients are those of one after the other."""
    layers = [build(name), build(name)]

    def train(i: int) -> Results:
        return _joined(step(layers[i], tokens(30, seed=seed)) for seed in range(5))

    def on_the_reference() -> Results:
        with sf.backend("reference"):
            return train(1)

    expected = _joined([train(0), on_the_reference()])
    assert_near(_at_once(lambda: train(0), on_the_reference), expected, 1e-6)


@feature("threads that share a layer")
def sharing(name: str) -> None:
    """Two at once, in evaluation: outputs are those of one after the other, to the bit."""
    layer = build(name).eval()

    @torch.no_grad()
    def serve(first: int) -> Results:
        return {str(n): layer(tokens(n, seed=n)) for n in range(first, 30, 2)}

    assert_near(_at_once(lambda: serve(1), lambda: serve(2)), _joined([serve(1), serve(2)]), 0)


@feature("`backend` blocks that overlap")
def overlapping(name: str) -> None:
    """Ending in the order in which they began they leave nothing forced; a backward pass has its forward's backend."""
    layer, x, before = build(name), tokens(12), explain()
    expected = step(layer, x)
    first, second = ExitStack(), ExitStack()

    def call(x: Tensor) -> Tensor:
        first.enter_context(sf.backend("reference"))
        second.enter_context(sf.backend("torch"))
        first.close()
        y: Tensor = layer(x)
        assert "torch (forced" in explain()
        second.close()
        return y

    assert_near(step(layer, x, call), expected)
    assert explain() == before


FEATURES = (training, sharing, overlapping)
