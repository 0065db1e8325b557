"""Products of the torch backend an expert: by torch's grouped kernel where there is one, by a loop elsewhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_ffn as sf
from sparse_ffn.ops import segments
from sparse_ffn.ops.segments import Segments, segment_mm, segment_outer

OFFSETS = [0, 0, 7, 8, 8, 20]  # experts without a row, with one, with several


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of torch's grouped product, which has a CPU implementation to stand in for the kernel."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    calls: list[Any] = []
    product = F.grouped_mm

    def of_compute_capability_10(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        """It leaves anything for a group without rows, and behind all groups."""
        calls.append((left, right))
        out = product(left, right, offs=offs)
        if left.dim() == right.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        else:
            out[offs[-1] :] = float("nan")
        return out

    monkeypatch.setattr(segments, "has_grouped_kernel", lambda device: True)
    monkeypatch.setattr(F, "grouped_mm", of_compute_capability_10)
    return calls


def close(actual: Tensor, expected: list[Tensor] | Tensor) -> None:
    expected = torch.cat(expected) if isinstance(expected, list) else expected
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "aligned"), [(16, 24, True), (16, 20, False), (12, 16, False)])
def test_products_of_segments(grouped: list[Any], m: int, n: int, aligned: bool, transposed: bool) -> None:
    at = Segments(torch.tensor(OFFSETS, dtype=torch.int32))
    rows, right = torch.randn(20, m).bfloat16(), torch.randn(20, n).bfloat16()
    weight = torch.randn(5, n, m).bfloat16().mT if transposed else torch.randn(5, m, n).bfloat16()
    parts = [slice(a, b) for a, b in pairwise(OFFSETS)]
    close(segment_mm(rows, weight, at), [rows[part].double() @ weight[e].double() for e, part in enumerate(parts)])
    by_kernel = len(grouped)
    close(
        segment_outer(rows, right, at), torch.stack([rows[part].double().t() @ right[part].double() for part in parts])
    )
    assert len(grouped) == by_kernel + (m % 8 == n % 8 == 0)
    if aligned:
        assert by_kernel == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_take_the_loop(grouped: list[Any], dtype: torch.dtype) -> None:
    at = Segments(torch.tensor(OFFSETS, dtype=torch.int32))
    rows, weight = torch.randn(20, 16, dtype=dtype), torch.randn(5, 16, 24, dtype=dtype)
    segment_mm(rows, weight, at)
    assert not grouped


def test_memory_that_is_not_aligned_takes_the_loop(grouped: list[Any]) -> None:
    at = Segments(torch.tensor(OFFSETS, dtype=torch.int32))
    rows = torch.randn(20 * 16 + 1).bfloat16()[1:].view(20, 16)
    weight = torch.randn(5, 16, 24).bfloat16()
    expected = segment_mm(rows.clone(), weight, at)
    n_calls = len(grouped)
    assert torch.equal(segment_mm(rows, weight, at), expected)
    assert len(grouped) == n_calls == 1


@pytest.mark.parametrize("tokens", [0, 13])
def test_a_layer_computes_the_same_by_the_grouped_product(grouped: list[Any], tokens: int) -> None:
    layer = sf.SigmaMoE(16, 6, 8, 2, glu=True, bias=True, dtype=torch.bfloat16)
    x = torch.randn(tokens, 16, dtype=torch.bfloat16)
    with sf.backend("torch"):
        y = layer(x)
        y.sum().backward()
    assert bool(grouped) == (tokens > 0)
    wide = sf.SigmaMoE(16, 6, 8, 2, glu=True, bias=True, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    with sf.backend("reference"):
        expected = wide(x.double())
        expected.sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=4e-2, atol=4e-2)
    for (name, parameter), other in zip(layer.named_parameters(), wide.parameters(), strict=True):
        scale = max(1.0, other.grad.abs().max().item())
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=0, atol=4e-2 * scale, msg=name)


def test_a_cpu_takes_the_loop() -> None:
    assert not segments.has_grouped_kernel(torch.device("cpu"))
