"""ProductKeyMemory and TopKFFN against compositions of torch's ops, a dense FFN and the package product-key-memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_ffn as sf
from benchmarks.contenders.moe import GatedFFN, OnBackend, layer_gradients
from benchmarks.measuring.contender import (
    DTYPES,
    Case,
    Contender,
    Entry,
    Gradients,
    Oracle,
    gap,
    own_gradients,
    require,
    separated,
)
from benchmarks.shapes import MemoryShape, TopKShape

# T tokens, H heads, S the two halves, N sub-keys, C half a query, K selected

PACKAGE_HALF = 128  # product-key-memory's default: half the width of a head's query


class BagMemory(nn.Module):
    """A product-key memory written with torch's ops: topk over the halves, topk over the pairs, embedding_bag."""

    def __init__(self, layer: sf.ProductKeyMemory) -> None:
        super().__init__()
        self.sub_keys, self.values, self.query = layer.sub_keys, layer.values, layer.query
        self.k, self.softmax = layer.k, layer.activation == "softmax"

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        n_heads, n = self.sub_keys.shape[1:3]
        if self.query is None:
            score_THSN = torch.einsum("tsc,shnc->thsn", rearrange(x, "t (s c) -> t s c", s=2), self.sub_keys)
        else:
            query = F.linear(x, self.query.weight)  # torch's product, not ours
            query_THSC = rearrange(query, "t (h s c) -> t h s c", h=n_heads, s=2)
            query_THSC = F.layer_norm(query_THSC, query_THSC.shape[-1:])
            score_THSN = torch.einsum("thsc,shnc->thsn", query_THSC, self.sub_keys)
        best, place = score_THSN.topk(self.k, dim=-1)
        pairs = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
        units = (place[:, :, 0, :, None] * n + place[:, :, 1, None, :]).flatten(2)
        score_THK, position_THK = pairs.topk(self.k, dim=-1)
        weight_THK = score_THK.softmax(-1) if self.softmax else score_THK.relu()
        index = units.gather(2, position_THK).flatten(1)
        return F.embedding_bag(index, self.values, per_sample_weights=weight_THK.flatten(1), mode="sum")


class PackageMemory(nn.Module):
    """product-key-memory's layer with our weights."""

    def __init__(self, layer: sf.ProductKeyMemory, shape: MemoryShape, half: int, **factory: Any) -> None:
        super().__init__()
        package = require("product_key_memory", "product-key-memory")
        self.pkm = package.PKM(shape.D, heads=shape.H, num_keys=shape.n, topk=shape.k, dim_head=half).to(**factory)
        assert layer.query is not None
        with torch.no_grad():
            query = rearrange(layer.query.weight, "(h s c) d -> (s h c) d", h=shape.H, s=2)
            self.pkm.to_queries.weight.copy_(query)
            self.pkm.keys.copy_(rearrange(layer.sub_keys, "s h n c -> h n s c"))
            self.pkm.values.weight.copy_(layer.values)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y: Tensor = self.pkm(x.unsqueeze(0)).squeeze(0)
        return y


def memory_case(
    shape: MemoryShape, dtype: str, device: torch.device, *, learned: bool, half: int = PACKAGE_HALF
) -> Case:
    """ProductKeyMemory: the paper's, or with the learned query and softmax of the package."""
    factory: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    options: dict[str, Any] = {"query_dim": 2 * half, "query_norm": "layer", "activation": "softmax"} if learned else {}
    layer = sf.ProductKeyMemory(shape.D, shape.n, shape.k, n_heads=shape.H, **options, **factory)
    oracle = Oracle(layer)

    def rounded(module: nn.Module, gradients: Any = own_gradients) -> Contender:
        return Contender(module, oracle, gradients=gradients, checked=copy.deepcopy(module).float())

    def package_gradients(module: nn.Module) -> Gradients:
        found = own_gradients(module)
        return {
            "query.weight": rearrange(found["pkm.to_queries.weight"], "(s h c) d -> (h s c) d", h=shape.H, s=2),
            "sub_keys": rearrange(found["pkm.keys"], "h n s c -> s h n c"),
            "values": found["pkm.values.weight"],
        }

    def margin(x: Tensor) -> Tensor:
        module = oracle.module
        assert isinstance(module, sf.ProductKeyMemory)
        first, second = module._scores(x).unbind(2)
        k = min(shape.k + 1, shape.n**2)
        with sf.backend("reference"):
            best, _ = sf.functional.product_key_topk(first, second, k)
        return gap(best, shape.k).amin(1)

    entries = [
        Entry("sparse-ffn", "ours", "ProductKeyMemory" + (", learned query, softmax" if learned else ""),
              lambda: Contender(layer, oracle)),
        Entry("sparse-ffn, torch backend", "baseline", "the same without the CPU core",
              lambda: Contender(OnBackend(layer, "torch"), oracle, gradients=layer_gradients)),
        Entry(BAG, "peer", "the same function out of topk and embedding_bag; scores in its dtype",
              lambda: rounded(BagMemory(layer))),
    ]  # fmt: skip
    if learned:
        about = "its whole layer, the same function with the same weights; scores in its dtype"
        entries.append(
            Entry("product-key-memory", "peer", about,
                  lambda: rounded(PackageMemory(layer, shape, half, **factory), package_gradients))
        )  # fmt: skip
    x = separated(shape.T, shape.D, DTYPES[dtype], device, margin)
    return Case("pkm-query" if learned else "pkm", str(shape), dtype, x, (shape.T, shape.D), BAG, tuple(entries))


BAG = "torch EmbeddingBag"


class MaskedTopK(nn.Module):
    """A dense FFN whose hidden units outside the k largest are set to zero: what one writes first."""

    def __init__(self, layer: sf.TopKFFN) -> None:
        super().__init__()
        self.keys, self.key_bias, self.values, self.out_bias = layer.keys, layer.key_bias, layer.values, layer.out_bias
        self.k = layer.k

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        hidden = F.linear(x, self.keys, self.key_bias).relu()
        best, index = hidden.topk(self.k, dim=-1)
        return F.linear(torch.zeros_like(hidden).scatter(1, index, best), self.values.t(), self.out_bias)


def topk_case(shape: TopKShape, dtype: str, device: torch.device, *, glu: bool = False) -> Case:
    """TopKFFN and the dense FFN that it replaces."""
    factory: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    options: dict[str, Any] = {"glu": True, "activation": "silu", "bias": False} if glu else {}
    layer = sf.TopKFFN(shape.D, shape.F, shape.k, **options, **factory)
    oracle = Oracle(layer)

    def rounded(module: nn.Module, gradients: Any = own_gradients) -> Contender:
        return Contender(module, oracle, gradients=gradients, checked=copy.deepcopy(module).float())

    def dense() -> Contender:
        module: nn.Module = nn.Sequential(
            nn.Linear(shape.D, shape.F, **factory), nn.ReLU(), nn.Linear(shape.F, shape.D, **factory)
        )
        if glu:
            module = GatedFFN(shape.D, shape.F, **factory)
        return Contender(module, Oracle(module))

    def margin(x: Tensor) -> Tensor:
        up = x @ layer.keys.detach().double().T
        if layer.gate_keys is None:
            return gap(up.relu(), shape.k)
        return gap((F.silu(x @ layer.gate_keys.detach().double().T) * up).abs(), shape.k)

    entries = [
        Entry("sparse-ffn", "ours", "TopKFFN", lambda: rounded(layer)),
        Entry("sparse-ffn, torch backend", "baseline", "the same without the CPU core",
              lambda: rounded(OnBackend(layer, "torch"), layer_gradients)),
        Entry("dense", "baseline", f"the dense FFN that it replaces, d_ff = {shape.F}, its biases included", dense),
    ]  # fmt: skip
    if not glu:
        about = "the same function out of topk and scatter"
        entries.append(Entry("torch.topk and a mask", "baseline", about, lambda: rounded(MaskedTopK(layer))))
    x = separated(shape.T, shape.D, DTYPES[dtype], device, margin)
    group = "topk-glu" if glu else "topk"
    return Case(group, str(shape), dtype, x, (shape.T, shape.D), "dense", tuple(entries))
