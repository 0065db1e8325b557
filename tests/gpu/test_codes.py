"""Products with quantised rows out of the Triton kernels against float64 of the numbers that the codes stand for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from net import Case, compare, cvmm_case, gradient, guarded, magnitudes, results, traps
from test_quantized import KINDS, stacks
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import ops
from sparse_ffn.backends.triton import codes as kernels
from sparse_ffn.compress.quantizer import quantize
from sparse_ffn.layers.rows import QuantizedRows
from sparse_ffn.ops import Codes, Units
from sparse_ffn.ops.quantized_cvmm import triton as quantized_cvmm

pytestmark = pytest.mark.usefixtures("small_blocks")
FORMS = ("plain", "gather", "scatter", "gather, scatter, reduction")


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_COLUMNS", 32)


def coded_case(
    kind: str, down: bool, dtype: torch.dtype, routing: str, form: str, sizes: tuple[int, int] = (19, 48)
) -> tuple[Case, Codes]:
    """CVMM by the numbers of rows [E, G, C] of codes, G, C = sizes."""
    (G, C), config = sizes, KINDS[kind]
    case = cvmm_case(routing, dtype, form=form, sizes=(G, C) if down else (C, G))
    bits = config.bits_of(down)
    rows = torch.randn(int(case.tensors["weight"].shape[0]), G, C).to(dtype)
    codes = quantize(rows, bits, config.group_of(C, bits), config.symmetric_at(bits), config.scale)
    numbers = codes.dense().double()
    case.tensors["weight"] = numbers if down else numbers.mT
    case.trained = tuple(name for name in case.trained if name != "weight")
    return case, codes


def check_codes(case: Case, codes: Codes, down: bool, device: str, *, train: bool = True) -> None:
    def product(weight: Tensor, x: Tensor, expert: Tensor, **rest: Tensor | int) -> Tensor:
        return ops.quantized_cvmm(x, placed, expert, down=down, **rest)

    case = replace(case, trained=case.trained if train else ())
    floats = {n: t for n, t in case.tensors.items() if t.is_floating_point()}
    narrow = {n: t.to(device, torch.float32 if n == "reduction" else case.dtype) for n, t in floats.items()}
    narrow |= {n: t.to(device) for n, t in case.tensors.items() if n not in floats}
    wide = {n: t.double() if n in floats else t for n, t in narrow.items()}
    wide["weight"] = case.tensors["weight"].to(device)
    grad = gradient(case, results(case, wide)["output"].shape, device)
    with sf.backend("reference"):
        expected, scales = results(case, wide, grad), magnitudes(case, wide, grad)
    placed = codes.each(lambda t: guarded(t.to(device)))
    narrow = {n: guarded(t) for n, t in narrow.items()}
    with sf.backend("triton"), traps():
        actual = results(replace(case, op=product), narrow, None if grad is None else guarded(grad))
    compare(case.dtype, narrow, actual, expected, scales)


@pytest.mark.parametrize(
    ("kind", "down", "few"),
    [("4 bits", False, True), ("4 bits", True, False), ("8 bits", False, False), ("8 bits", True, True)],
    ids=["4 bits, up, decode", "4 bits, down, sorted", "8 bits, up, sorted", "8 bits, down, decode"],
)
def test_products(kind: str, down: bool, few: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_cvmm, "use_decode", lambda n_slots, n_experts: few)
    case, codes = coded_case(kind, down, torch.float32, "one token, void slots", FORMS[-1])
    check_codes(case, codes, down, device)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = [
    pytest.param(*of, DTYPES[i % 3], FORMS[(i + i // 4) % 4], id=", ".join(map(str, of)))
    for i, of in enumerate(itertools.product(KINDS, (False, True), (False, True)))  # kind, down, few
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "down", "few", "dtype", "form"), EVERY)
def test_products_of_every_kind(
    kind: str, down: bool, few: bool, dtype: torch.dtype, form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without tokens, void slots, each expert once, no token at all."""
    monkeypatch.setattr(quantized_cvmm, "use_decode", lambda n_slots, n_experts: few)
    routing = dict(zip(FORMS, ("no token", "k = E", "ragged", "half of the slots void"), strict=True))[form]
    case, codes = coded_case(kind, down, dtype, routing, form)
    check_codes(case, codes, down, device, train=not few)


@pytest.mark.parametrize("tokens", [1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (32, 33))])
def test_a_layer_of_codes(tokens: int, device: str) -> None:
    """The FFN out of them, an odd number of units, experts that no token asks for: as ``expert_ffn`` of the numbers."""
    found = stacks(KINDS["4 bits, values in 8"], torch.float32)
    E, G, D = found["keys"].shape
    placed = {name: of.each(lambda t: guarded(t.to(device))) for name, of in found.items()}
    bias = torch.randn(E, G, device=device)
    units = Units(**{name: QuantizedRows(of) for name, of in placed.items()}, key_bias=bias)
    x, gate = torch.randn(tokens, D, device=device), torch.rand(tokens, 2, device=device)
    index = torch.tensor([[3, 1]], device=device).repeat(tokens, 1)
    with sf.backend("triton"), traps(), torch.no_grad():
        y = units.values.ffn(guarded(x), units, index, gate, activation="silu")
    numbers = {name: of.to(torch.float64).dense().to(device) for name, of in found.items()}
    with sf.backend("reference"):
        exact = Units(**numbers, key_bias=bias.double())
        expected = ops.expert_ffn(x.double(), exact, index, gate.double(), activation="silu")
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_scales_of_experts_without_slots_are_not_read(device: str) -> None:
    codes = stacks(KINDS["4 bits"], torch.float32)["keys"]
    codes.scale[:3] = torch.nan
    placed = codes.each(lambda t: t.to(device))
    expert = torch.tensor([3, 4, 5] * 2, device=device)
    with sf.backend("triton"):
        y = ops.quantized_cvmm(torch.randn(6, 48, device=device), placed, expert, down=False)
    assert y.isfinite().all()
    assert not y[2::3].any()
