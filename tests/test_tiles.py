"""The exact result at sizes around those of matrix tiles (AMX), on any number of threads; nothing else is read.

``make sanitize`` runs these tests on emulated tiles, any test command on a processor that has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import functional
from sparse_ffn.backends import cpu

TILES = cpu.PROBLEM is None and cpu.instruction_set() in ("amx", "amx_emulated")
pytestmark = pytest.mark.skipif(not TILES, reason="this core multiplies without tiles")

ROWS = (1, 7, 8, 15, 16, 17, 0, 31, 32, 33, 48, 129, 515)
"""Rows of each expert: below those that are packed, around one and two tiles, panels that share weights, and passes."""
SIZES = (
    (1, 1, 1), (2, 3, 5), (15, 17, 16), (31, 33, 47), (32, 32, 32), (64, 96, 33), (33, 64, 130), (40, 1056, 24),
    (1090, 40, 17), (34, 16, 1061), (1024, 32, 1024),
)  # fmt: skip
"""D, G, O: steps of 32 along each sum, blocks of 1024, panels of 16 and 32 columns."""


def operands(d: int, g: int, o: int, glu: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tensors of a call in 16 bits, its index, and the gradient of its output."""

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(dtype)

    index = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(ROWS)).unsqueeze(1)
    index = index[torch.randperm(len(index))]
    tensors = {"x": numbers(len(index), d), "gate": torch.rand(len(index), 1)}
    tensors |= {"keys": numbers(len(ROWS), g, d, scale=d**-0.5), "values": numbers(len(ROWS), g, o)}
    if glu:
        tensors["gate_keys"] = numbers(len(ROWS), g, d, scale=d**-0.5)
    return tensors, index, numbers(len(index), o, scale=g**-0.5)


def step(tensors: dict[str, Tensor], index: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y = functional.expert_ffn(**leaves, index=index, activation="silu")
    return dict(zip(("y", *leaves), (y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)), strict=True))


def assert_nothing_else_is_read(
    tensors: dict[str, Tensor], index: Tensor, dy: Tensor, whole: dict[str, Tensor]
) -> None:
    """With every second token and expert NaN: what belongs to the others, down to the bit."""
    spoiled = {name: tensor.clone() for name, tensor in {**tensors, "dy": dy}.items()}
    for name, tensor in spoiled.items():
        tensor[1::2] = tensor[1::2] if name == "gate" else float("nan")
    result = step({name: spoiled[name] for name in tensors}, index, spoiled["dy"])
    sound = (torch.arange(len(index)) % 2 == 0) & (index[:, 0] % 2 == 0)
    for name in ("y", "x", "gate"):
        assert torch.equal(result[name][sound], whole[name][sound]), name


@pytest.fixture
def any_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_around_those_of_tiles(size: tuple[int, int, int]) -> None:
    i = SIZES.index(size)
    dtype = torch.float16 if i % 3 == 2 else torch.bfloat16
    tensors, index, dy = operands(*size, glu=i % 2 == 1, dtype=dtype)
    with sf.backend("reference"):
        expected = step({name: tensor.double() for name, tensor in tensors.items()}, index, dy.double())
    results = []
    with sf.backend("cpu"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(tensors, index, dy))
        assert_nothing_else_is_read(tensors, index, dy, results[0])
    for name, exact in expected.items():
        error = (results[0][name].double() - exact).norm() / exact.norm().clamp_min(1e-3)
        assert error < (2e-3 if dtype == torch.float16 else 1e-2), (name, error)
        assert all(torch.equal(other[name], results[0][name]) for other in results), name
