"""Tuning with the kernels themselves, at a tiny size: interpreted with a clock that is made up, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import OutOfResources

from sparse_ffn.backends import kept
from sparse_ffn.backends.triton import columns, combine, config, grouped, hidden, outer, routing, tuned
from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.triton.tuned import Card, Tuned
from sparse_ffn.ops import Units
from sparse_ffn.ops.expert_ffn import triton as expert_ffn
from sparse_ffn.tune import runner as module
from sparse_ffn.tune.problems import DTYPES, Problem, problems
from sparse_ffn.tune.runner import DeviceRunner, arithmetic
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
    search = Search(ENTRIES, runner, cache=0, seconds=1e9, kernels=("two",), say=lambda line: None)
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
    search = Search(ENTRIES, runner, cache=0, seconds=1e9, kernels=("two",), say=lines.append)
    assert search.run([TINY])
    assert [line for line in lines if f"16x32x16/4/2: does not run ({type(failure).__name__})" in line]


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """Tables of the small tiles, instead of one fixed tile."""
    monkeypatch.setattr(config, "_fixed", None)
    small = {(kernel, "fp32"): (Tile.parse(tiles[0]),) for kernel, tiles in TILES.items()}
    monkeypatch.setattr(config, "TABLES", dict.fromkeys(config.TABLES, small))


@pytest.mark.parametrize("cache", [0, 50 << 20], ids=["no cache", "an H100's"])
@pytest.mark.parametrize("problem", list(problems(["half", "tf32"])), ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_step_looks_up_what_tuning_chooses(problem: Problem, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's code alone: a class that no step looks up would be decided by noise."""
    seen: set[tuned.Key] = set()

    class Seen(Tuned):
        def tile(self, kernel: str, kind: str, m: int, n: int, depth: float) -> None:
            rows = tuned.size_class(m, tuned.WIDTHS) if kernel == "outer" else m
            seen.add((kernel, kind, rows, tuned.size_class(n, tuned.WIDTHS), tuned.size_class(depth, tuned.WIDTHS)))

    monkeypatch.setattr(columns, "cache_bytes", lambda device: cache)
    for products in (combine, grouped, hidden, outer, routing):
        monkeypatch.setattr(products, "launch", lambda *arguments, **meta: None)
    (T, D, E, G, K), dtype = (problem.T, problem.D, problem.E, problem.G, problem.K), DTYPES[problem.kind]
    table = Seen({(problem.kind, tuned.size_class(problem.rows, tuned.ROWS)): 64})
    with FakeTensorMode(), config.fixed(architecture="sm_90"), config.using(table), arithmetic(problem.kind):
        x, *stacks = (torch.empty(*shape, dtype=dtype) for shape in ((T, D), *[(E, G, D)] * 3))
        units = Units(stacks[0], stacks[1], stacks[2] if problem.glu else None, None)
        gate, index = torch.empty(T, K), torch.empty(T, K, dtype=torch.int64)
        y, saved = expert_ffn.forward(x, units, index, gate, None, "silu")
        expert_ffn.backward(y, x, units, gate, None, saved, True, "silu")
    assert {key for key in seen if key[0] != "pair"} == problem.coordinates(64, cache).keys()
