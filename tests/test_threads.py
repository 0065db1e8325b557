"""How the CPU core shares its work out to threads (csrc/cpu/split.h), weighed by benchmarks/threads.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sparse_ffn as sf
from benchmarks import threads
from benchmarks.shapes import MOE_SHAPES, MoEShape
from sparse_ffn.backends import cpu

needs_core = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no CPU core")
LEAST_WORK = 512
"""Tokens from which every pass has enough work for 8 threads."""

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return threads.build(tmp_path_factory.mktemp("threads"), "generic" if cpu.PROBLEM else cpu.instruction_set())


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize("routing", threads.ROUTINGS)
@pytest.mark.parametrize("shape", [s for s in MOE_SHAPES if s.T >= LEAST_WORK], ids=str)
def test_eight_threads_have_equal_shares_of_every_pass(program: Path, shape: MoEShape, routing: str) -> None:
    slots = threads.routed(shape, threads.ROUTINGS[routing])
    found = threads.balance(program, shape, "fp32", slots, [1, 2, 4, 8])
    assert set(found) == {"route", "select", "up, dh", "down, dx", "dscores", "dkeys, dvalues", "drouter"}
    assert {name: ratios[0] for name, ratios in found.items()} == dict.fromkeys(found, 1.0)
    assert max(found.pop("drouter")) < 1.25  # of 412 columns, 26 vectors that are not cut: a thirtieth of another pass
    assert {name: ratios for name, ratios in found.items() if max(ratios) > 1.1} == {}


@needs_compiler
@pytest.mark.exhaustive
def test_the_simulation_prints_a_table_for_each_routing(capsys: pytest.CaptureFixture[str]) -> None:
    found = threads.main(["--shapes", "30,16,4,8,2", "--dtype", "bf16", "--threads", "1", "3", "--isa", "generic"])
    assert [(shape, dtype, name) for shape, dtype, name in found] == [
        ("30,16,4,8,2", "bf16", name) for name in threads.ROUTINGS
    ]
    printed = capsys.readouterr().out
    assert "30,16,4,8,2, bf16, skewed routing" in printed
    assert "slowest thread over the mean  1 threads  3 threads" in printed
    assert "decode down                        1.00       1.50" in printed  # of 4 vectors one thread has 2


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_core
@pytest.mark.parametrize("hot", [0, 5])
def test_an_expert_with_most_of_the_slots_changes_no_bit_on_any_number_of_threads(
    torch_threads: None, hot: int
) -> None:
    """Its gradient is cut finer, and for five threads the tokens are cut, too."""
    x = torch.randn(90, 26 * 16, requires_grad=True)
    keys, values = (torch.randn(6, 20, 26 * 16, requires_grad=True) for _ in range(2))
    index = torch.where(torch.arange(90) % 9 == 0, torch.arange(90) % 6, hot).unsqueeze(1)
    gate = torch.rand(90, 1, requires_grad=True)
    leaves, results = (x, keys, values, gate), []
    for n in (1, 2, 5, 8):
        torch.set_num_threads(n)
        with sf.backend("cpu"):
            y = sf.functional.expert_ffn(x, keys, values, index, gate)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_core
def test_a_token_that_names_an_expert_twice_changes_no_bit_on_any_number_of_threads(torch_threads: None) -> None:
    """Where its two slots lie side by side and their sums take several blocks, as 600 units do."""
    x, keys, values = torch.randn(33, 7), torch.randn(3, 600, 7), torch.randn(3, 600, 5)
    index, gate, results = torch.randint(0, 3, (33, 3)), torch.rand(33, 3), []
    leaves = [t.requires_grad_() for t in (x, keys, values, gate)]
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        with sf.backend("cpu"):
            y = sf.functional.expert_ffn(*leaves[:3], index, gate)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_core
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [2400, 1200, 99], ids=["one slot a row", "two, in order", "many, in none"])
def test_cvmm_of_many_slots_is_right_and_the_same_on_any_number_of_threads(
    rows: int, transposed: bool, torch_threads: None
) -> None:
    """So many that the rows of the output are cut, where the slots of each expert ascend in them."""
    S, E, M, L = 2400, 3, 40, 150
    index = torch.arange(S) * rows // S if rows > 99 else torch.randint(0, rows, (S,))
    expert = torch.rand(S // 2, E).topk(2).indices.flatten()
    x, weight = torch.randn(rows, M, requires_grad=True), torch.randn(E, M, L) / 8
    weight = (weight.mT.contiguous().mT if transposed else weight).requires_grad_()
    upstream, results = torch.randn(rows, L), []

    def step(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        y = sf.functional.cvmm(x, weight, expert, gather_index=index, scatter_index=index, n_out=rows)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), upstream.to(y.dtype))]

    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        with sf.backend("cpu"):
            results.append(step(x, weight))
    with sf.backend("reference"):
        expected = step(x.double(), weight.double())
    for result in results:
        assert all(map(torch.equal, result, results[0]))
        for a, b in zip(result, expected, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
