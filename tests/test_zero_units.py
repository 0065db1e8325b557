"""A hidden unit that is zero for all of an expert's few tokens is not read: the same sums, whatever lies there.

``.ci/run`` runs these tests on every instruction set.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from conftest import BACKENDS
from sparse_ffn import ops
from sparse_ffn.backends import cpu

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="it is the CPU core that skips")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E, D, O = 3, 20, 37  # O: whole vectors and a rest


def experts(size: int, glu: bool, dtype: torch.dtype, biased: bool = False) -> ops.Units:
    def rows(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    gate_keys = rows(E, size, D) if glu else None
    return ops.Units(rows(E, size, D), rows(E, size, O), gate_keys, rows(E, size) if biased else None)


def routed(tokens: int, k: int = 2) -> tuple[Tensor, Tensor]:
    return torch.rand(tokens, E).topk(k).indices, torch.rand(tokens, k)


@torch.no_grad()
def run(x: Tensor, units: ops.Units, index: Tensor, gate: Tensor, activation: str) -> Tensor:
    with sf.backend("cpu"):
        return ops.expert_ffn(x, units, index, gate, activation=activation)


def used_units(x: Tensor, units: ops.Units, index: Tensor, margin: float = 0.0) -> Tensor:
    """[E, G]: whether a token of the expert makes the unit's activation positive."""
    keys = units.keys if units.gate_keys is None else units.gate_keys
    u_TEG = torch.einsum("td,egd->teg", x.double(), keys.double())
    if units.gate_keys is None and units.key_bias is not None:
        u_TEG = u_TEG + units.key_bias.double()
    chosen_TE = torch.zeros(len(x), E, dtype=torch.bool).scatter(1, index, True)
    return ((u_TEG > margin) & chosen_TE.unsqueeze(2)).any(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "squared_relu"])
@pytest.mark.parametrize("glu", [False, True])
def test_few_tokens_are_as_the_reference_has_them(glu: bool, activation: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for tokens, size in ((1, 1), (1, 1100), (2, 37), (8, 70), (32, 41)):
        units, x = experts(size, glu, dtype, biased=size % 2 == 1), torch.randn(tokens, D).to(dtype)
        index, gate = routed(tokens)
        wide = ops.Units(*(None if t is None else t.double() for t in units))
        with sf.backend("reference"):
            expected = ops.expert_ffn(x.double(), wide, index, gate.double(), activation=activation)
        y = run(x, units, index, gate, activation).double()
        assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [False, True])
def test_rows_of_zero_units_are_not_read(glu: bool, dtype: torch.dtype) -> None:
    for tokens in (1, 5):
        units, x = experts(60, glu, dtype), torch.randn(tokens, D).to(dtype)
        index, gate = routed(tokens)
        idle = ~used_units(x, units, index, margin=-1e-4)
        assert 0 < idle.sum() < idle.numel()
        poisoned = ops.Units(*(None if t is None else t.clone() for t in units))
        poisoned.values[idle] = torch.nan
        if glu:
            poisoned.keys[idle] = torch.inf
        assert torch.equal(run(x, poisoned, index, gate, "relu"), run(x, units, index, gate, "relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sums_are_those_of_a_pass_over_all_rows_bit_for_bit(dtype: torch.dtype) -> None:
    """Where bf16 is multiplied in pairs, they are those of the experts without the zero units."""
    paired = dtype == torch.bfloat16 and cpu.instruction_set() == "avx512_bf16"
    for size in (40, 1100):  # the second in two blocks and more
        h = torch.relu(torch.randn(E, size, 1)).to(dtype)  # of x = 1: hidden units that no activation changes
        values, x = torch.randn(E, size, O).to(dtype), torch.ones(1, 1, dtype=dtype)
        for e in range(E):
            index, gate = torch.tensor([[e]]), torch.tensor([[0.7]])
            y = run(x, ops.Units(h, values, None, None), index, gate, "relu")
            if paired:
                live = h[e, :, 0] > 0
                h_live, values_live = h[e, live].unsqueeze(0), values[e, live].unsqueeze(0)
                if size > 1024:
                    continue  # blocks would begin elsewhere
                expected = run(x, ops.Units(h_live, values_live, None, None), index * 0, gate, "identity")
            else:
                expected = run(x, ops.Units(h, values, None, None), index, gate, "identity")
            assert torch.equal(y, expected)


def test_what_is_not_a_number_is_never_skipped() -> None:
    units, x = experts(40, True, torch.float32), torch.randn(1, D)
    index, gate = torch.tensor([[1]]), torch.ones(1, 1)
    assert units.gate_keys is not None
    units.gate_keys[1, 7] = torch.nan
    assert run(x, units, index, gate, "relu").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("glu", [False, True])
def test_a_dense_ffn_skips_them_too(glu: bool, dtype: torch.dtype) -> None:
    layer = sf.DenseFFN(64, 2048, d_out=128, glu=glu, dtype=dtype).eval()
    torch.nn.init.normal_(layer.key_bias)
    x = torch.randn(3, 64).to(dtype)
    with torch.no_grad(), sf.backend("torch"):
        expected, many = layer(x), layer(x.repeat(3, 1))
    assert torch.equal(layer(x), expected)  # with gradients all is as it was
    keys = layer.keys if layer.gate_keys is None else layer.gate_keys
    u_TF = x.double() @ keys.double().T
    if not glu:
        u_TF = u_TF + layer.key_bias.double()
    idle = (u_TF < -1e-2).all(0)
    assert idle.any()
    tolerance = {"rtol": 0, "atol": (2e-2 if dtype == torch.bfloat16 else 1e-5) * float(expected.detach().abs().max())}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **tolerance)
        layer.values[idle] = torch.nan
        torch.testing.assert_close(layer(x), expected, **tolerance)
        assert layer(x.repeat(3, 1)).isnan().any()  # nine tokens are too many
        assert not many.isnan().any()


def topk_units(glu: bool, dtype: torch.dtype, F: int = 300, D: int = 500) -> ops.Units:
    rows = [torch.randn(F, width).to(dtype) for width in (D, O, D)]
    return ops.Units(rows[0], rows[1], rows[2] if glu else None, torch.randn(F).to(dtype))


@torch.no_grad()
def run_topk(x: Tensor, units: ops.Units, k: int, backend: str = "cpu", **options: str) -> Tensor:
    with sf.backend(backend):
        return ops.topk_ffn(x, units, k, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_topk_ffn_does_not_read_selected_units_that_are_zero(tokens: int, glu: bool, dtype: torch.dtype) -> None:
    """Of a GLU and one token neither the keys behind a closed gate. More units are selected than are not zero."""
    units, x, k = topk_units(glu, dtype), torch.randn(1, 500).repeat(tokens, 1).to(dtype), 180
    x[1:] += torch.randn(tokens - 1, 500).to(dtype) / 8  # alike, so that there are units that all of them close
    wide = ops.Units(*(None if t is None else t.double() for t in units))
    closing = x.double() @ (wide.gate_keys if glu else wide.keys).T + (0 if glu else wide.key_bias)
    idle = (closing < -0.1).all(0)
    assert idle.any()
    y = run_topk(x, units, k)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    expected = run_topk(x.double(), wide, k, "reference")
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()
    poisoned = ops.Units(*(None if t is None else t.clone() for t in units))
    poisoned.values[idle] = torch.nan
    if glu and tokens == 1:
        poisoned.keys[idle] = torch.inf
    assert torch.equal(run_topk(x, poisoned, k), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_gate_keys_and_values_of_the_selected_units_alone_are_read(dtype: torch.dtype) -> None:
    units, x, k = topk_units(True, dtype), torch.randn(2, 500).to(dtype), 40
    y = run_topk(x, units, k, activation="silu", rank_by="gate")
    assert units.gate_keys is not None
    gate = torch.nn.functional.silu(x.double() @ units.gate_keys.double().T).abs()
    never = (gate < gate.topk(k + 5).values[:, -1:]).all(0)
    units.values[never] = torch.nan
    units.keys[never] = torch.inf
    assert torch.equal(run_topk(x, units, k, activation="silu", rank_by="gate"), y)
