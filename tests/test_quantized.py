"""Quantised experts: the codes, the layers that compute with them on every backend, their copies, and what is refused.

The oracles are a quantiser in NumPy, torchao's, and ``expert_ffn`` in float64 of the numbers that the codes stand for.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flat
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparse_ffn as sf
from sparse_ffn import ExpertQuantization, dequantize_experts_, integrations, quantize_experts_
from sparse_ffn.backends import cpu
from sparse_ffn.compress import quantization_error
from sparse_ffn.compress.quantizer import quantize
from sparse_ffn.layers.rows import QuantizedRows
from sparse_ffn.ops import Codes, quantized_cvmm
from sparse_ffn.ops.activations import ACTIVATIONS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
KINDS = {
    "4 bits": ExpertQuantization(group_size=8),
    "4 bits, symmetric, a group a row": ExpertQuantization(group_size=None, symmetric=True, scale="max"),
    "8 bits": ExpertQuantization(bits=8),
    "8 bits, asymmetric, groups": ExpertQuantization(bits=8, group_size=4, symmetric=False),
    "4 bits, values in 8": ExpertQuantization(group_size=16, values_bits=8),
}
kinds = pytest.mark.parametrize("kind", KINDS)

# ------------------------------------------------------------------------------------------------------- the codes


def by_numpy(w: np.ndarray, bits: int, symmetric: bool, scale: str) -> tuple[float, int, np.ndarray]:
    """Scale, zero point and codes (the zero point's scheme, signed if symmetric) of one group of fp32 numbers."""
    best = None
    for c in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7) if scale == "mse" else (1.0,):
        c = np.float32(c)
        if symmetric:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            s, z = c * np.abs(w).max() / np.float32(high), 0
        else:
            low, high = 0, 2**bits - 1
            least, most = c * min(np.float32(0), w.min()), c * max(np.float32(0), w.max())
            s = (most - least) / np.float32(high)
            z = int(np.clip(np.round(-least / s), 0, high)) if s else 0
        q = np.clip(np.round(w / s) + z, low, high) if s else np.zeros_like(w)
        error = ((w - (q - np.float32(z)) * s) ** 2).sum()
        if best is None or error < best[0] * (1 - 1e-6):
            best = (error, s, z, q)
    assert best is not None
    return best[1], best[2], best[3]


def unpacked(codes: Codes) -> Tensor:
    """The codes as in the formulas."""
    if codes.bits == 8:
        return codes.qdata.int() + (0 if codes.zero_point is None else 128)
    half = torch.stack((codes.qdata & 15, codes.qdata >> 4), -1).flatten(-2).int()
    return half - 8 if codes.zero_point is None else half


@pytest.mark.parametrize("scale", ["max", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_a_quantiser_in_numpy(bits: int, symmetric: bool, scale: str) -> None:
    """An odd number of groups; constant groups, zeros, a huge weight, numbers of one sign."""
    w = torch.randn(6, 24)
    w[0, :8], w[1, 8:16], w[2, 16:] = 0, 0.7, -3.0
    w[3, 3], w[4, :8] = 1e4, w[4, :8].abs()
    codes = quantize(w, bits, 8, symmetric, scale)
    assert codes.shape == w.shape
    assert (codes.zero_point is None) == symmetric
    for row in range(6):
        for g in range(3):
            s, z, q = by_numpy(w[row, 8 * g : 8 * g + 8].numpy(), bits, symmetric, scale)
            assert codes.scale[row, g].item() == pytest.approx(s, rel=1e-6)
            assert symmetric or codes.zero_point[row, g] == z
            assert unpacked(codes)[row, 8 * g : 8 * g + 8].tolist() == q.tolist()
            found = codes.dense()[row, 8 * g : 8 * g + 8]
            np.testing.assert_allclose(found.numpy(), (q - z) * s, rtol=1e-6, atol=1e-30)


def test_symmetric_8_bits_from_the_largest_weight_are_torchaos_but_for_its_half_step() -> None:
    """torchao spreads the largest weight over 127.5 steps, one half more than int8 has above 0, and clamps it."""
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(24, 6, bias=False)
    codes = quantize(linear.weight.detach(), 8, 24, True, "max")
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    theirs: Any = linear.weight
    new = hasattr(theirs, "qdata")  # and not torchao's tensors of before
    qdata, scale = (theirs.qdata, theirs.scale) if new else theirs.tensor_impl.get_plain()[:2]
    torch.testing.assert_close(codes.scale * 127, scale.view(6, 1) * 127.5)
    assert (codes.qdata.int() - qdata.int()).abs().max() <= 1


def test_a_scale_that_its_dtype_cannot_hold_gives_zeros() -> None:
    codes = quantize(torch.full((1, 8), 1e-8).half(), 8, 8, True, "max")
    assert not codes.scale.any()
    assert not codes.dense().any()


def test_the_smaller_squared_error_wins() -> None:
    w = torch.randn(64, 32)
    for symmetric in (True, False):
        cut, whole = (quantize(w, 4, 32, symmetric, scale).dense() for scale in ("mse", "max"))
        errors, bound = (cut - w).square().sum(1), (whole - w).square().sum(1)
        assert (errors <= bound * (1 + 1e-6)).all()
        assert errors.sum() < 0.95 * bound.sum()


# ------------------------------------------------------------------------------------------------------- the layers

E, G, D, O = 5, 9, 48, 16
SIZES = {"one": (1, 2), "32": (32, 3), "33": (33, 3), "300": (300, 2), "all experts": (7, E)}


def stacks(config: ExpertQuantization, dtype: torch.dtype) -> dict[str, Codes]:
    def of(columns: int, values: bool) -> Codes:
        bits = config.bits_of(values)
        rows = (torch.randn(E, G, columns) / 4).to(dtype)
        return quantize(rows, bits, config.group_of(columns, bits), config.symmetric_at(bits), config.scale)

    return {"keys": of(D, False), "gate_keys": of(D, False), "values": of(O, True)}


def layer_of(dtype: torch.dtype = torch.float32, **options: Any) -> sf.MoE:
    layer = sf.MoE(D, E, G, 2, glu=True, bias=True, activation="silu", d_out=O, dtype=dtype, **options)
    with torch.no_grad():
        layer.key_bias.normal_()
    return layer


@dtypes
@pytest.mark.parametrize("size", SIZES)
@kinds
def test_a_layer_computes_what_the_numbers_of_its_codes_compute(
    kind: str, size: str, dtype: torch.dtype, on_backend: str
) -> None:
    """Output and the gradients of x, the gates (by the router's weights) and the biases; two experts see no token."""
    tokens, k = SIZES[size]
    layer = layer_of(dtype, balance="none")
    layer.k = k
    quantize_experts_(layer, KINDS[kind])
    with torch.no_grad():
        layer.router.weight[3:] -= 4 * (k < E)
    x = torch.cat([torch.randn(tokens, D - 1) / 4, torch.ones(tokens, 1)], 1).to(dtype).requires_grad_()
    grad = torch.randn(tokens, O).to(dtype)
    y = layer(x)
    y.backward(grad)

    exact = copy.deepcopy(layer)
    dequantize_experts_(exact)
    wide, exact_x = exact.double(), x.detach().double().requires_grad_()
    with torch.no_grad():
        index = layer.router(x).index_TK  # ties of 16 bits are decided once
    gate = torch.sigmoid(exact_x @ wide.router.weight.T).gather(1, index)
    with sf.backend("reference"):
        expected = (
            flat.expert_ffn(
                exact_x, wide.keys, wide.values, index, gate, wide.gate_keys, wide.key_bias, activation="silu"
            )
            + wide.out_bias
        )
    expected.backward(grad.double())
    scale = expected.abs().max()
    with torch.no_grad():
        inferred = layer.eval()(x)
    for found in (y, inferred):
        assert ((found.double() - expected).abs().max() / scale) < TOLERANCE[dtype]
    pairs = {"x": (x, exact_x)} | {
        name: (p, wide.get_parameter(name)) for name, p in layer.named_parameters() if p.grad is not None
    }
    assert pairs.keys() == {"x", "key_bias", "out_bias", "router.weight"}
    for name, (found, right) in pairs.items():
        error = (found.grad.double() - right.grad).abs().max() / right.grad.abs().max()
        assert error < 2 * TOLERANCE[dtype], name


@pytest.fixture
def core_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the core's functions that are called from now on."""
    names, call = [], cpu.call

    def counted(name: str, *rest: Any) -> None:
        names.append(name)
        call(name, *rest)

    monkeypatch.setattr(cpu, "call", counted)
    return names


OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"router": "softmax"},
    "softmax of the selected, biased": {"router": "softmax_topk", "balance": "bias"},
    "unweighted, null experts": {"router": "unweighted", "null_experts": 3},
}


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="there is no CPU core")
@pytest.mark.parametrize("tokens", [0, 1, 40, 300])
@pytest.mark.parametrize("options", OPTIONS)
@kinds
def test_evaluation_without_gradients_is_one_call_of_the_core(
    kind: str, options: str, tokens: int, core_calls: list[str]
) -> None:
    layer = layer_of(**OPTIONS[options]).eval()
    quantize_experts_(layer, KINDS[kind])
    if layer.router.bias is not None:
        layer.router.bias.normal_()
    x = torch.randn(tokens, D)
    y = layer(x)
    assert "quantized_cvmm" in core_calls
    selected = layer._routed
    core_calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    assert core_calls == ["quantized_moe"]
    assert selected is not None
    assert layer._routed is not None
    assert torch.equal(layer._routed[0], selected[0])


def in_fp16(layer: sf.MoE) -> None:
    layer.half()


def with_scales_of_another_dtype(layer: sf.MoE) -> None:
    layer.router.bfloat16()


def with_a_hook_on_the_router(layer: sf.MoE) -> None:
    layer.router.register_forward_hook(lambda module, args, routing: routing)


@pytest.mark.parametrize(
    "change", [in_fp16, with_scales_of_another_dtype, with_a_hook_on_the_router], ids=lambda change: change.__name__
)
def test_what_that_call_cannot_compute_takes_several(change: Callable[[sf.MoE], None], core_calls: list[str]) -> None:
    layer = layer_of().eval()
    quantize_experts_(layer, ExpertQuantization(bits=8))
    change(layer)
    x = torch.randn(7, D, dtype=layer.values.dtype)
    expected = layer(x)
    core_calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert "quantized_moe" not in core_calls


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="there is no CPU core")
@pytest.mark.exhaustive
def test_opcheck_holds_for_that_call() -> None:
    layer = layer_of()
    quantize_experts_(layer, ExpertQuantization(group_size=8))
    x, router = torch.randn(4, D), layer.router.weight.detach()
    rows: list[Any] = [layer.keys, layer.values, layer.gate_keys]
    operands = [tensor for one in rows for tensor in one.codes]
    for bias, key_bias in ((None, None), (torch.randn(E), layer.key_bias.detach())):
        torch.library.opcheck(
            torch.ops.sparse_ffn.quantized_ffn_inference.default,
            (x, router, bias, *operands, key_bias, 2, "sigmoid", "silu"),
        )


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_same_without_gradients(activation: str, glu: bool) -> None:
    layer = sf.MoE(D, E, G, 2, glu=glu, activation=activation)
    quantize_experts_(layer, ExpertQuantization(bits=8))
    x = torch.randn(5, D)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("form", ["plain", "gathered", "scattered", "everything"])
@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@kinds
def test_the_product_is_cvmm_by_the_numbers(kind: str, down: bool, form: str, on_backend: str) -> None:
    codes = stacks(KINDS[kind], torch.float32)["values" if down else "keys"]
    width, slots = (G, 40) if down else (D, 40)
    x = torch.randn(6 if form in ("gathered", "everything") else slots, width, requires_grad=True)
    expert = torch.randint(0, E + 1, (slots,))  # void slots too
    options: dict[str, Any] = {}
    if form in ("gathered", "everything"):
        options["gather"] = torch.randint(0, 6, (slots,))
    if form in ("scattered", "everything"):
        options |= {"scatter": torch.randint(0, 7, (slots,)), "n_out": 7}
    if form == "everything":
        options["reduction"] = torch.rand(slots, requires_grad=True)
    y = quantized_cvmm(x, codes, expert, down=down, **options)
    grad = torch.randn_like(y)
    leaves = [x, *([options["reduction"]] if form == "everything" else [])]
    found = torch.autograd.grad(y, leaves, grad)
    rows = codes.to(torch.float64).dense()
    with sf.backend("reference"):
        wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in options.items()}
        expected = sf.ops.cvmm(x.double(), rows if down else rows.mT, expert, **wide)
        right = torch.autograd.grad(expected, leaves, grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize(("columns", "group"), [(576, 96), (640, 320), (288, 96)])
def test_nothing_is_left_of_an_earlier_call(columns: int, group: int, dtype: torch.dtype) -> None:
    """Groups that are no whole number of vectors, after a call whose scales were NaN: they share memory."""

    def first_row(columns: int, group: int, scale: float) -> tuple[Tensor, Tensor]:
        codes, x = quantize(torch.randn(2, 40, columns), 4, group, False, "max"), torch.randn(1, columns).to(dtype)
        codes = codes._replace(scale=(scale * codes.scale).to(dtype))
        with sf.backend("auto"):
            return quantized_cvmm(x, codes, torch.tensor([0]), down=False), x.double() @ codes.dense()[0].double().T

    assert first_row(1024, 32, torch.nan)[0].isnan().all()
    y, expected = first_row(columns, group, 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("on_backend", ["torch", "cpu"], indirect=True)
def test_rows_of_experts_without_slots_are_not_read(on_backend: str) -> None:
    """The reference computes all."""
    codes = stacks(KINDS["4 bits"], torch.float32)["keys"]
    codes.scale[1:] = torch.nan
    expert = torch.tensor([0, E, 0, E])
    for x in (torch.randn(4, D), torch.randn(400, D)):
        y = quantized_cvmm(x, codes, expert.repeat(len(x) // 4), down=False)
        assert y.isfinite().all()
        assert not y[1::2].any()


def test_what_belongs_to_void_slots_has_no_part_in_the_gradients(on_backend: str) -> None:
    codes, expert = stacks(KINDS["8 bits"], torch.float32)["keys"], torch.tensor([0, E, 1, E])
    x, gate = torch.ones(4, D), torch.ones(4)
    x[1], gate[3] = torch.nan, torch.nan
    leaves = x.requires_grad_(), gate.requires_grad_()
    y = quantized_cvmm(x, codes, expert, down=False, reduction=gate)
    for grad in torch.autograd.grad(y.sum(), leaves):
        assert not grad[expert == E].any()
        assert grad[expert < E].all()


def test_an_expert_out_of_range_is_refused(on_backend: str) -> None:
    codes = stacks(KINDS["8 bits"], torch.float32)["keys"]
    for bad in (-1, E + 1):
        with pytest.raises(IndexError, match=r"expert_index must be in \[0, 5\]"):
            quantized_cvmm(torch.randn(1, D), codes, torch.tensor([bad]), down=False)


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
@pytest.mark.parametrize("slots", [5, 300])
@kinds
def test_results_do_not_depend_on_the_number_of_threads(kind: str, slots: int) -> None:
    found = stacks(KINDS[kind], torch.bfloat16)
    expert, threads, results = torch.randint(0, E, (slots,)), torch.get_num_threads(), []
    x, h = torch.randn(slots, D).bfloat16(), torch.randn(slots, G).bfloat16()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            up = quantized_cvmm(x, found["keys"], expert, down=False)
            results.append((up, quantized_cvmm(h, found["values"], expert, down=True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_codes_of_a_strided_stack_are_read_as_they_are(on_backend: str) -> None:
    """Halves of a fused stack are views."""
    codes = stacks(KINDS["4 bits"], torch.float32)["keys"]
    half = Codes(*(None if t is None else t[:, 4:] for t in codes))
    x, expert = torch.randn(40, D), torch.randint(0, E, (40,))
    whole = quantized_cvmm(x, codes, expert, down=False)
    torch.testing.assert_close(quantized_cvmm(x, half, expert, down=False), whole[:, 4:])


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
def test_an_expert_that_is_packed_in_parts_gives_all_columns() -> None:
    """The CPU core packs 4 MiB at a time: of rows of 2048 numbers in fp32, 512."""
    codes = quantize(torch.randn(1, 520, 2048), 8, 2048, True, "max")
    x = torch.randn(40, 2048)
    with sf.backend("cpu"):
        y = quantized_cvmm(x, codes, torch.tensor([0, 1]).repeat(20), down=False)
    expected = x.double() @ codes.to(torch.float64).dense()[0].T
    expected[1::2] = 0
    assert (y.double() - expected).abs().max() < 1e-5 * expected.abs().max()


EVERYWHERE = """
import itertools, torch
import test_quantized as here
from gpu.pages import fenced
from sparse_ffn import backend
from sparse_ffn.ops import Codes, quantized_cvmm
from sparse_ffn.compress.quantizer import quantize

def at_a_fence(t, side):
    return None if t is None else fenced(t.numel(), t.dtype, side).view(t.shape).copy_(t)

rows = torch.randn(3, 6, 128)
for kind, (dtype, tolerance) in itertools.product(here.KINDS.values(), here.TOLERANCE.items()):
    if dtype == torch.float64:
        continue
    for bits, group in ((kind.bits, 128 if kind.group_size is None else 4), (kind.bits, 64), (kind.bits, 8)):
        codes = quantize(rows.to(dtype), bits, group, kind.symmetric_at(bits), "max")
        for side, down, n in itertools.product(("before", "after"), (False, True), (1, 5, 30, 200)):
            placed = Codes(*(at_a_fence(t, side) for t in codes))
            x, expert = torch.randn(n, 6 if down else 128).to(dtype), torch.randint(0, 4, (n,))
            with backend("cpu"):
                y = quantized_cvmm(x, placed, expert, down=down)
            with backend("reference"):
                expected = quantized_cvmm(x.double(), codes, expert, down=down)
            error = (y.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
            assert error < tolerance, (kind, dtype, group, side, down, n, error)

for kind, activation, dtype in itertools.product(
    here.KINDS.values(), here.ACTIVATIONS, (torch.float32, torch.bfloat16)
):
    layer = here.layer_of(dtype).eval().requires_grad_(False)
    layer.activation = activation
    here.quantize_experts_(layer, kind)
    wide = here.copy.deepcopy(layer)
    here.dequantize_experts_(wide)
    wide.double()
    for side, n in itertools.product(("before", "after"), (1, 5, 200)):
        for rows in (layer.keys, layer.gate_keys, layer.values):
            for name, stored in list(rows.named_buffers()):
                setattr(rows, name, at_a_fence(stored, side))
        x = torch.randn(n, here.D).to(dtype)
        with torch.no_grad(), backend("cpu"):
            y = layer(x)
        index = layer._routed[0]
        gate = torch.sigmoid(x.double() @ wide.router.weight.T).gather(1, index)
        weights = (wide.keys, wide.values, index, gate, wide.gate_keys, wide.key_bias)
        expected = here.flat.expert_ffn(x.double(), *weights, activation=activation) + wide.out_bias
        error = (y.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error < here.TOLERANCE[dtype], (kind, dtype, activation, side, n, error)
print("equal")
"""


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
@pytest.mark.parametrize(
    "isa", ["avx2", *(pytest.param(isa, marks=pytest.mark.exhaustive) for isa in ("generic", "avx512", "avx512_bf16"))]
)
def test_every_instruction_set_gives_the_reference_result_and_stays_inside_of_the_codes(isa: str) -> None:
    """A read outside of codes, scales or zero points would end the process."""
    if isa not in cpu.instruction_sets():
        pytest.skip("this processor has it not")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "SPARSE_FFN_ISA": isa, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", EVERYWHERE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "equal", result.stderr


# ------------------------------------------------------------------------------------- as any other part of a model


def outputs(layer: nn.Module) -> Tensor:
    with torch.no_grad():
        return layer(torch.randn(11, D, generator=torch.Generator().manual_seed(3)))


def quantized(**config: Any) -> sf.MoE:
    layer = layer_of()
    quantize_experts_(layer, ExpertQuantization(**{"group_size": 16, **config}))
    return layer


def through_safetensors(layer: nn.Module, folder: Path) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(layer.state_dict(), folder / "layer.safetensors")
    twin = quantized()
    twin.load_state_dict(safetensors.load_file(folder / "layer.safetensors"))
    return twin


def onto_meta(layer: nn.Module, folder: Path) -> nn.Module:
    with torch.device("meta"):
        twin = quantized()
    assert all(t.is_meta for t in twin.state_dict().values())
    twin.load_state_dict(layer.state_dict(), assign=True)
    return twin


def through_torch_save(layer: nn.Module, folder: Path) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda layer, _: copy.deepcopy(layer),
    "pickle": lambda layer, _: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_torch_save,
    "safetensors": through_safetensors,
    "meta": onto_meta,
    "shared memory": lambda layer, _: copy.deepcopy(layer).share_memory(),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(way: str, tmp_path: Path) -> None:
    layer = quantized()
    expected = outputs(layer)
    twin = COPIES[way](layer, tmp_path)
    assert isinstance(twin.keys, QuantizedRows)
    assert torch.equal(outputs(twin), expected)


@pytest.mark.parametrize(
    ("config", "bits_a_number"),
    [({}, 4 + 32 / 16 + 8 / 16), ({"symmetric": True}, 4 + 32 / 16), ({"bits": 8, "group_size": None}, 8 + 32 / D)],
)
def test_the_state_dict_is_as_large_as_the_formula_says(config: dict[str, Any], bits_a_number: float) -> None:
    layer = quantized(**config)
    assert layer.keys.n_bytes() == E * G * D * bits_a_number / 8
    stored = {name: t for name, t in layer.state_dict().items() if name.startswith("keys.")}
    assert sum(t.nbytes for t in stored.values()) == layer.keys.n_bytes()
    assert stored.keys() <= {"keys.qdata", "keys.scale", "keys.zero_point"}
    assert not any(p.shape[-2:] == (G, D) for p in layer.parameters())


def test_the_layer_stays_what_it_is() -> None:
    layer = quantized()
    layer.train()
    x = torch.randn(30, D)
    (layer(x).square().mean() + sf.aux_loss(layer)).backward()
    assert type(layer) is sf.MoE
    assert layer.router.weight.grad.any()
    assert sf.routing_stats(layer)[""]["load"].sum() == pytest.approx(1)
    assert "QuantizedRows([5, 9, 48], bits=4, group_size=16, asymmetric" in repr(layer)


def test_another_dtype_changes_no_code() -> None:
    layer = quantized()
    codes = layer.keys.qdata.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        twin = copy.deepcopy(layer).to(dtype)
        assert torch.equal(twin.keys.qdata, codes)
        assert twin.keys.dtype == twin.keys.dense().dtype == dtype
        assert twin(torch.randn(3, D, dtype=dtype)).dtype == dtype


def test_autocast_computes_in_its_dtype() -> None:
    layer = quantized()
    x = torch.randn(30, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


def test_stored_rows_are_frozen_and_say_what_thaws_them() -> None:
    layer = quantized()
    assert not layer.keys.requires_grad
    layer.keys.requires_grad = False
    for ask in (lambda: layer.keys.requires_grad_(), lambda: setattr(layer.values, "requires_grad", True)):
        with pytest.raises(TypeError, match="dequantize_experts_"):
            ask()
    for needs_parameters in (layer.reset_parameters, lambda: integrations.to_moe_layer(layer)):
        with pytest.raises(ValueError, match=r"keys, gate_keys, values .* dequantize_experts_"):
            needs_parameters()


def test_dequantised_experts_are_parameters_of_the_same_function() -> None:
    layer = quantized()
    expected = outputs(layer)
    dequantize_experts_(layer)
    torch.testing.assert_close(outputs(layer), expected)
    layer(torch.randn(9, D)).sum().backward()
    assert layer.state_dict().keys() == layer_of().state_dict().keys()
    assert all(p.grad is not None for p in layer.parameters())


def test_dequantised_experts_are_in_the_order_of_an_optimizers_state() -> None:
    layer = sf.SigmaMoE(8, 6, 4, 2, bias=True)
    names = [name for name, _ in layer.named_parameters()]
    for _ in range(2):
        quantize_experts_(layer, ExpertQuantization(bits=8))
        dequantize_experts_(layer)
        assert [name for name, _ in layer.named_parameters()] == names


def test_tied_stacks_stay_tied() -> None:
    a, b = layer_of(), layer_of()
    b.keys, b.values = a.keys, a.values
    quantize_experts_(nn.Sequential(a, b), ExpertQuantization(bits=8))
    assert a.keys is b.keys
    assert a.gate_keys is not b.gate_keys
    dequantize_experts_(nn.Sequential(a, b))
    assert isinstance(a.keys, nn.Parameter)
    assert a.keys is b.keys
    assert a.values is b.values
    assert a.gate_keys is not b.gate_keys


def test_the_report_tells_bytes_and_errors() -> None:
    model = nn.Sequential(nn.Linear(D, D), layer_of(), layer_of())
    linear = model[0].weight.detach().clone()
    dense = model[2].values.detach().clone()
    report = quantize_experts_(model, ExpertQuantization(bits=8), lambda module, name: name == "2")
    (only,) = report.layers
    assert only.name == "2"
    assert only.n_bytes == (4 * E * G * (2 * D + O), sum(model[2].get_submodule(n).n_bytes() for n in only.errors))
    error = ((model[2].values.dense() - dense).norm() / dense.norm()).item()
    assert only.errors["values"] == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.01
    assert f"values {error:.2%}" in str(report)
    assert isinstance(model[1].keys, nn.Parameter)
    assert torch.equal(model[0].weight, linear)


def test_the_report_tells_the_error_of_the_output_on_batches() -> None:
    """Of the same inputs, padding left out; and the model is quantised as without batches."""
    model = nn.Sequential(layer_of(balance="none"), nn.Linear(O, D), layer_of(balance="none")).eval()
    exact, batches = copy.deepcopy(model), [torch.randn(3, D), torch.randn(2, 4, D)]
    report = quantize_experts_(model, ExpertQuantization(group_size=16), batches=batches)
    for i, layer in ((0, report.layers[0]), (2, report.layers[1])):
        inputs = torch.cat([exact[:i](x).reshape(-1, D) for x in batches])
        with torch.no_grad():
            y, rounded = exact[i](inputs), model[i](inputs)
        assert layer.output_error == pytest.approx(((rounded - y).norm() / y.norm()).item(), rel=1e-3)
    assert f"output {report.layers[0].output_error:.2%}" in str(report)
    quantize_experts_(exact, ExpertQuantization(group_size=16))
    assert all(map(torch.equal, exact.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("name", ["attention_mask", "mask"])
@pytest.mark.parametrize("kind", ["plain", "shared", "latent", "mixed"])
def test_padding_adds_nothing_to_the_error_of_the_output(kind: str, name: str) -> None:
    """Whether the batch says what is padding or the model, which gives its layer a mask."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            moe, mixed = sf.SigmaMoE(D, E, G, 2), sf.layers.MixedMoE(D, [(2, G), (3, 4)], 2)
            shared, latent = sf.layers.SharedExpertMoE(moe, sf.DenseFFN(D, 4)), sf.layers.LatentMoE(D, D, E, G, 2)
            self.layer = {"plain": moe, "shared": shared, "latent": latent, "mixed": mixed}[kind]

        def forward(self, x: Tensor, attention_mask: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            return self.layer(x, mask=mask)

    model, x = Model(), torch.randn(2, 5, D)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    wild = torch.where(mask.unsqueeze(2), x, 1000 * torch.randn_like(x))

    def errors(x: Tensor) -> list[float | None]:
        config, batches = ExpertQuantization(group_size=16), [{"x": x, name: mask}]
        report = quantize_experts_(copy.deepcopy(model), config, batches=batches)
        return [layer.output_error for layer in report.layers]

    assert errors(wild) == pytest.approx(errors(x), rel=1e-5)


def test_a_converted_ffn_with_all_experts_loses_what_the_report_says_of_its_stacks() -> None:
    """k = E with unweighted gates is the dense FFN: relative errors of a linear stack after a ReLU add up."""
    ffn = sf.DenseFFN(64, 256)
    layer = sf.from_dense(ffn, sf.MoEConfig(router="unweighted", n_experts=8, k=8))
    x = torch.randn(50, 64)
    expected = ffn(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    for bits in (4, 8):
        small = copy.deepcopy(layer)
        errors = quantize_experts_(small, ExpertQuantization(bits=bits)).layers[0].errors
        error = ((small(x) - expected).norm() / expected.norm()).item()
        assert 0.5 * errors["values"] < error < 2 * sum(errors.values())


def test_compiled_and_exported() -> None:
    torch._dynamo.reset()
    layer, x = quantized().eval(), torch.randn(6, D)
    expected = layer(x)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layer.key_bias.grad.any()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), expected)


def test_compiled_and_exported_without_gradients() -> None:
    torch._dynamo.reset()
    layer = quantized().eval().requires_grad_(False)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        dynamic = {"x": {0: torch.export.Dim("tokens", min=2)}}
        program = torch.export.export(layer, (torch.randn(6, D),), dynamic_shapes=dynamic).module()
        for tokens in (6, 11):
            x = torch.randn(tokens, D)
            expected = layer(x)
            torch.testing.assert_close(compiled(x), expected)
            torch.testing.assert_close(program(x), expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["torch", *(() if cpu.PROBLEM else ("cpu",))])
@kinds
def test_opcheck_holds(kind: str, backend: str) -> None:
    codes = stacks(KINDS[kind], torch.float32)["keys"]
    x, reduction = torch.randn(4, D, requires_grad=True), torch.rand(6, requires_grad=True)
    expert, gather, scatter = torch.randint(0, E, (6,)), torch.randint(0, 4, (6,)), torch.randint(0, 5, (6,))
    operands = (x, *codes, expert, gather, scatter, reduction)
    torch.library.opcheck(torch.ops.sparse_ffn.quantized_cvmm.default, (*operands, False, 5, backend))
    plain = tuple(None if t is None else t.detach() for t in operands)
    torch.library.opcheck(
        torch.ops.sparse_ffn.quantized_cvmm_backward.default, (torch.randn(5, G), *plain, False, backend)
    )


def test_gradients_by_torch_func() -> None:
    layer, x = quantized(), torch.randn(4, D)
    per_token = torch.func.vmap(torch.func.grad(lambda t: layer(t.unsqueeze(0)).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    torch.testing.assert_close(per_token, leaf.grad, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- what is refused


def halved(layer: sf.MoE) -> sf.MoE:
    class Half(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    parametrize.register_parametrization(layer, "values", Half())
    return layer


def with_infinity(layer: sf.MoE) -> sf.MoE:
    with torch.no_grad():
        layer.gate_keys[3, 1, 2] = torch.inf
    return layer


def stored(layer: sf.MoE) -> sf.MoE:
    quantize_experts_(layer, ExpertQuantization(bits=8))
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no layer": (lambda: nn.Linear(2, 2), {}, "model has no MoE layer"),
    "fp64": (lambda: layer_of(torch.float64), {}, "1.keys has dtype float64"),
    "infinity": (lambda: with_infinity(layer_of()), {"bits": 8}, "1.gate_keys: the weights of expert 3 are not finite"),
    "stored": (lambda: stored(layer_of()), {}, "1.keys are stored rows already: call dequantize_experts_ first"),
    "parametrised": (lambda: halved(layer_of()), {"bits": 8}, "1.values must be a plain parameter, .* quantise first"),
    "auto": (layer_of, {}, r"group_size = 32 must divide d_model = 48 of 1.keys, .* take one of 16, 24, 48"),
    "given": (layer_of, {"bits": 8, "group_size": 12}, "must divide d_out = 16 of 1.values: take one of 4, 8, 16"),
    "odd": (layer_of, {"group_size": 3}, "in even groups at 4 bits: take one of 2, 4, 6"),
    "odd width": (lambda: sf.SigmaMoE(15, 4, 6, 2), {}, "d_model = 15 of 1.keys, .* no size does, take bits = 8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_quantised_is_refused_and_stays(what: str) -> None:
    make, config, words = REFUSED[what]
    first = layer_of()
    model = nn.Sequential(nn.Identity() if what == "no layer" else first, make())
    if what != "no layer":
        model = nn.ModuleDict({"1": model[1], "2": first})  # the good one comes after
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=words):
        quantize_experts_(model, ExpertQuantization(**config))
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == before


def test_an_experts_error_is_what_its_rounding_adds_to_the_outputs() -> None:
    layer = sf.SigmaMoE(8, 5, 8, 2, expert_dropout=0.5, null_experts=1)
    x, config = torch.randn(2, 20, 8), ExpertQuantization(group_size=8)
    found = quantization_error(layer, config, x)
    assert layer.training
    assert isinstance(layer.keys, nn.Parameter)
    small = copy.deepcopy(layer)
    report = sf.quantize_experts_(small, config)
    keys, values = small.keys.dense(), small.values.dense()
    expected = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        routing = layer.eval().router(x.flatten(0, 1))
        for token, index, gate in zip(x.flatten(0, 1), routing.index_TK, routing.gate_TK, strict=True):
            for e, g in zip(index, gate, strict=True):
                if e < 5:
                    exact = torch.relu(layer.keys[e] @ token) @ layer.values[e]
                    expected[e] += (g * (exact - torch.relu(keys[e] @ token) @ values[e])).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    columns = layer.values.detach().abs()
    score = (columns.amax(1) / columns.mean(1)).max().item()
    assert report.layers[0].outliers["values"] == pytest.approx(score)
    assert f"values {score:.1f}" in str(report)


def test_an_experts_error_is_that_of_evaluation() -> None:
    layer, x = sf.SigmaMoE(8, 5, 8, 2, dropout=0.5), torch.randn(20, 8)
    config = ExpertQuantization(group_size=8)
    assert torch.equal(quantization_error(layer, config, x), quantization_error(layer.eval(), config, x))
