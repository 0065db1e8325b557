"""Tuning with the kernels themselves, at a tiny size: interpreted with a clock that is made up, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from sparse_ffn.backends import kept
from sparse_ffn.backends.triton import config, grouped, hidden, tuned
from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.triton.tuned import Card, Tuned
from sparse_ffn.tune import runner as module
from sparse_ffn.tune.problems import Problem
from sparse_ffn.tune.runner import DeviceRunner
from sparse_ffn.tune.search import Search

TINY = Problem("fp32", 3, 4, 1, 20, 16, glu=True)
TILES = {
    "one": ("16x16x16/4/2", "16x32x16/4/2"),
    "two": ("16x16x16/4/2", "16x32x16/4/2"),
    "outer": ("16x16x16/4/2", "32x16x16/4/2"),
    "pair": ("16x16x16/4/2", "32x16x16/4/2"),
}
ENTRIES = [(kernel, "fp32", Tile.parse(t)) for kernel, tiles in TILES.items() for t in tiles]


def launched(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles of the products that are launched from here on."""
    tiles: list[Tile] = []
    launch = grouped.launch

    def spy(kernel: object, grid: int, *arguments: object, **meta: int) -> None:
        sizes = (meta[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"))
        tiles.append(Tile(*sizes))
        launch(kernel, grid, *arguments, **meta)

    for products in (grouped, hidden):
        monkeypatch.setattr(products, "launch", spy)
    return tiles


def test_a_search_over_the_kernels(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_tables: None
) -> None:
    monkeypatch.setattr(module, "MOST", 1)
    monkeypatch.setattr(module, "LEAST", 1)
    tiles = launched(monkeypatch)
    wide = Tile.parse("16x32x16/4/2")

    def stopwatch(call: Callable[[], object]) -> float:
        tiles.clear()
        call()
        return 1.0 - 0.1 * tiles.count(wide)  # each launch of it saves time

    runner = DeviceRunner(torch.device(device), stopwatch)
    search = Search(ENTRIES, runner, seconds=1e9, kernels=("two",), say=lambda line: None)
    assert search.run([TINY])
    assert search.found.heights == {("fp32", 16): 16}
    assert search.found.tiles == {("two", "fp32", 16, 64, 64): wide}

    # stored, loaded, and launched by a later call
    monkeypatch.setenv(kept.DIRECTORY_VARIABLE, str(tmp_path))
    card = Card("a card", "sm_90")
    tuned.save(search.found, card)
    loaded = tuned.load(card, ENTRIES)
    assert loaded is not None
    tiles.clear()
    assert runner.check(TINY, loaded) is None
    assert wide in tiles


def test_a_wrong_result_is_seen(device: str, monkeypatch: pytest.MonkeyPatch, small_tables: None) -> None:
    runner = DeviceRunner(torch.device(device), lambda call: 0.0)
    assert runner.check(TINY, Tuned()) is None
    multiply = grouped.multiply

    def wrong(plan: object, a: torch.Tensor, *rest: object, **options: object) -> None:
        multiply(plan, a * 1.01, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(grouped, "multiply", wrong)
    assert "of the output" in str(runner.check(TINY, Tuned()))


@pytest.mark.parametrize(
    "failure", [RuntimeError("PassManager::run failed"), OutOfResources(300, 200, "shared memory")]
)
def test_a_candidate_that_does_not_compile_ends_nothing(
    failure: Exception, device: str, monkeypatch: pytest.MonkeyPatch, small_tables: None
) -> None:
    monkeypatch.setattr(module, "MOST", 1)
    monkeypatch.setattr(module, "LEAST", 1)
    launch = grouped.launch

    def fails(kernel: object, grid: int, *arguments: object, **meta: int) -> None:
        if meta["BLOCK_N"] == 32:
            raise failure
        launch(kernel, grid, *arguments, **meta)

    for products in (grouped, hidden):
        monkeypatch.setattr(products, "launch", fails)
    lines: list[str] = []
    runner = DeviceRunner(torch.device(device), lambda call: 1.0)
    search = Search(ENTRIES, runner, seconds=1e9, kernels=("two",), say=lines.append)
    assert search.run([TINY])
    assert [line for line in lines if f"16x32x16/4/2: does not run ({type(failure).__name__})" in line]


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """Tables of the small tiles, instead of one fixed tile."""
    monkeypatch.setattr(config, "_fixed", None)
    small = {(kernel, "fp32"): (Tile.parse(tiles[0]),) for kernel, tiles in TILES.items()}
    monkeypatch.setattr(config, "TABLES", dict.fromkeys(config.TABLES, small))
