"""Dense products of 16-bit matrices on a CPU: widened where torch would be slow, and the same numbers either way."""

from __future__ import annotations

import pytest
import torch

from sparse_ffn.backends import cpu
from sparse_ffn.ops import products

pytestmark = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("slow", [LOW, ()])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("shape", [(1, 20, 7), (33, 40, 50), (0, 5, 6), (9, 0, 6)])
def test_sums_are_in_fp32(
    shape: tuple[int, int, int], dtype: torch.dtype, slow: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "slow_dtypes", lambda: slow)
    m, k, n = shape
    x, w, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    exact = x.double() @ w.double().t()
    for y, wanted in ((products.linear(x, w, bias), exact + bias.double()),):
        assert y.dtype == dtype
        torch.testing.assert_close(y, wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_what_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "slow_dtypes", lambda: (torch.bfloat16,))
    many, few, rows = torch.randn(64, 32), torch.randn(2, 32), torch.randn(32, 128)
    columns = torch.randn(128, 32).mT
    assert products._widens(many.bfloat16(), columns)
    assert not products._widens(few.bfloat16(), columns)  # copies of the weights would cost more than they save
    assert products._widens(few.bfloat16(), rows)  # there torch is so slow that they do not
    assert not products._widens(many.half(), rows)
    assert not products._widens(many, rows)


@pytest.mark.parametrize(
    ("machine", "instructions", "slow"),
    [
        ("x86_64", (), LOW), ("AMD64", (), LOW), ("x86_64", ("avx512_bf16",), LOW[1:]), ("aarch64", (), ()),
        ("x86_64", ("amx_tile",), ()), ("x86_64", ("avx512_bf16", "amx_tile"), ()),
    ],
)  # fmt: skip
def test_what_is_slow(
    machine: str, instructions: tuple[str, ...], slow: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        assert isinstance(products.supported(name), bool)
        query = f"_is_{name}_supported"
        assert hasattr(torch.cpu, query), "torch's question has another name now"
        monkeypatch.setattr(torch.cpu, query, lambda name=name: name in instructions)
    monkeypatch.setattr(products.platform, "machine", lambda: machine)
    assert products.slow_dtypes.__wrapped__() == slow
