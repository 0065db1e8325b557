"""What the compile gate compiles: calls of the library that together launch every kernel in every configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.triton import candidates, config, routing, tuned
from sparse_ffn.ops import Codes, Units
from sparse_ffn.ops.cvmm import triton as cvmm
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.expert_ffn import triton as expert_ffn
from sparse_ffn.ops.negative_entropy import triton as negative_entropy
from sparse_ffn.ops.product_key_topk import triton as product_key_topk
from sparse_ffn.ops.quantized_cvmm import triton as quantized_cvmm
from sparse_ffn.ops.route import triton as route
from sparse_ffn.ops.route.backend import Router
from sparse_ffn.ops.route.op import MAX_ROWS
from sparse_ffn.ops.topk_ffn import triton as topk_ffn
from sparse_ffn.ops.weighted_bag import triton as weighted_bag


def cases(target: str, quick: bool) -> Iterator[Callable[[], None]]:
    """Calls that together launch every kernel in every configuration.

    Quick: every tile of the tables with the form that fuses most, and every form with the highest tiles; the smallest
    and the largest blocks; sizes of 1 in bf16. Without fp16, which takes bf16's tables, and of the newer and rarer
    targets only the forms that fuse most.
    """
    every = [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"), (torch.float16, "ieee")]
    plain = ["relu"] if target in ("sm_80", "sm_90") or not quick else []
    for dtype, switch in every[: 3 if quick else 4]:
        for block_m in (16, 32, 64, 128):
            for width in (64, 256, 100):  # the last is off every grid
                yield partial(experts, dtype, switch, block_m, width, "full")
            if quick and block_m < 128:
                continue
            for width in (64, 256):
                for form in plain:
                    yield partial(experts, dtype, switch, block_m, width, form)
                yield partial(cvmms, dtype, switch, block_m, width)
            for form in ("full", *plain):
                yield partial(experts, dtype, switch, block_m, 256, form, gap=1)  # strides off every grid
            yield partial(cvmms, dtype, switch, block_m, 256, gap=1)
        for form in ("gelu", "dropout"):
            yield partial(experts, dtype, switch, 128, 256, form)
        for width, depth in ((64, 256), (256, 64), (32, 64)):
            yield partial(experts, dtype, switch, 128, width, "relu", depth)
        if dtype == torch.float32:
            yield partial(experts, dtype, switch, 128, 32, "full")  # the smallest tile of the matrices' gradient
        yield partial(experts, dtype, switch, 512, 64, "relu")  # weight gradients in parts
        yield partial(experts, dtype, switch, 128, 100, "relu")
        yield partial(cvmms, dtype, switch, 128, 100)
        if dtype != torch.float32:
            for form in ("full", *plain):
                yield partial(experts, dtype, switch, 128, config.DEEP, form)
            yield partial(cvmms, dtype, switch, 128, config.DEEP)
            # fp32 weights under autocast
            for width, depth in ((256, 256), (64, 256), (256, 64), (64, 64), (100, 100)):
                yield partial(experts, dtype, switch, 128, width, "full", depth, weights=torch.float32)
            yield partial(experts, dtype, switch, 512, 64, "relu", weights=torch.float32)
            yield partial(cvmms, dtype, switch, 128, 256, torch.float32)
        codes = ((4, False, 32), (8, True, 256), (4, True, 2), (8, False, 1))
        for block_m, form in zip((16, 64), codes, strict=False) if quick else product((16, 32, 64), codes):
            yield partial(coded, dtype, switch, block_m, *form)
    for n_experts in (1, 64, 1024, config.SORT.experts, config.SORT.experts - 1):
        yield partial(sorts, n_experts)
    for dtype, weights in (
        (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
    ):  # fmt: skip
        gates = (("sigmoid", "plain"), ("softmax", "full"), ("softmax_topk", "full"))
        most = MAX_ROWS[dtype]
        for rows in (64, most) if quick else sorted({8, 64, 128, min(256, most), most}):
            for gate, form in gates[: 2 if quick else 3]:
                yield partial(routes, dtype, weights, rows, 8, gate, form)
        yield partial(routes, dtype, weights, 64, 1, "unweighted", "plain", 1)
        yield partial(routes, dtype, weights, 1, 1, "softmax", "full", 4096, 1)
        yield partial(routes, dtype, weights, 60, 3, "softmax", "full", 4096, 100)
    for dtype in (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float32, torch.float16):
        for width in (1, 1024) if quick else (1, 100, 256, 1024):
            yield partial(bags, dtype, width, dtype)
            if dtype != torch.float32:
                yield partial(bags, dtype, width, torch.float32)
            # experts of one unit are rows of tables
            for weights in dict.fromkeys((dtype, torch.float32)):
                yield partial(
                    experts, dtype, "ieee", 16, 1, "gelu", width, k=32, weights=weights, n_experts=512, tokens=64
                )
        for n, k in (
            *((20, 1), (20, 2), (20, 4), (64, 8), (128, 16)),
            *((256, 32), (512, 32), (1024, 64), (2000, 1), (2000, 64)),
        ):
            yield partial(product_keys, dtype, n, k)
        for n_units in (100, 8192) if quick else (100, 1024, 4096, 8192):
            for activation, form in (("relu", "plain"), ("gelu", "full"), ("gelu_tanh", "full")):
                yield partial(selections, dtype, n_units, activation, form, dtype)
            if dtype != torch.float32:
                yield partial(selections, dtype, n_units, "gelu", "full", torch.float32)
        if dtype == torch.bfloat16 or not quick:
            yield from ones(dtype)


def ones(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Calls with sizes of 1, which Triton makes constants: they have not all the methods of other arguments.

    Each size by itself, all of them, and matrices of one number whose gradient is split.
    """
    usual: dict[str, Any] = {"dtype": dtype, "switch": "ieee", "block_m": 16, "width": 64}
    for form in ("relu", "full"):
        for size in ({"tokens": 1}, {"n_experts": 1}, {"k": 1}, {"width": 1}, {"depth": 1}):
            yield partial(experts, **usual | {"form": form} | size)
        yield partial(experts, dtype, "ieee", 16, 1, form, 1, k=1, n_experts=1, tokens=1)
        yield partial(experts, dtype, "ieee", 16, 1, form, 1, k=1, tokens=1)
    alone = {"n_experts": 1, "width": 1}
    for size in ({"slots": 1}, {"n_experts": 1}, {"width": 1}, {**alone, "slots": 1}, {**alone, "slots": 1024}):
        yield partial(cvmms, **usual | size)
    for size in ({"rows": 1}, {"bags": 1}, {"k": 1}, {"rows": 1, "bags": 1, "k": 1, "width": 1}):
        yield partial(bags, **{"dtype": dtype, "width": 64, "table": dtype} | size)
    yield partial(coded, dtype, "ieee", 16, 4, False, 32, slots=1)
    yield partial(product_keys, dtype, 1, 1)
    for k, n_units in ((1, 100), (1, 1)):
        yield partial(selections, dtype, n_units, "gelu", "full", dtype, k)


def tuning(table: str) -> Iterator[Callable[[], None]]:
    """Calls that launch each tile which tuning may choose beside those of a table."""
    for (kernel, kind), tiles in candidates.TABLES.get(table, {}).items():
        dtype, switch = (torch.bfloat16, "ieee") if kind == "half" else (torch.float32, "tf32")
        for tile in tiles:
            rows = tuned.WIDTHS if kernel == "outer" else (tile.m,)
            measured = tuned.Tuned(
                {} if kernel == "outer" else {(kind, r): tile.m for r in tuned.ROWS},
                {(kernel, kind, *sizes): tile for sizes in product(rows, tuned.WIDTHS, tuned.WIDTHS)},
            )
            for form in {"one": ("relu", "gelu", "full"), "two": ("full", "dropout"), "outer": ("relu",)}[kernel]:
                yield partial(with_tile, measured, experts, dtype, switch, tile.m, 256, form)
            if kernel != "two":
                yield partial(with_tile, measured, cvmms, dtype, switch, tile.m, 256)


def with_tile(measured: tuned.Tuned, case: Callable[..., None], *arguments: Any) -> None:
    """A case by a table of measurements."""
    with config.using(measured):
        case(*arguments)


def experts(
    dtype: torch.dtype,
    switch: str,
    block_m: int,
    width: int,
    form: str,
    depth: int | None = None,
    *,
    k: int = 2,
    weights: torch.dtype | None = None,
    n_experts: int = 8,
    tokens: int | None = None,
    gap: int = 0,
) -> None:
    """Expert FFN, training, inference, decode and backward.

    Form "full" has all that can be fused; ``gap`` numbers lie between the rows of tokens and matrices.
    """
    torch.backends.cuda.matmul.fp32_precision = switch
    E, K, G, D = n_experts, k, width, depth or (width if width % 16 == 0 else width + 1)
    T = tokens or E * block_m // K

    def empty(*shape: int) -> Tensor:
        return torch.zeros((*shape[:-1], shape[-1] + gap), dtype=dtype)[..., : shape[-1]]

    x, keys, values = empty(T, D), empty(E, G, D).to(dtype=weights), empty(E, G, D).to(dtype=weights)
    index, gate = torch.zeros(T, K, dtype=torch.int64), torch.empty(T, K)
    extra = (empty(E, G, D).to(dtype=weights), empty(E, G).to(dtype=weights)) if form == "full" else (None, None)
    units = Units(keys, values, *extra)
    scale = empty(T, K, G) if form in ("full", "dropout") else None
    activation = "gelu" if form in ("full", "dropout") else form
    _, saved = expert_ffn.forward(x, units, index, gate, scale, activation)
    expert_ffn.inference(x, units, index, gate, scale, activation)
    expert_ffn.inference(x[:1], units, index[:1], gate[:1], None if scale is None else scale[:1], activation)
    expert_ffn.backward(empty(T, D), x, units, gate, scale, saved, True, activation)


def cvmms(
    dtype: torch.dtype,
    switch: str,
    block_m: int,
    width: int,
    weights: torch.dtype | None = None,
    *,
    n_experts: int = 8,
    slots: int | None = None,
    gap: int = 0,
) -> None:
    """CVMM with and without gather, scatter and reduction, forward and backward."""
    torch.backends.cuda.matmul.fp32_precision = switch
    E, M, L = n_experts, width, width
    S = slots or E * block_m
    shapes = ((S, M), (E, M, L), (S, L))
    x, weight, grad = (torch.empty((*s[:-1], s[-1] + gap), dtype=dtype)[..., : s[-1]] for s in shapes)
    slot, weight = torch.zeros(S, dtype=torch.int64), weight.to(dtype=weights)
    for every in (Slots(slot), Slots(slot, slot, slot, torch.empty(S))):
        cvmm.forward(x, weight, every, S)
        cvmm.backward(grad, x, weight, every, True)


def coded(
    dtype: torch.dtype, switch: str, block_m: int, bits: int, symmetric: bool, group: int, *, slots: int | None = None
) -> None:
    """Products with rows of codes, up and down, of many slots and of few, with their gradients."""
    torch.backends.cuda.matmul.fp32_precision = switch
    E, G, C = 8, 256, 256
    S = slots or E * block_m
    qdata = torch.zeros(E, G, C * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scale = torch.zeros(E, G, C // group, dtype=dtype)
    codes = Codes(qdata, scale, None if symmetric else scale.to(torch.uint8))
    x, slot = torch.zeros(S, C, dtype=dtype), torch.zeros(S, dtype=torch.int64)
    for every, down in ((Slots(slot), False), (Slots(slot, slot, slot, torch.empty(S)), True)):
        quantized_cvmm.forward(x, codes, every, down, S)
        quantized_cvmm.forward(x[:8], codes, Slots(*(None if t is None else t[:8] for t in every)), down, 8)
        quantized_cvmm.backward(x, x, codes, every, down)


def bags(dtype: torch.dtype, width: int, table: torch.dtype, *, rows: int = 512, bags: int = 64, k: int = 32) -> None:
    """Weighted bag, forward and both backwards."""
    values, index = torch.empty(rows, width, dtype=table), torch.zeros(bags, k, dtype=torch.int64)
    weight, grad = torch.empty(bags, k, dtype=dtype), torch.empty(bags, width, dtype=table)
    weighted_bag.forward(values, index, weight)
    weighted_bag.backward(grad, values, index, weight)
    weighted_bag.backward(grad, values, index, weight, False)
    weighted_bag.backward_rows(grad, values, index, weight)


def product_keys(dtype: torch.dtype, n: int, k: int) -> None:
    """Product-key top-k of tables of n scores, forward and backward."""
    scores = torch.empty(16, 1, 2, n, dtype=dtype)
    product_key_topk.product_key_topk(*scores.unbind(2), k)
    index = torch.zeros(16, 1, k, dtype=torch.int64)
    product_key_topk.backward(scores.new_empty(16, 1, k), index, scores.shape, scores.stride())


def routes(
    dtype: torch.dtype,
    weights: torch.dtype,
    rows: int,
    k: int,
    gate: str,
    form: str,
    tokens: int = 4096,
    depth: int = 1024,
) -> None:
    """Route, training, inference and backward; form "full" has a bias, a mask and several groups."""
    x, weight = torch.empty(tokens, depth, dtype=dtype), torch.empty(rows, depth, dtype=weights)
    bias, mask, groups = None, None, 1
    if form == "full":
        bias, mask, groups = torch.empty(rows), torch.zeros(tokens, dtype=torch.bool), 2 if tokens > 1 else 1
    router = Router(weight, bias, mask)
    gates, selected, sums, logits = route.forward(x, router, k, gate, groups)
    route.inference(x, router, k, gate, groups)
    route.inference(x[:1], router, k, gate, groups)
    route.backward(gates, sums, x, weight, mask, gates, selected, logits, gate)
    if mask is None:
        loss = negative_entropy.forward(sums, tokens // groups, 1e-3)
        negative_entropy.backward(loss, sums, tokens // groups, 1e-3)


def sorts(n_experts: int) -> None:
    """The sort of slots by that many experts."""
    routing.sort_slots(torch.zeros(1000, dtype=torch.int64), n_experts, 2, 128, inverse=True)


def selections(dtype: torch.dtype, n_units: int, activation: str, form: str, weights: torch.dtype, k: int = 32) -> None:
    """Top-k FFN, gathered and dense; form "full" has all that can be fused."""
    T, D = 4, 64

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, keys, values = empty(T, D), empty(n_units, D).to(dtype=weights), empty(n_units, D).to(dtype=weights)
    units, scale = Units(keys, values), None
    if form == "full":
        units = Units(keys, values, empty(n_units, D).to(dtype=weights), empty(n_units).to(dtype=weights))
        scale = empty(T, n_units)
    for sparse, rank_by in ((True, "gate" if form == "full" else "hidden"), (False, "hidden")):
        topk_ffn.use_gather = lambda *sizes, sparse=sparse: sparse
        _, saved = topk_ffn.forward(x, units, k, scale, activation, form == "full", rank_by)
        for trains in (True, False):
            topk_ffn.backward(empty(T, D), x, units, scale, saved, trains, activation)
