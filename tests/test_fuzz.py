"""Every op on every backend against the float64 reference, over drawn shapes, strides, dtypes and routings.

``SPARSE_FFN_FUZZ=20`` draws 20 times as many examples as a normal run.

Errors are held against what rounding may do: the tolerance times the same sums with all terms positive, element by
element. x, keys and biases are small whole numbers, so that pre-activations are exact in every dtype and no rounding
moves a unit over ReLU's kink or changes a ranking.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as _given
from hypothesis import strategies as st
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import functional, native, ops
from sparse_ffn.ops.activations import ACTIVATIONS

EFFORT = float(os.environ.get("SPARSE_FFN_FUZZ", "1"))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LOW = (torch.float16, torch.bfloat16)
OVERFLOWS = (torch.float16, "squared_relu")
SMOOTH = ("gelu", "gelu_tanh", "silu")

SIZES = st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 48, 64, 67, 130])
DEPTHS = st.one_of(SIZES, SIZES, SIZES, st.sampled_from([0, 513, 530, 1050]))  # beyond a packed panel
WIDTHS = st.one_of(SIZES, SIZES, SIZES, st.just(0))
TOKENS = st.one_of(SIZES, st.sampled_from([0, 32, 257, 400]))
EXPERTS = st.sampled_from([1, 2, 3, 5, 9, 16])
SIDES = st.one_of(st.tuples(SIZES, DEPTHS), st.tuples(DEPTHS, SIZES))
DTYPES = st.sampled_from(list(TOLERANCE))
SEEDS = st.integers(0, 2**31)
LAYOUTS = st.sampled_from(
    ["contiguous", "transposed", "offset", "sliced columns", "sliced rows", "every other column", "expanded"]
)


def given(strategy: st.SearchStrategy[Any], examples: int) -> Callable[..., Any]:
    """Hypothesis, the same examples in every run, with the fixture ``poisoned`` around all of them."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        limits = settings(
            max_examples=max(1, int(examples * EFFORT)),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        return limits(_given(strategy)(test))

    return decorate


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of x behind other strides, with NaN (or an index out of range) in the gaps.

    "expanded" repeats x's first row; a shape that a layout does not fit stays as it is.
    """
    if layout == "contiguous" or x.dim() == 0 or x.numel() == 0:
        return x
    gap = float("nan") if x.is_floating_point() else -(2**40)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        buffer = torch.full((x.numel() + 6,), gap, dtype=x.dtype)
        view = buffer[3:-3].view(x.shape)
    elif layout == "sliced columns":
        view = torch.full((*x.shape[:-1], x.shape[-1] + 5), gap, dtype=x.dtype)[..., 2:-3]
    elif layout == "sliced rows":
        view = torch.full((2 * x.shape[0] + 1, *x.shape[1:]), gap, dtype=x.dtype)[1::2]
    else:
        view = torch.full((*x.shape[:-1], 2 * x.shape[-1]), gap, dtype=x.dtype)[..., ::2]
    return view.copy_(x)


@dataclass
class Numbers:
    """Draws tensors: structure (layouts) from hypothesis, so that it shrinks; numbers from a seed."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.draw(SEEDS))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)
        return self.view(x).requires_grad_(grad)

    def whole(self, *shape: int) -> Tensor:
        limit = 2 if shape[-1] < 200 and self.dtype != torch.float16 else 1  # fp16 overflows
        x = torch.randint(-limit, limit + 1, shape, generator=self.generator).to(self.dtype)
        return self.view(x).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """Gates and reduction weights: at least fp32, or the op's own dtype."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.tensor(*shape, dtype=self.draw(st.sampled_from([wide, self.dtype])))

    def dropout(self, *shape: int) -> Tensor:
        return self.view(torch.randint(0, 2, shape, generator=self.generator).to(self.dtype) * 2)

    def index(self, limit: int, *shape: int) -> Tensor:
        """Indices below limit: uniform, crowded (Zipf), all the same, in order (repeating), or only even ones."""
        kind = self.draw(st.sampled_from(["uniform", "zipf", "one", "ordered", "even"]))
        n = torch.Size(shape).numel()
        if kind == "ordered":
            index = torch.arange(n) % limit
        elif kind == "one":
            index = torch.full((n,), self.draw(st.integers(0, limit - 1)))
        elif kind == "zipf":
            crowd = 1 / torch.arange(1, limit + 1, dtype=torch.float64) ** 1.5
            index = crowd.expand(max(n, 1), -1).multinomial(1, generator=self.generator)[:n, 0]
        else:
            index = torch.randint(0, limit, (n,), generator=self.generator)
            index = index // 2 * 2 if kind == "even" else index
        return self.view(index.view(shape))

    def view(self, x: Tensor) -> Tensor:
        return laid_out(x, self.draw(LAYOUTS)).detach()


@dataclass
class Case:
    """One call: its tensors, its options, the gradient that comes back, and what bounds its sums."""

    op: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    upstream: str
    dtype: torch.dtype

    def run(self, tensors: dict[str, Tensor], options: dict[str, Any], positive: bool = False) -> dict[str, Tensor]:
        y = self.op(**tensors, **options)
        numbers = torch.linspace(-1, 1, max(y.numel(), 1), dtype=torch.float64)[: y.numel()].view(y.shape)
        grad = laid_out(numbers.to(self.dtype), self.upstream).to(y.dtype)
        wanted = {n: t for n, t in tensors.items() if t.requires_grad}
        grads = torch.autograd.grad(y, wanted.values(), grad.abs() if positive else grad)
        return {"output": y.detach(), **dict(zip(wanted, (g.to_dense() for g in grads), strict=True))}

    def wide(self, change: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Tensor]:
        return {
            n: change(t.detach().double()).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for n, t in self.tensors.items()
        }

    def bound(self) -> dict[str, Tensor]:
        """The sums with all terms positive; identity is at least as large as the other activations but one."""
        options = dict(self.options)
        if options.get("activation", "squared_relu") != "squared_relu":
            options["activation"] = "identity"
        if self.op is ops.topk_ffn:
            options["k"] = self.tensors["keys"].shape[0]
        return self.run(self.wide(torch.abs), options, positive=True)

    def check(self) -> None:
        with sf.backend("reference"):
            expected, bound = self.run(self.wide(), self.options), self.bound()
        for backend in backends(self.dtype):
            with sf.backend(backend):
                actual = self.run(self.tensors, self.options)
            for name, tensor in actual.items():
                assert tensor.dtype == (self.dtype if name == "output" else self.tensors[name].dtype)
                tensor = tensor.double()
                assert tensor.shape == expected[name].shape
                assert tensor.isfinite().all(), f"{backend}, {name}: not finite"
                allowed = bound[name] + 1e-3 * (bound[name].max() if bound[name].numel() else 0)
                excess = ((tensor - expected[name]).abs() / allowed.clamp_min(1e-30)).flatten()
                worst = excess.max().item() if excess.numel() else 0.0
                assert worst < TOLERANCE[self.dtype], f"{backend}, {name}: {worst:.2g} of the sum of absolute terms"


def backends(dtype: torch.dtype) -> tuple[str, ...]:
    return ("reference", "torch") if dtype == torch.float64 or native.PROBLEM else ("reference", "torch", "cpu")


@st.composite
def expert_ffn_cases(draw: Callable[..., Any]) -> Case:
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    dtype = draw(DTYPES)
    n = Numbers(draw, dtype)
    tokens, width, (depth, out) = draw(TOKENS), draw(WIDTHS), draw(SIDES)
    depth = min(depth, 33) if (dtype, activation) == OVERFLOWS else depth
    experts = draw(EXPERTS)
    k = draw(st.integers(0, min(experts, 4)))
    tensors = {
        "x": n.whole(tokens, depth),
        "keys": n.whole(experts, width, depth),
        "values": n.tensor(experts, width, out),
        "index": n.index(experts, tokens, k),
        "gate": n.weight(tokens, k),
    }
    if draw(st.booleans()):
        tensors["gate_keys"] = n.whole(experts, width, depth)
    if draw(st.booleans()):
        tensors["key_bias"] = n.whole(experts, width)
    if draw(st.booleans()):
        tensors["hidden_scale"] = n.dropout(tokens, k, width)
    return Case(ops.expert_ffn, tensors, {"activation": activation}, draw(LAYOUTS), dtype)


@given(expert_ffn_cases(), examples=60)
def test_expert_ffn(poisoned: None, case: Case) -> None:
    case.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "depth", "width", "out", "experts", "k"),
    [(2100, 20, 12, 150, 1, 1), (700, 140, 40, 36, 2, 1), (1500, 8, 5, 40, 32, 3), (900, 1030, 9, 17, 3, 2)],
    ids=["token ranges", "many rows of one expert", "many experts", "long rows"],
)
def test_expert_ffn_beyond_one_block(
    tokens: int, depth: int, width: int, out: int, experts: int, k: int, dtype: torch.dtype, poisoned: None
) -> None:
    n = Numbers(lambda strategy: "contiguous" if strategy is LAYOUTS else 3, dtype)
    tensors = {
        "x": n.whole(tokens, depth),
        "keys": n.whole(experts, width, depth),
        "gate_keys": n.whole(experts, width, depth),
        "values": n.tensor(experts, width, out),
        "index": torch.rand(tokens, experts).topk(k).indices,
        "gate": n.tensor(tokens, k, dtype=torch.float32),
    }
    Case(ops.expert_ffn, tensors, {"activation": "silu"}, "contiguous", dtype).check()


@st.composite
def cvmm_cases(draw: Callable[..., Any]) -> Case:
    dtype = draw(DTYPES)
    n = Numbers(draw, dtype)
    rows, (depth, out), experts = draw(TOKENS), draw(SIDES), draw(EXPERTS)
    gathered, scattered = rows > 0 and draw(st.booleans()), draw(st.booleans())
    slots = draw(TOKENS) if gathered else rows
    tensors = {"x": n.whole(rows, depth), "weight": n.tensor(experts, depth, out), "expert": n.index(experts, slots)}
    options: dict[str, Any] = {}
    if gathered:
        tensors["gather"] = n.index(rows, slots)
    if scattered:
        options["n_out"] = draw(SIZES)
        tensors["scatter"] = n.index(options["n_out"], slots)
    if draw(st.booleans()):
        tensors["reduction"] = n.weight(slots)
    return Case(ops.cvmm, tensors, options, draw(LAYOUTS), dtype)


@given(cvmm_cases(), examples=50)
def test_cvmm(poisoned: None, case: Case) -> None:
    case.check()


@st.composite
def bag_cases(draw: Callable[..., Any]) -> Case:
    dtype = draw(DTYPES)
    n = Numbers(draw, dtype)
    table, bags, width, out = draw(st.one_of(SIZES, st.just(900))), draw(TOKENS), draw(st.integers(0, 20)), draw(DEPTHS)
    tensors = {"values": n.tensor(table, out), "index": n.index(table, bags, width), "weight": n.weight(bags, width)}
    return Case(ops.weighted_bag, tensors, {}, draw(LAYOUTS), dtype)


@given(st.tuples(bag_cases(), st.booleans()), examples=60)
def test_weighted_bag(poisoned: None, drawn: tuple[Case, bool]) -> None:
    case, sparse = drawn
    if sparse:
        case.options["sparse_grad"] = True
    case.check()


@st.composite
def topk_ffn_cases(draw: Callable[..., Any]) -> Case:
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    # rounded smooth activations make ties that float64 does not have
    dtype = draw(st.sampled_from([d for d in TOLERANCE if activation not in SMOOTH or d not in LOW]))
    n = Numbers(draw, dtype)
    tokens, units, (depth, out) = draw(TOKENS), draw(st.one_of(SIZES, st.just(300))), draw(SIDES)
    depth = min(depth, 33) if (dtype, activation) == OVERFLOWS else depth
    tensors = {"x": n.whole(tokens, depth), "keys": n.whole(units, depth), "values": n.tensor(units, out)}
    if draw(st.booleans()):
        tensors["gate_keys"] = n.whole(units, depth)
    if draw(st.booleans()):
        tensors["key_bias"] = n.whole(units)
    if draw(st.booleans()):
        tensors["hidden_scale"] = n.dropout(tokens, units)
    options = {
        # the tail of a smooth activation rounds to zero, where its rank is anyone's
        "k": units if activation in SMOOTH else draw(st.integers(1, units)),
        "activation": activation,
        "norm_aware": draw(st.booleans()),
    }
    return Case(ops.topk_ffn, tensors, options, draw(LAYOUTS), dtype)


@given(topk_ffn_cases(), examples=50)
def test_topk_ffn(poisoned: None, case: Case) -> None:
    case.check()


@st.composite
def score_tables(draw: Callable[..., Any]) -> tuple[Tensor, Tensor, int]:
    dtype = draw(DTYPES)
    n = Numbers(draw, dtype)
    shape = (*draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.one_of(SIZES, st.just(300))))
    tables = [n.whole(*shape) if dtype in LOW or draw(st.booleans()) else n.tensor(*shape) for _ in range(2)]
    if draw(st.booleans()):  # what a mask leaves
        with torch.no_grad():
            tables = [t.masked_fill(torch.rand(shape, generator=n.generator) < 0.3, -torch.inf) for t in tables]
    return *tables, draw(st.integers(1, min(shape[-1] ** 2, 200)))


@given(score_tables(), examples=50)
def test_product_key_topk(poisoned: None, drawn: tuple[Tensor, Tensor, int]) -> None:
    first, second, k = drawn
    with sf.backend("reference"):
        best, index = functional.product_key_topk(first, second, k)
    every = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
    assert torch.equal(best, every.sort(dim=-1, descending=True).values[..., :k])
    for backend in backends(first.dtype)[1:]:
        with sf.backend(backend):
            actual_best, actual_index = functional.product_key_topk(first, second, k)
        assert torch.equal(actual_index, index), backend
        assert torch.equal(actual_best, best), backend
