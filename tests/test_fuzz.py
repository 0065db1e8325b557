"""Every op on every backend against float64, over drawn shapes, strides, dtypes, routings, and numbers of every kind.

``SPARSE_FFN_FUZZ=100`` draws 100 times as many examples as a normal run: 10^5.

Errors are held against what rounding may do: the tolerance times the same sums with all terms positive, element by
element. What is NaN or infinite in float64 must be so on a backend, and nothing else, unless a number on the way may
have left the dtype. x, keys and biases are small whole numbers, or such a number times a power of two, so that no
rounding moves a unit over ReLU's kink or changes a ranking.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import flat
import pytest
import torch
from fuzz import sums
from fuzz.case import MANY, Case, on
from fuzz.numbers import (
    CORE,
    DEPTHS,
    DTYPES,
    EXPERTS,
    KINDS,
    LAYOUTS,
    SEEDS,
    SIDES,
    SIZES,
    TOKENS,
    WIDTHS,
    Numbers,
    laid_out,
)
from hypothesis import HealthCheck, settings
from hypothesis import given as _given
from hypothesis import strategies as st
from strange import ACTIVATIONS, SMOOTH
from strange import activation as exact_activation
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn import functional, ops
from sparse_ffn.backends import cpu
from sparse_ffn.backends.choice import choose

EFFORT = float(os.environ.get("SPARSE_FFN_FUZZ", "1"))
UNITS = ("x", "keys", "gate_keys", "key_bias")
built = pytest.mark.skipif(cpu.PROBLEM is not None, reason="no compiler when the package was installed")


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


def drawn(
    n: Numbers,
    op: Callable[..., Any],
    computed: Callable[..., Any],
    tensors: dict[str, Tensor],
    shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    *,
    fixed: tuple[str, ...] = (),
    ranked: tuple[str, ...] = (),
    known: Callable[[dict[str, Tensor]], dict[str, Any]] | None = None,
    gathered: int = 0,
) -> Case:
    """The case with a kind of numbers in one of its tensors or incoming gradients, and layouts.

    ``shapes`` are those of the outcomes; ``fixed`` tensors have no gradient and only plain numbers; the products of x
    with ``ranked`` ones must not overflow. ``known`` says what the sums take, from the tensors as they lie, or the
    options.
    """
    floats = [m for m, t in tensors.items() if t.is_floating_point() and m not in fixed]
    trained = tuple(floats) if n.draw(st.sampled_from([True, True, True, False])) else ()
    upstream = [torch.linspace(-1, 1, max(_size(s), 1), dtype=torch.float64)[: _size(s)].view(s) for s in shapes]
    upstream = [u.to(n.dtype) for u in upstream]
    kind = n.draw(KINDS) if gathered <= MANY and all(t.numel() for t in tensors.values()) else "plain"
    where = None if kind == "plain" else n.draw(st.sampled_from([*floats, "upstream"]))
    layouts = {m: n.draw(LAYOUTS) for m in tensors}
    if where is None:
        pass
    elif where == "upstream":
        upstream[0] = n.spoil(upstream[0], kind)
    elif not rounding_decides(kind, where, n.dtype, tensors):
        if kind == "huge" and layouts[where].startswith("one"):  # there would be more than one
            layouts[where] = "contiguous"
        spoiled = tensors | {where: n.spoil(tensors[where], kind)}
        found = {m: laid_out(spoiled[m], layouts[m]) for m in ("x", *ranked) if m in spoiled and ranked}
        if all(largest_product(found["x"], found[m]) < torch.finfo(n.dtype).max / 4 for m in found if m != "x"):
            tensors = spoiled
    tensors = {m: laid_out(t, layouts[m]).detach().requires_grad_(m in trained) for m, t in tensors.items()}
    upstream = [laid_out(u, n.draw(LAYOUTS)) for u in upstream]
    taken = options if known is None else known(tensors)
    return Case(op, computed, tensors, upstream, n.dtype, kind, trained, options, taken, gathered)


def rounding_decides(kind: str, where: str, dtype: torch.dtype, tensors: dict[str, Tensor]) -> bool:
    """Whether a rounding or a flush to zero may choose the side of a kink or change a ranking.

    Products of bf16 numbers that small may be zero; and beside products that large, which may cancel, a bias counts or
    not, as it is added last or first.
    """
    if kind == "bottom":
        return dtype == torch.bfloat16 and where in (*UNITS, "router_weight")
    return kind == "top" and where in ("x", "keys") and "key_bias" in tensors


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def largest_product(x: Tensor, keys: Tensor) -> float:
    a, b = (t.double().abs().nan_to_num(0, 0) for t in (x, keys))
    return float((a @ b.mT).max()) if a.numel() and b.numel() else 0.0


def best(scores: Tensor, k: int) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


@st.composite
def expert_ffn_cases(draw: Callable[..., Any]) -> Case:
    n, activation = Numbers(draw, draw(DTYPES)), draw(st.sampled_from(list(ACTIVATIONS)))
    tokens, width, (depth, out), experts = draw(TOKENS), draw(WIDTHS), draw(SIDES), draw(EXPERTS)
    k = draw(st.integers(0, min(experts, 4)))
    tensors = {
        "x": n.whole(tokens, depth),
        "keys": n.whole(experts, width, depth),
        "values": n.real(experts, width, out),
        "index": n.experts(experts, tokens, k),
        "gate": n.weight(tokens, k),
        **units(n, (experts, width), depth),
    }
    if draw(st.booleans()):
        tensors["dropout_mask"] = n.dropout(tokens, k, width)
    shapes, options = [(tokens, out)], {"activation": activation}
    return drawn(n, flat.expert_ffn, sums.expert_ffn, tensors, shapes, options, fixed=("dropout_mask",))


def units(n: Numbers, shape: tuple[int, ...], depth: int) -> dict[str, Tensor]:
    """A GLU's gate keys and the keys' biases, or one or none of them."""
    found = {}
    if n.draw(st.booleans()):
        found["gate_keys"] = n.whole(*shape, depth)
    if n.draw(st.booleans()):
        found["key_bias"] = n.whole(*shape)
    return found


@given(expert_ffn_cases(), examples=250)
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
    n = Numbers(lambda strategy: {KINDS: "plain", LAYOUTS: "contiguous", SEEDS: 3}.get(strategy, True), dtype)
    tensors = {
        "x": n.whole(tokens, depth),
        "keys": n.whole(experts, width, depth),
        "gate_keys": n.whole(experts, width, depth),
        "values": n.real(experts, width, out),
        "index": torch.rand(tokens, experts).topk(k).indices,
        "gate": n.real(tokens, k, dtype=torch.float32),
    }
    drawn(n, flat.expert_ffn, sums.expert_ffn, tensors, [(tokens, out)], {"activation": "silu"}).check()


def routed(**arguments: Any) -> Any:
    """The op on the core, and where no gradient is wanted the one for inference; or the reference of both."""
    if choose(arguments["x"]) == "reference":
        out, _, gate, total = flat.routed_reference(**arguments)
    elif torch.is_grad_enabled() or "dropout_mask" in arguments:
        out, _, gate, total = flat.routed_ffn(**arguments)
    else:
        x, router, bias, k, gate_function, activation = (arguments.get(m) for m in INFERENCE)
        experts = ops.Units(**{m: arguments[m] for m in ops.Units._fields if m in arguments})
        return ops.routed_ffn_inference(x, router, bias, experts, k, gate_function, activation)[0]
    return out, gate, total


INFERENCE = ("x", "router_weight", "router_bias", "k", "gate_function", "activation")


@st.composite
def routed_ffn_cases(draw: Callable[..., Any]) -> Case:
    n, activation = Numbers(draw, draw(st.sampled_from(CORE))), draw(st.sampled_from(list(ACTIVATIONS)))
    tokens, width, (depth, out) = draw(TOKENS.filter(bool)), draw(WIDTHS), draw(SIDES)
    experts = draw(st.one_of(EXPERTS, st.sampled_from([40, 70])))
    k = draw(st.integers(1, min(experts, draw(st.sampled_from([2, 4, 20])))))
    tensors = {
        "x": n.whole(tokens, depth),
        "router_weight": n.whole(experts, depth),
        "keys": n.whole(experts, width, depth),
        "values": n.real(experts, width, out),
        **units(n, (experts, width), depth),
    }
    fixed = {}
    if draw(st.booleans()):
        fixed["router_bias"] = torch.randint(-2, 3, (experts,), generator=n.generator).float()
    if draw(st.booleans()):
        fixed["mask"] = torch.rand(tokens, generator=n.generator) > 0.3
    if draw(st.booleans()):
        fixed["dropout_mask"] = n.dropout(tokens, k, width)
    options = {
        "k": k,
        "gate_function": draw(st.sampled_from(["sigmoid", "softmax", "softmax_topk", "unweighted"])),
        "groups": 2 if tokens % 2 == 0 and draw(st.booleans()) else 1,
        "activation": activation,
    }

    def known(t: dict[str, Tensor]) -> dict[str, Any]:
        score = t["x"].double() @ t["router_weight"].double().t()
        index = best(score if "router_bias" not in t else score + t["router_bias"], k)
        softmax = score.softmax(1).nan_to_num(0)
        gate = {
            "sigmoid": lambda: score.gather(1, index).sigmoid(),
            "softmax": lambda: softmax.gather(1, index),
            "softmax_topk": lambda: score.gather(1, index).softmax(1),
            "unweighted": lambda: torch.ones(tokens, k),
        }[options["gate_function"]]().double()
        rest = {m: v for m, v in options.items() if m != "k"}
        return {"index": index, "gate": gate.detach().nan_to_num(0), "softmax": softmax.detach(), **rest}

    shapes = [(tokens, out), (tokens, k), (options["groups"], experts)]
    case = drawn(
        n, routed, sums.routed_ffn, tensors | fixed, shapes, options,
        fixed=tuple(fixed), ranked=("router_weight",), known=known,
    )  # fmt: skip
    case.backends, case.wide = ("reference", "cpu"), ("gate", "sums")
    return case


@built
@given(routed_ffn_cases(), examples=150)
def test_routed_ffn(poisoned: None, case: Case) -> None:
    case.check()
    with torch.no_grad():
        assert torch.equal(flat.routed_ffn(**case.tensors, **case.options)[1], case.known["index"])


@st.composite
def cvmm_cases(draw: Callable[..., Any]) -> Case:
    n = Numbers(draw, draw(DTYPES))
    rows, (depth, out), experts = draw(TOKENS), draw(SIDES), draw(EXPERTS)
    gathered, scattered = rows > 0 and draw(st.booleans()), draw(st.booleans())
    slots = draw(TOKENS) if gathered else rows
    tensors = {"x": n.real(rows, depth), "weight": n.real(experts, depth, out), "expert": n.experts(experts, slots)}
    options: dict[str, Any] = {}
    if gathered:
        tensors["gather"] = n.index(rows, slots)
    if scattered:
        options["n_out"] = draw(SIZES)
        tensors["scatter"] = n.index(options["n_out"], slots)
    if draw(st.booleans()):
        tensors["reduction"] = n.weight(slots)
    return drawn(n, ops.cvmm, sums.cvmm, tensors, [(options.get("n_out", slots), out)], options)


@given(cvmm_cases(), examples=150)
def test_cvmm(poisoned: None, case: Case) -> None:
    case.check()


@st.composite
def bag_cases(draw: Callable[..., Any]) -> Case:
    n = Numbers(draw, draw(DTYPES))
    table, bags, width, out = draw(st.one_of(SIZES, st.just(900))), draw(TOKENS), draw(st.integers(0, 20)), draw(DEPTHS)
    tensors = {"values": n.real(table, out), "index": n.index(table, bags, width), "weight": n.weight(bags, width)}
    case = drawn(n, ops.weighted_bag, sums.weighted_bag, tensors, [(bags, out)], {}, gathered=bags * width * out)
    case.options = {"sparse_grad": draw(st.booleans())}
    return case


@given(bag_cases(), examples=150)
def test_weighted_bag(poisoned: None, case: Case) -> None:
    case.check()


@st.composite
def topk_ffn_cases(draw: Callable[..., Any]) -> Case:
    n, activation = Numbers(draw, draw(DTYPES)), draw(st.sampled_from(list(ACTIVATIONS)))
    tokens, width, (depth, out) = draw(TOKENS), draw(st.one_of(SIZES, st.just(300))), draw(SIDES)
    tensors = {
        "x": n.whole(tokens, depth),
        "keys": n.whole(width, depth),
        "values": n.real(width, out),
        **units(n, (width,), depth),
    }
    if draw(st.booleans()):
        tensors["dropout_mask"] = n.dropout(tokens, width)
    options = {
        "k": width if activation in SMOOTH else draw(st.integers(1, width)),  # how these are rounded is anyone's
        "activation": activation,
        "norm_aware": draw(st.booleans()),
        "rank_by": draw(st.sampled_from(["hidden", "gate"] if "gate_keys" in tensors else ["hidden"])),
    }

    def known(t: dict[str, Tensor]) -> dict[str, Any]:
        """Ranked are the units as they are in the op's dtype; products of x and keys have no rounding."""
        if activation in SMOOTH:
            return {"index": torch.arange(width).expand(tokens, -1), "activation": activation}
        with torch.no_grad():
            up = t["x"].double() @ t["keys"].double().t() + t.get("key_bias", torch.zeros(())).double()
            h = up if "gate_keys" not in t else t["x"].double() @ t["gate_keys"].double().t()
            h = exact_activation(activation, h.to(n.dtype))
            h = h if "gate_keys" not in t or options["rank_by"] == "gate" else h * up.to(n.dtype)
            score = (h if "dropout_mask" not in t else h * t["dropout_mask"]).abs()
            if options["norm_aware"]:
                wide = torch.promote_types(n.dtype, torch.float32)
                score = score.to(wide) * t["values"].to(wide).norm(dim=1)
            return {"index": best(score, options["k"]), "activation": activation}

    return drawn(
        n, flat.topk_ffn, sums.topk_ffn, tensors, [(tokens, out)], options,
        fixed=("dropout_mask",), ranked=("keys", "gate_keys"), known=known,
        gathered=tokens * options["k"] * max(depth, out),
    )  # fmt: skip


@given(topk_ffn_cases(), examples=150)
def test_topk_ffn(poisoned: None, case: Case) -> None:
    case.check()


@st.composite
def wide_product_cases(draw: Callable[..., Any]) -> Case:
    n = Numbers(draw, draw(st.sampled_from(CORE)))
    batch, rows, (depth, width) = draw(st.sampled_from([1, 2, 5])), draw(TOKENS), draw(SIDES)
    tensors = {"x": n.real(batch, rows, depth), "w": n.real(batch, width, depth)}
    case = drawn(n, ops.wide_product, sums.wide_product, tensors, [(batch, rows, width)], {})
    case.backends, case.wide = ("reference", "cpu"), ("output",)
    return case


@given(wide_product_cases(), examples=50)
def test_wide_product(poisoned: None, case: Case) -> None:
    case.check()


@st.composite
def score_tables(draw: Callable[..., Any]) -> tuple[Tensor, Tensor, int]:
    n = Numbers(draw, draw(DTYPES))
    shape = (*draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.one_of(SIZES, st.just(300))))
    tables = [n.whole(*shape) if draw(st.booleans()) else n.real(*shape) for _ in range(2)]
    for table in tables:
        for kind in draw(st.lists(KINDS, max_size=2)):
            table.copy_(n.spoil(table.clone(), kind))
        if draw(st.booleans()):  # what a mask leaves
            table.masked_fill_(torch.rand(shape, generator=n.generator) < 0.3, -torch.inf)
    return *tables, draw(st.integers(1, min(shape[-1] ** 2, 200)))


def best_pairs(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Of two rows: the pairs of their best whose sums are the best, ranked in fp32 at least."""
    m, n = min(k, len(first)), len(first)
    wide = torch.promote_types(first.dtype, torch.float32)
    i, j = (best(half.unsqueeze(0), m)[0] for half in (first, second))
    position = torch.arange(m)
    can_win = (position[:, None] + 1) * (position[None, :] + 1) <= k
    total = (first[i].to(wide).unsqueeze(1) + second[j].to(wide))[can_win]
    return (i.unsqueeze(1) * n + j)[can_win][best(total.unsqueeze(0), k)[0]]


@given(score_tables(), examples=150)
def test_product_key_topk(poisoned: None, tables: tuple[Tensor, Tensor, int]) -> None:
    first, second, k = tables
    n = first.shape[-1]
    rows = zip(first.reshape(-1, n), second.reshape(-1, n), strict=True)
    index = torch.stack([best_pairs(*row, k) for row in rows]) if first.numel() else torch.zeros(0, dtype=torch.int64)
    index = index.view(*first.shape[:-1], k)
    sums = first.gather(-1, index // n) + second.gather(-1, index % n)
    for backend in on(first.dtype):
        with sf.backend(backend):
            actual, actual_index = functional.product_key_topk(first, second, k)
        assert torch.equal(actual_index, index), backend
        assert torch.equal(actual.isnan(), sums.isnan()), backend
        assert torch.equal(actual.nan_to_num(7), sums.nan_to_num(7)), backend


SHAPES = {  # of every argument, a letter a size: one that two of them share cannot be changed in one
    "cvmm": {
        **{"x": "SM", "weight": "EML", "expert_index": "S"},
        **{"gather_index": "S", "scatter_index": "S", "reduction_weight": "S"},
    },
    "expert_ffn": {
        **{"x": "TD", "keys": "EGD", "values": "EGO", "index": "TK", "gate": "TK"},
        **{"gate_keys": "EGD", "key_bias": "EG"},
    },
    "weighted_bag": {"values": "FO", "index": "NK", "weight": "NK"},
    "topk_ffn": {"x": "TD", "keys": "FD", "values": "FO", "gate_keys": "FD", "key_bias": "F"},
    "product_key_topk": {"first": "TN", "second": "TN"},
}
OPTIONAL = ("gather_index", "scatter_index", "reduction_weight", "gate_keys", "key_bias")
FREE = {"expert_ffn": ("gate",), "weighted_bag": ("values", "weight"), "cvmm": ("reduction_weight",)}
"""What may have a dtype that no other argument has."""


@st.composite
def wrong_calls(draw: Callable[..., Any]) -> tuple[str, dict[str, Any], str, type[Exception] | None]:
    """A function, arguments of which one is changed, that one's name, and the error that is right, if one is."""
    name = draw(st.sampled_from(list(SHAPES)))
    shapes = {m: letters for m, letters in SHAPES[name].items() if m not in OPTIONAL or draw(st.booleans())}
    if "gather_index" in shapes:
        shapes["x"] = "NM"
    sizes = {letter: draw(st.integers(2, 5)) for letter in "".join(shapes.values())}
    arguments: dict[str, Any] = {}
    for m, letters in shapes.items():
        shape = [sizes[letter] for letter in letters]
        arguments[m] = torch.zeros(shape, dtype=torch.int64) if m.endswith("index") else torch.randn(shape)
    arguments |= {"k": 1} if name in ("topk_ffn", "product_key_topk") else {}
    arguments |= {"n_out": 3} if "scatter_index" in arguments else {}
    m = draw(st.sampled_from(list(shapes)))
    kind = draw(st.sampled_from(["size", "dimensions", "dtype"]))
    x, letters = arguments[m], shapes[m]
    if kind == "size":
        axis = draw(st.integers(0, len(letters) - 1))
        shape = list(x.shape)
        shape[axis] += draw(st.sampled_from([-1, 1]))
        arguments[m] = x.new_zeros(shape)
        others = "".join(s for other, s in shapes.items() if other != m)
        return name, arguments, m, ValueError if letters[axis] in others else None
    if kind == "dimensions":
        arguments[m] = x.unsqueeze(0)
        return name, arguments, m, ValueError
    arguments[m] = x.int() if m.endswith("index") else x.double()
    return name, arguments, m, None if m in FREE.get(name, ()) else TypeError


@given(wrong_calls(), examples=100)
def test_wrong_arguments_are_refused_by_name(call: tuple[str, dict[str, Any], str, type[Exception] | None]) -> None:
    name, arguments, changed, error = call
    function = getattr(functional, name)
    if error is None:
        function(**arguments)
        return
    with pytest.raises(error) as caught:
        function(**arguments)
    assert any(re.search(rf"\b{m}\b", str(caught.value)) for m in arguments), f"{changed}: {caught.value}"
