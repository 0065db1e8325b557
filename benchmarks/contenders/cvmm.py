"""cvmm by itself: the two products of a mixture of experts, with their gather, weights and scatter."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks.contenders import gpu_peers
from benchmarks.contenders.moe import grouped_mm
from benchmarks.measuring.contender import DTYPES, Case, Contender, Entry, Oracle
from benchmarks.shapes import MoEShape

# T tokens, K slots a token, S = T·K slots in the order of their tokens, E experts, M inputs, L outputs


class Product(nn.Module):
    """The weights and the routing. Up: [T, M] -> [S, L]. Down, with ``scale``: [S, M] -> [T, L], weighed and summed."""

    def __init__(self, weight_EML: nn.Parameter, index_TK: Tensor, scale_S: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.scale = weight_EML, scale_S
        self.T, self.K = index_TK.shape
        self.expert = index_TK.flatten()
        self.token = torch.arange(self.T, device=index_TK.device).repeat_interleave(self.K)


class Ours(Product):
    """functional.cvmm."""

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        if self.scale is None:
            return sf.functional.cvmm(x, self.weight, self.expert, gather_index=self.token)
        return sf.functional.cvmm(
            x, self.weight, self.expert, scatter_index=self.token, reduction_weight=self.scale, n_out=self.T
        )


class Loop(Product):
    """One product for each expert."""

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        out = x.new_zeros(self.T if self.scale is not None else len(self.expert), self.weight.shape[2])
        for e, weight in enumerate(self.weight.unbind()):  # to index the stack would cost whole gradients of it
            (slots,) = torch.where(self.expert == e)
            if self.scale is None:
                out.index_add_(0, slots, x[self.token[slots]] @ weight)
            else:
                out.index_add_(0, self.token[slots], x[slots] @ weight * self.scale[slots, None])
        return out


class Grouped(Product):
    """Sort the slots, torch's grouped_mm, bring them back."""

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        expert, order = torch.sort(self.expert, stable=True)
        ends = torch.searchsorted(expert, torch.arange(self.weight.shape[0], device=x.device), right=True)
        rows = grouped_mm(x[self.token[order] if self.scale is None else order], self.weight, ends.to(torch.int32))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        if self.scale is None:
            return rows[back]
        return (rows * self.scale[order, None])[back].view(self.T, self.K, -1).sum(1)


class ScatterMoE(Product):
    """scattermoe's parallel_linear, which sorts, gathers and, with gates, weighs and sums."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.package = gpu_peers.peer("scattermoe.parallel_experts")

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        index_TK = self.expert.view(self.T, self.K)
        order = self.package.flatten_sort_count(index_TK, num_experts=self.weight.shape[0])
        if self.scale is None:
            return self.package.parallel_linear(x, self.weight, self.K, *order)  # type: ignore[no-any-return]
        gates_TK = self.scale.view(self.T, self.K)
        return self.package.parallel_linear(x, self.weight, 1, *order, gates=gates_TK)  # type: ignore[no-any-return]


class AuthorsCVMM(Product):
    """The author's cvmm: as published, or his rewrite of it."""

    def __init__(self, module: ModuleType, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            selection = self.module.cvmm_prepare_sel2(self.expert.view(self.T, self.K).int())
            if self.scale is None:
                y = self.module.cvmm(x, selection, self.weight)
            else:
                selection = selection.clone()
                selection.reduction_weight = self.scale.view(self.T, self.K)
                selection.sel_index, selection.out_index = selection.out_index, None
                y = self.module.cvmm(x.view(self.T, self.K, -1), selection, self.weight)
        return y.reshape(-1, self.weight.shape[2]).to(x.dtype)  # type: ignore[no-any-return]


class Dense(nn.Module):
    """One matrix for all tokens, K times as wide: the same arithmetic without gather, sort or weights."""

    def __init__(self, weight: Tensor, rows_in: int, rows_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.rows_in, self.rows_out = rows_in, rows_out

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return (x.reshape(self.rows_in, -1) @ self.weight).reshape(self.rows_out, -1)


def cvmm_case(
    shape: MoEShape, dtype: str, device: torch.device, *, down: bool, libraries: bool | None = None, void: float = 0.0
) -> Case:
    """The first product of an expert FFN (gather), or the second (weigh and scatter).

    ``libraries``: with those that need a GPU; None: where there is one. ``void``: a row more, where this share of the
    slots has no expert.
    """
    factory: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    S = shape.T * shape.k
    rows_in, rows_out, M, L = (S, shape.T, shape.G, shape.D) if down else (shape.T, S, shape.D, shape.G)
    index_TK = torch.rand(shape.T, shape.E, device=device).topk(shape.k).indices
    weight = nn.Parameter((torch.randn(shape.E, M, L, device=device) / math.sqrt(M)).to(DTYPES[dtype]))
    scale = nn.Parameter(torch.rand(S, **factory)) if down else None
    oracle = Oracle(Ours(weight, index_TK, scale), large=S * shape.E * L > MOST_PRODUCTS)

    def of(product: Callable[..., Product]) -> Contender:
        return Contender(product(weight, index_TK, scale), oracle)

    def authors(module: str) -> Contender:
        return of(partial(AuthorsCVMM, gpu_peers.peer(module)))

    def dense() -> Contender:
        wide = (shape.k * M, L) if down else (M, shape.k * L)
        module = Dense(torch.randn(*wide, **factory) / math.sqrt(wide[0]), shape.T, rows_out)
        return Contender(module, Oracle(module))

    entries: tuple[Entry, ...] = (
        Entry("sparse-ffn", "ours", "functional.cvmm, indices checked", lambda: of(Ours)),
        Entry(DENSE, "baseline", "one product of the same arithmetic, k times as wide", dense),
        Entry("per-expert loop", "peer", "one product for each expert", lambda: of(Loop)),
        Entry("torch grouped_mm", "peer", "sort, torch's grouped_mm, unsort", lambda: of(Grouped)),
    )
    if void:
        fewer_TK = torch.where(torch.rand(index_TK.shape, device=device) < void, shape.E, index_TK)
        fewer = Ours(weight, fewer_TK, scale)
        about = f"the same with {void:.0%} of the slots void"
        entries += (Entry("sparse-ffn, void slots", "peer", about, lambda: Contender(fewer, Oracle(fewer))),)
    if libraries or (libraries is None and device.type == "cuda"):
        entries += (
            Entry("ScatterMoE", "peer", "scattermoe's parallel_linear", lambda: of(ScatterMoE)),
            Entry("moe_layer", "peer", "the author's published cvmm; fp16 inside for bf16",
                  lambda: authors(gpu_peers.MOE_LAYER)),
            Entry("cvmm, 2026", "peer", "the author's rewrite of it", lambda: authors(gpu_peers.CVMM)),
        )  # fmt: skip
    x = torch.randn(rows_in, M, **factory).requires_grad_()
    return Case("cvmm-down" if down else "cvmm-up", str(shape), dtype, x, (rows_out, L), DENSE, entries)


DENSE = "one dense product"
MOST_PRODUCTS = 2**29  # numbers that the reference computes at once: 4 GiB in fp64
