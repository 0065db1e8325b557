"""Mixtures of experts: SigmaMoE against dense networks, plain torch and other libraries, with ReLU or as a GLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_ffn as sf
from benchmarks.contenders import gpu_peers, kt_kernel, moe_peers
from benchmarks.measuring.contender import (
    DTYPES,
    Case,
    Contender,
    Entry,
    Experts,
    Gradients,
    Oracle,
    gap,
    own_gradients,
    require_memory,
    separated,
)
from benchmarks.shapes import MoEShape

# T tokens, D d_model, E experts, G units of an expert, K selected, S = T·K slots sorted by expert


class Problem:
    """One layer and one input, which all contenders share."""

    def __init__(self, shape: MoEShape, dtype: str, device: torch.device, *, glu: bool) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        options: dict[str, Any] = {"glu": True, "activation": "silu"} if glu else {}
        self.factory: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
        self.layer = sf.SigmaMoE(shape.D, shape.E, shape.G, shape.k, **options, **self.factory)

    @cached_property
    def oracle(self) -> Oracle:
        """Of the layer."""
        return Oracle(self.layer, sf.aux_loss)

    @cached_property
    def x(self) -> Tensor:
        """Tokens whose k-th and next expert are apart."""
        weight = self.layer.router.weight.detach().double()
        return separated(
            self.shape.T, self.shape.D, DTYPES[self.dtype], self.device, lambda x: gap(x @ weight.T, self.shape.k)
        )

    def ours(self) -> Contender:
        """The layer, balance loss included."""
        return Contender(self.layer, self.oracle, loss=sf.aux_loss)

    def on_torch(self) -> Contender:
        """The layer on the backend that needs no compiler."""
        module = OnBackend(self.layer, "torch")
        return Contender(module, self.oracle, loss=sf.aux_loss, gradients=layer_gradients)

    def routed(self, experts: nn.Module) -> Contender:
        """Other experts behind the layer's router; they have the layer's parameters, under the same names."""
        return Contender(Routed(self.layer.router, experts), self.oracle, gradients=_routed_gradients)

    def peer_experts(self, make: gpu_peers.Experts) -> Contender:
        """A GPU library's experts, made from our layer, behind its router."""

        def gradients(module: nn.Module) -> Gradients:
            assert isinstance(experts, gpu_peers.PeerExperts)
            return {"router.weight": gpu_peers.gradient(self.layer.router.weight), **experts.gradients()}

        experts = make(self.layer)
        return Contender(Routed(self.layer.router, experts), self.oracle, gradients=gradients)

    def gpu_peers(self) -> tuple[Entry, ...]:
        """The libraries that compute on GPUs, there."""
        glu = self.layer.gate_keys is not None
        return gpu_peers.entries(self.peer_experts, glu=glu) if self.device.type == "cuda" else ()

    def dense(self, d_ff: int) -> Contender:
        """A dense network of d_ff units without biases."""
        module: nn.Module
        if self.layer.gate_keys is None:
            module = nn.Sequential(
                nn.Linear(self.shape.D, d_ff, bias=False, **self.factory),
                nn.ReLU(),
                nn.Linear(d_ff, self.shape.D, bias=False, **self.factory),
            )
        else:
            module = GatedFFN(self.shape.D, d_ff, **self.factory)
        # on a GPU its float64 could fill the memory, and of its tokens one is like another
        return Contender(module, Oracle(module), tokens=1024 if self.device.type == "cuda" else None)


class OnBackend(nn.Module):
    """A layer of ours with one backend forced."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        with sf.backend(self.name):
            y: Tensor = self.layer(x)
        return y


def layer_gradients(module: nn.Module) -> Gradients:
    """Of an ``OnBackend``."""
    return {name.removeprefix("layer."): grad for name, grad in own_gradients(module).items()}


class GatedFFN(nn.Module):
    """Dense GLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ff: int, **factory: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False, **factory)
        self.up = nn.Linear(d_model, d_ff, bias=False, **factory)
        self.down = nn.Linear(d_ff, d_model, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class ExpertsAlone(nn.Module):
    """Our experts, with a routing from before."""

    def __init__(self, layer: sf.MoE, x: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.gate_keys, self.activation = (
            layer.keys, layer.values, layer.gate_keys, layer.activation,
        )  # fmt: skip
        with torch.no_grad():
            routing = layer.router(x)
        self.index, self.gate = routing.index_TK, routing.gate_TK.detach().to(x.dtype).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return sf.functional.expert_ffn(
            x, self.keys, self.values, self.index, self.gate, gate_keys=self.gate_keys, activation=self.activation
        )


def sonic_bytes(shape: MoEShape, element_size: int, *, glu: bool) -> int:
    """What SonicMoE's experts keep for the backward pass beyond x: the pre-activations; scores, indices and offsets."""
    slots = shape.T * shape.k
    return slots * shape.G * element_size * (1 + glu) + 4 * 4 * slots + 4 * (shape.E + 1)


class Routed(nn.Module):
    """Experts called as experts(x, index, gate), behind our router and without a balance loss."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        routing = self.router(x_TD)
        y: Tensor = self.experts(x_TD, routing.index_TK, routing.gate_TK.to(x_TD.dtype))
        return y


def _routed_gradients(module: nn.Module) -> Gradients:
    return {name.removeprefix("experts."): grad for name, grad in own_gradients(module).items()}


class _Experts(nn.Module):
    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values


class LoopExperts(_Experts):
    """A Python loop over the experts, each on the tokens that chose it: what most model code does.

    The stacks are unbound before: to index one in the loop has autograd make a gradient of the whole stack for each
    expert.
    """

    def forward(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        out = torch.zeros_like(x_TD)
        for e, (keys_GD, values_GD) in enumerate(zip(self.keys.unbind(), self.values.unbind(), strict=True)):
            token, slot = torch.where(index_TK == e)
            if len(token):
                hidden = F.relu(F.linear(x_TD[token], keys_GD))
                out.index_add_(0, token, hidden @ values_GD * gate_TK[token, slot, None])
        return out


class GroupedExperts(_Experts):
    """Slots sorted by expert, torch's grouped matrix product, slots brought back and summed."""

    def forward(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        T, K = index_TK.shape
        expert_S, order = torch.sort(index_TK.flatten(), stable=True)
        ends = torch.searchsorted(expert_S, torch.arange(self.keys.shape[0], device=x_TD.device), right=True)
        ends = ends.to(torch.int32)
        hidden_SG = F.relu(grouped_mm(x_TD[order // K], self.keys.transpose(1, 2), ends))
        out_SD = grouped_mm(hidden_SG, self.values, ends) * gate_TK.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(T * K, device=x_TD.device)
        return out_SD[back].view(T, K, -1).sum(1)


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's, under the name that this version has it."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    y: Tensor = function(rows, weight, offs=ends)
    return y


def moe_case(shape: MoEShape, dtype: str, device: torch.device) -> Case:
    """SigmaMoE with ReLU."""
    p = Problem(shape, dtype, device, glu=False)

    def loop() -> Contender:
        return p.routed(LoopExperts(p.layer))

    def grouped() -> Contender:
        return p.routed(GroupedExperts(p.layer))

    entries = (
        Entry("sparse-ffn", "ours", "SigmaMoE, with its router and balance loss", p.ours),
        Entry("sparse-ffn, torch backend", "baseline", "the same without the CPU core", p.on_torch),
        _equal_compute(p),
        _equal_parameters(p),
        Entry("per-expert loop", "peer", "a Python loop over the experts, our router", loop),
        Entry("torch grouped_mm", "peer", "sort, torch's grouped_mm, unsort and sum, our router", grouped),
        *p.gpu_peers(),
        Entry("st-moe-pytorch", "peer", moe_peers.ST_MOE, lambda: moe_peers.st_moe(p.layer, shape)),
        Entry("PEER-pytorch", "peer", moe_peers.PEER, lambda: moe_peers.peer(shape, **p.factory)),
    )
    return _case("moe", p, entries)


def glu_case(shape: MoEShape, dtype: str, device: torch.device) -> Case:
    """The same as a GLU with SiLU, which is what the experts of transformers are."""
    p = Problem(shape, dtype, device, glu=True)

    entries = (
        _our_glu(p),
        Entry("sparse-ffn, torch backend", "baseline", "the same without the CPU core", p.on_torch),
        _equal_compute(p),
        _equal_parameters(p),
        *(_transformers(p, name) for name in ("eager", "batched_mm", "grouped_mm")),
        *p.gpu_peers(),
    )
    return _case("moe-glu", p, entries)


def served_case(shape: MoEShape, dtype: str, device: torch.device) -> Case:
    """A GLU of the size of a model that is served: few contenders, checked on few tokens and without the balance loss.

    Of gradients in float64 the memory is to hold one set at a time.
    """
    p = Problem(shape, dtype, device, glu=True)

    def checked_on_few(build: Callable[[], Contender]) -> Contender:
        if "oracle" not in p.__dict__:  # its parameters and one set of gradients, for all contenders
            require_memory(2 * 8 * sum(parameter.numel() for parameter in p.layer.parameters()), device)
            p.oracle.loss = None
        contender = build()
        return replace(contender, loss=None, unchecked_loss=contender.loss, tokens=moe_peers.CHECKED_TOKENS)

    entries = (
        _our_glu(p),
        _equal_compute(p),
        *(_transformers(p, name) for name in ("eager", "grouped_mm")),
        Entry("kt-kernel", "peer", kt_kernel.ABOUT, lambda: kt_kernel.contender(p.layer, p.oracle, shape)),
    )
    entries = tuple(replace(entry, build=partial(checked_on_few, entry.build)) for entry in entries)
    return _case("moe-glu", p, entries)


def _our_glu(p: Problem) -> Entry:
    return Entry("sparse-ffn", "ours", "SigmaMoE(glu=True, activation='silu'), with router and balance loss", p.ours)


def _transformers(p: Problem, implementation: str) -> Entry:
    return Entry(
        f"transformers {implementation}",
        "peer",
        f"MixtralExperts, experts implementation {implementation}, our router",
        lambda: moe_peers.transformers_experts(p.layer, p.oracle, p.shape, implementation),
    )


DENSE = "dense, equal compute"


def _equal_compute(p: Problem) -> Entry:
    return Entry(DENSE, "baseline", "a dense network of k·G units", lambda: p.dense(p.shape.k * p.shape.G))


def _equal_parameters(p: Problem) -> Entry:
    return Entry("dense, equal parameters", "baseline", "of E·G units", lambda: p.dense(p.shape.E * p.shape.G))


def _case(group: str, p: Problem, entries: tuple[Entry, ...]) -> Case:
    s = p.shape
    glu = p.layer.gate_keys is not None
    bound = None if glu or p.device.type == "cuda" else s.T * s.k * s.G + s.T * s.k * 4
    experts = None
    if p.device.type == "cuda":
        experts = Experts(ExpertsAlone(p.layer, p.x), sonic_bytes(s, DTYPES[p.dtype].itemsize, glu=glu))
    return Case(group, str(s), p.dtype, p.x, (s.T, s.D), DENSE, entries, saved_bound=bound, experts=experts)
