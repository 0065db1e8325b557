"""Tests of the Triton kernels: interpreted on the CPU (TRITON_INTERPRET=1), compiled where there is a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    assert os.environ.get("TRITON_INTERPRET") == "1", "without a GPU run these tests as `make test` does"
    sys.path.insert(0, os.path.dirname(__file__))
    import interpreter

    interpreter.install()
    torch.set_num_threads(1)  # test_seeded_bugs forks

import sparse_ffn as sf  # noqa: E402
from sparse_ffn.backends.triton import columns, config, routing, schedule  # noqa: E402


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16 everywhere: two or three on every axis of a small problem, and ragged tails.

    Products are computed as on sm_90, by few programs: each walks several blocks.
    """
    monkeypatch.setattr(columns, "MAX_BYTES", 1)  # as few columns at a time as there may be
    monkeypatch.setattr(columns, "STEP", 16)
    monkeypatch.setattr(routing, "SORT", config.Sort(block=16, part=8, scan=16, columns=16, positions=16, tiles=4))
    monkeypatch.setattr(schedule, "at_once", lambda *sizes: 3)
    monkeypatch.setattr(config, "n_processors", lambda device: 1)
    with config.fixed(config.Tile(16, 16, 16, 4, 2), architecture="sm_90"):
        yield


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with sf.backend("triton"):
        yield
