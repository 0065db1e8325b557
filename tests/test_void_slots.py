"""Void slots: an index of E names no expert. Such a slot adds exactly 0, reads nothing, and gives its gate no gradient.

The oracle is the reference in float64 for the same call with an expert in each void slot's place and a gate of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flat
import pytest
import torch
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import functional
from sparse_ffn.backends import cpu
from sparse_ffn.ops.route import reference

E, G, D, O = 5, 17, 33, 20
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "fp16", "bf16"])


def half(tokens: int, k: int) -> Tensor:
    return torch.where(torch.rand(tokens, k) < 0.5, E, torch.randint(0, E, (tokens, k)))


ROUTINGS: dict[str, Callable[[], Tensor]] = {
    "half": lambda: half(23, 3),
    "half of many": lambda: half(300, 4),
    "all": lambda: torch.full((9, 2), E),
    "all of many": lambda: torch.full((70, 4), E),
    "one token": lambda: torch.tensor([[E, 2, E]]),
    "one token, all": lambda: torch.tensor([[E, E]]),
    "no token": lambda: torch.empty(0, 3, dtype=torch.int64),
    "whole tokens": lambda: torch.arange(E + 1).repeat(12, 1).T.reshape(-1, 3),
    "ragged": lambda: torch.repeat_interleave(torch.tensor([E, 3, 0, 1]), torch.tensor([17, 60, 1, 14])).unsqueeze(1),
    "all but one": lambda: torch.where(torch.arange(40) == 21, 1, E).view(20, 2),
}
routings = pytest.mark.parametrize("routing", ROUTINGS)


def real(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def expert_ffn_tensors(routing: str, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    index = ROUTINGS[routing]()
    tokens, k = index.shape
    tensors = {
        "x": real(tokens, D, dtype=dtype),
        "keys": real(E, G, D, dtype=dtype) / 4,
        "values": real(E, G, O, dtype=dtype) / 4,
        "index": index,
        "gate": torch.rand(tokens, k).to(dtype),
    }
    if form == "everything":
        tensors |= {"gate_keys": real(E, G, D, dtype=dtype) / 4, "key_bias": real(E, G, dtype=dtype)}
        tensors["dropout_mask"] = ((torch.rand(tokens, k, G) > 0.3) * 1.5).to(dtype)
    return tensors


def cvmm_tensors(routing: str, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    expert = ROUTINGS[routing]().flatten()
    slots = len(expert)
    weight = real(E, O, D, dtype=dtype).mT if "transposed" in form else real(E, D, O, dtype=dtype)
    tensors = {"x": real(4 if "gather" in form else slots, D, dtype=dtype), "weight": weight, "expert": expert}
    if "gather" in form:
        tensors["gather"] = torch.randint(0, 4, (slots,))
    if "scatter" in form:
        tensors["scatter"] = torch.randint(0, 6, (slots,))
    if "reduction" in form:
        tensors["reduction"] = torch.rand(slots).to(dtype)
    return tensors


CVMM_FORMS = ("plain", "transposed", "reduction", "transposed, reduction", "gather, scatter, reduction")
FACTORS = {"gate": "index", "reduction": "expert"}


def cvmm(**tensors: Tensor) -> Tensor:
    return sf.ops.cvmm(**tensors, n_out=7 if "scatter" in tensors else None)


def results(op: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output, the output where no gradient is wanted, and all gradients."""
    with torch.no_grad():
        alone = op(**tensors, **options)
    trained = [n for n, t in tensors.items() if t.is_floating_point() and n != "dropout_mask"]
    leaves = {n: tensors[n].detach().requires_grad_() for n in trained}
    y = op(**tensors | leaves, **options)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, leaves.values(), grad)
    gradients = {f"gradient of {n}": g for n, g in zip(trained, grads, strict=True)}
    return {"output": y.detach(), "output without gradients": alone, **gradients}


def oracle(op: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """In float64: an expert in each void slot's place, with the gate 0."""
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    factor, index = next((f, i) for f, i in FACTORS.items() if i in wide)
    void = wide[index] == E
    wide[index] = wide[index].masked_fill(void, 1)
    wide[factor] = wide.get(factor, torch.ones(void.shape, dtype=torch.float64)).masked_fill(void, 0)
    with sf.backend("reference"):
        found = results(op, wide, **options)
    found[f"gradient of {factor}"].masked_fill_(void, 0)
    return found if factor in tensors else {n: t for n, t in found.items() if n != f"gradient of {factor}"}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, tensor.abs().max().item()) if tensor.numel() else 1.0
        off = (actual[name].double() - tensor).abs()
        assert (off <= TOLERANCE[dtype] * scale).all(), f"{name}: off by {off.max()}, scale {scale}"


@dtypes
@routings
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_expert_ffn(form: str, routing: str, dtype: torch.dtype, on_backend: str, poisoned: None) -> None:
    tensors = expert_ffn_tensors(routing, form, dtype)
    actual = results(flat.expert_ffn, tensors, activation="silu")
    check(actual, oracle(flat.expert_ffn, tensors, activation="silu"), dtype)
    assert (actual["gradient of gate"][tensors["index"] == E] == 0).all()
    assert (actual["output"][(tensors["index"] == E).all(1)] == 0).all()


@dtypes
@routings
@pytest.mark.parametrize("form", CVMM_FORMS)
def test_cvmm(form: str, routing: str, dtype: torch.dtype, on_backend: str, poisoned: None) -> None:
    tensors = cvmm_tensors(routing, form, dtype)
    actual = results(cvmm, tensors)
    check(actual, oracle(cvmm, tensors), dtype)
    void = tensors["expert"] == E
    if "reduction" in tensors:
        assert (actual["gradient of reduction"][void] == 0).all()
    if "scatter" not in tensors:
        assert (actual["output"][void] == 0).all()


@routings
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_what_belongs_to_void_slots_is_not_read(form: str, routing: str, on_backend: str, poisoned: None) -> None:
    """Their gates are NaN, and so are the weights of experts, tokens and multipliers of dropout that no other slot has.

    The reference multiplies all experts by zero, so that it is spared NaNs other than the gates.
    """
    tensors = expert_ffn_tensors(routing, form, torch.float32)
    expected = results(flat.expert_ffn, tensors)
    void = tensors["index"] == E
    tensors["gate"] = tensors["gate"].masked_fill(void, torch.nan)
    idle = ~(tensors["index"].unsqueeze(-1) == torch.arange(E)).flatten(0, 1).any(0)
    if on_backend != "reference":
        for name in ("keys", "values", "gate_keys", "key_bias"):
            if name in tensors:
                tensors[name][idle] = torch.nan
        tensors["x"][void.all(1)] = torch.nan
        if form == "everything":
            tensors["dropout_mask"][void] = torch.nan
    actual = results(flat.expert_ffn, tensors)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@routings
@pytest.mark.parametrize("form", CVMM_FORMS)
def test_what_belongs_to_void_slots_of_cvmm_is_not_read(
    form: str, routing: str, on_backend: str, poisoned: None
) -> None:
    tensors = cvmm_tensors(routing, form, torch.float32)
    expected = results(cvmm, tensors)
    void = tensors["expert"] == E
    if "reduction" in tensors:
        tensors["reduction"] = tensors["reduction"].masked_fill(void, torch.nan)
    if on_backend != "reference":
        tensors["weight"][~(tensors["expert"].unsqueeze(-1) == torch.arange(E)).any(0)] = torch.nan
        if "gather" not in tensors:
            tensors["x"][void] = torch.nan
    actual = results(cvmm, tensors)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_without_any_expert_all_slots_are_void(on_backend: str) -> None:
    index, x = torch.zeros(4, 2, dtype=torch.int64), torch.randn(4, D)
    units = {"keys": torch.randn(0, G, D), "values": torch.randn(0, G, O), "index": index, "gate": torch.rand(4, 2)}
    product = {"weight": torch.randn(0, D, O), "expert": index[:, 0], "reduction": torch.rand(4)}
    for op, tensors in ((flat.expert_ffn, units), (cvmm, product)):
        for name, tensor in results(op, {"x": x, **tensors}).items():
            assert (tensor == 0).all(), name


def test_the_functional_api_admits_one_index_past_the_experts(on_backend: str) -> None:
    tensors = expert_ffn_tensors("half", "plain", torch.float32)
    names = ("x", "keys", "values", "index", "gate")
    assert torch.equal(functional.expert_ffn(*(tensors[n] for n in names)), flat.expert_ffn(**tensors))
    product = cvmm_tensors("half", "plain", torch.float32)
    assert torch.equal(functional.cvmm(product["x"], product["weight"], product["expert"]), cvmm(**product))
    for wrong in (E + 1, -1):
        for name, call in (
            ("index", lambda w: functional.expert_ffn(*(tensors[n] for n in names[:3]), w, tensors["gate"])),
            ("expert_index", lambda w: functional.cvmm(product["x"], product["weight"], w.flatten())),
        ):
            with pytest.raises(IndexError, match=rf"^{name} must be in \[0, {E}\], got values from"):
                call(torch.where(tensors["index"] == 3, wrong, tensors["index"]))


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gate_function", reference.GATES)
@pytest.mark.parametrize(("tokens", "n_rows", "k"), [(1, 6, 6), (40, 7, 2), (130, 70, 20), (300, 9, 4), (64, 40, 1)])
def test_a_routers_rows_beyond_the_experts_are_void(
    tokens: int, n_rows: int, k: int, gate_function: str, dtype: torch.dtype, poisoned: None
) -> None:
    """The same as experts whose weights are zero: all rows take part in softmax and sums."""
    tensors: dict[str, Tensor] = {
        "x": real(tokens, D, dtype=dtype) / 2,
        "router_weight": real(n_rows, D, dtype=dtype) / 2,
        "keys": real(E, G, D, dtype=dtype) / 2,
        "values": real(E, G, O, dtype=dtype) / 2,
        "gate_keys": real(E, G, D, dtype=dtype) / 2,
        "key_bias": real(E, G, dtype=dtype) / 2,
    }
    fixed = {"router_bias": torch.randn(n_rows), "mask": torch.rand(tokens) > 0.3, "k": k, "activation": "silu"}
    fixed["dropout_mask"] = ((torch.rand(tokens, k, G) > 0.3) / 0.7).to(dtype)

    def results(op: Callable[..., Any], tensors: dict[str, Tensor], upstream: list[Tensor]) -> list[Tensor]:
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        out, index, gate, sums = op(**leaves, **fixed, gate_function=gate_function)
        upstream = upstream or [torch.randn_like(t) for t in (out, gate, sums)]
        arriving = [u.to(t.dtype) for u, t in zip(upstream, (out, gate, sums), strict=True)]
        return [index, out, gate, sums, *torch.autograd.grad((out, gate, sums), leaves.values(), arriving), *upstream]

    actual = results(flat.routed_ffn, tensors, [])
    wide = {n: t.double() for n, t in tensors.items()}
    for name in ("keys", "values", "gate_keys", "key_bias"):
        wide[name] = torch.cat([wide[name], wide[name].new_zeros(n_rows - E, *wide[name].shape[1:])])
    fixed["dropout_mask"] = fixed["dropout_mask"].double()
    expected = results(flat.routed_reference, wide, [u.double() for u in actual[-3:]])
    assert (actual[0] >= E).any()
    assert torch.equal(actual[0], expected[0])
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        wanted = wanted[: len(got)]
        scale = max(1.0, wanted.abs().max().item())
        assert (got.double() - wanted).abs().max() <= TOLERANCE[dtype] * scale


def test_nothing_of_a_token_in_void_slots_alone_reaches_a_weight(on_backend: str) -> None:
    x, keys, values = torch.randn(4, D), torch.randn(E, G, D, requires_grad=True), torch.randn(E, G, O)
    x[2, 3] = torch.nan
    index = torch.tensor([[0, 1], [1, 2], [E, E], [3, E]])
    with sf.backend(on_backend):
        functional.expert_ffn(x, keys, values, index, torch.rand(4, 2)).sum().backward()
        weight = torch.randn(E, D, O, requires_grad=True)
        functional.cvmm(x, weight, torch.tensor([0, 1, E, 3])).sum().backward()
    assert keys.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")
def test_the_reference_of_a_wider_router() -> None:
    """Its own oracle: void slots of the reference are those of ``expert_ffn``."""
    x, router, keys, values = (torch.randn(*s).double() for s in ((20, D), (8, D), (E, G, D), (E, G, O)))
    out, index, gate, sums = flat.routed_reference(x, router, keys, values, k=3, gate_function="softmax")
    assert sums.shape == (1, 8)
    with sf.backend("reference"):
        assert torch.equal(out, flat.expert_ffn(x, keys, values, index.clamp(max=E), gate))
    fp32 = [t.float() for t in (x, router, keys, values)]
    units = sf.ops.Units(fp32[2], fp32[3])
    for size in (1, 20):  # one token is decoded
        few, chosen = sf.ops.routed_ffn_inference(fp32[0][:size], fp32[1], None, units, 3, "softmax", "relu")
        assert torch.equal(chosen, index[:size])
        torch.testing.assert_close(few, out[:size].float())
