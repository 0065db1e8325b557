"""Mixtures of experts that other libraries compute on GPUs, with our weights behind our router.

None of them is installed with this library. Each adapter calls the peer's own kernels as its documentation says; a peer
that cannot be imported, or that refuses a shape or a dtype, is a line in the table that says why.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_ffn as sf
from benchmarks.measuring.contender import Entry, Gradients, imported

# T tokens, D d_model, E experts, G units of an expert, K selected. Ours: keys, gate_keys and values [E, G, D]

PEERS = Path(__file__).parents[2] / "runs" / "gpu-peers"
"""Where ``benchmarks/fetch_gpu_peers.sh`` puts them."""
MOE_LAYER, CVMM = "moe_layer.cvmm", "cvmm_codex.cvmm"
TUNED = ("moe_layer", "cvmm, 2026")
"""Peers that compile and try dozens of kernels at each shape and dtype: a matter of minutes."""

Experts = Callable[[sf.MoE], nn.Module]


def peer(module: str) -> ModuleType:
    """Import a peer's module out of ``PEERS``, or where it is installed.

    Raises:
        NotInstalled: it cannot be found, or its import fails.
    """
    if str(PEERS) not in sys.path:
        sys.path.insert(0, str(PEERS))  # for good: some import more of themselves at their first call
    _tune_briefly()
    return imported(module, "benchmarks/fetch_gpu_peers.sh fetches it")


@functools.cache
def _tune_briefly() -> None:
    """Peers that tune themselves at every shape would do so for minutes, and in each process anew."""
    from triton import testing

    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    testing.do_bench = functools.partial(testing.do_bench, warmup=1, rep=10)  # milliseconds, not 25 and 100


def versions() -> str:
    """The pinned states that were fetched."""
    file = PEERS / "versions.txt"
    return ", ".join(file.read_text().splitlines()) if file.is_file() else "none fetched"


class PeerExperts(nn.Module):
    """Experts of a peer: called as experts(x, index, gate); ``gradients`` gives ours by name."""

    def gradients(self) -> Gradients:
        """Of keys, values and, of a GLU, gate_keys."""
        raise NotImplementedError


def gradient(p: Tensor) -> Tensor:
    """A parameter's; zero if it has none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


class ScatterMoE(PeerExperts):
    """scattermoe.mlp: up (and gate) rows of an expert in one matrix [E, G or 2G, D], the other one [E, D, G]."""

    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        mlp = peer("scattermoe.mlp")
        E, G, D = layer.keys.shape
        glu = layer.gate_keys is not None
        made = (mlp.GLUMLP if glu else mlp.MLP)(D, G, E, layer.k, activation=F.silu if glu else F.relu)
        self.mlp = made.to(layer.keys.device, layer.keys.dtype)
        halves = [layer.keys] if layer.gate_keys is None else [layer.keys, layer.gate_keys]
        with torch.no_grad():
            self.mlp.experts.weight.copy_(torch.cat(halves, dim=1))
            self.mlp.output_experts.weight.copy_(layer.values.transpose(1, 2))
        self.glu = glu

    def forward(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y: Tensor = self.mlp(x, gate, index)
        return y

    def gradients(self) -> Gradients:
        """See the base class."""
        up = gradient(self.mlp.experts.weight)
        found = {"values": gradient(self.mlp.output_experts.weight).transpose(1, 2)}
        if not self.glu:
            return {"keys": up, **found}
        keys, gate_keys = up.chunk(2, dim=1)
        return {"keys": keys, "gate_keys": gate_keys, **found}


class SonicMoE(PeerExperts):
    """sonicmoe's general routing, a SwiGLU in bf16: rows of gate and up in turn [E, 2G, D], the other one [E, D, G]."""

    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        self.function = peer("sonicmoe.functional").moe_general_routing_inputs
        self.kind = peer("sonicmoe.enums").ActivationType.SWIGLU
        assert layer.gate_keys is not None
        first = torch.stack([layer.gate_keys, layer.keys], dim=2).flatten(1, 2)
        self.up = nn.Parameter(first.detach().clone().contiguous())
        self.down = nn.Parameter(layer.values.detach().transpose(1, 2).contiguous())

    def forward(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        token = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(index.shape[1])
        y, _ = self.function(
            x=x, router_scores=gate.flatten().float(), token_indices=token, expert_indices=index.flatten().int(),
            w1=self.up.permute(1, 2, 0), b1=None, w2=self.down.permute(1, 2, 0), b2=None, E=len(self.up),
            stream_id=_stream(x), activation_type=self.kind, is_inference_mode_enabled=not torch.is_grad_enabled(),
        )  # fmt: skip
        return y  # type: ignore[no-any-return]

    def gradients(self) -> Gradients:
        """See the base class."""
        up = gradient(self.up)
        return {"keys": up[:, 1::2], "gate_keys": up[:, ::2], "values": gradient(self.down).transpose(1, 2)}


def _stream(x: Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.device.type == "cuda" else 0


class Liger(PeerExperts):
    """liger_kernel's fused MoE, a SwiGLU: rows of gate, then of up [E, 2G, D], the other matrix [E, D, G]."""

    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        self.function = peer("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
        assert layer.gate_keys is not None
        self.up = nn.Parameter(torch.cat([layer.gate_keys, layer.keys], dim=1).detach().clone())
        self.down = nn.Parameter(layer.values.detach().transpose(1, 2).contiguous())

    def forward(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y: Tensor = self.function.apply(x, self.up, self.down, index.int(), gate)
        return y

    def gradients(self) -> Gradients:
        """See the base class."""
        gate_keys, keys = gradient(self.up).chunk(2, dim=1)
        return {"keys": keys, "gate_keys": gate_keys, "values": gradient(self.down).transpose(1, 2)}


class AuthorsCVMM(PeerExperts):
    """Two calls of the author's cvmm, as his MoE layer makes them: keys [E, D, G]; bf16 under autocast."""

    def __init__(self, layer: sf.MoE, module: ModuleType) -> None:
        super().__init__()
        self.module = module
        self.up = nn.Parameter(layer.keys.detach().transpose(1, 2).contiguous())
        self.gate_up = None
        if layer.gate_keys is not None:
            self.gate_up = nn.Parameter(layer.gate_keys.detach().transpose(1, 2).contiguous())
        self.down = nn.Parameter(layer.values.detach().clone())

    def forward(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            selection = self.module.cvmm_prepare_sel2(index.int())
            hidden = self.module.cvmm(x, selection, self.up)
            if self.gate_up is None:
                hidden = F.relu(hidden)
            else:
                hidden = F.silu(self.module.cvmm(x, selection, self.gate_up)) * hidden
            selection = selection.clone()
            selection.reduction_weight, selection.sel_index, selection.out_index = gate, selection.out_index, None
            y: Tensor = self.module.cvmm(hidden, selection, self.down)
        return y.view(x.shape).to(x.dtype)

    def gradients(self) -> Gradients:
        """See the base class."""
        found = {"keys": gradient(self.up).transpose(1, 2), "values": gradient(self.down)}
        return found if self.gate_up is None else {**found, "gate_keys": gradient(self.gate_up).transpose(1, 2)}


def moe_layer(layer: sf.MoE) -> PeerExperts:
    """The author's published kernels."""
    return AuthorsCVMM(layer, peer(MOE_LAYER))


def cvmm_rewrite(layer: sf.MoE) -> PeerExperts:
    """The author's rewrite of them."""
    return AuthorsCVMM(layer, peer(CVMM))


EXPERTS: dict[str, tuple[Experts, str]] = {
    "ScatterMoE": (ScatterMoE, "scattermoe's MLP, our router"),
    "moe_layer": (moe_layer, "the author's published cvmm twice, our router; fp16 inside for bf16"),
    "cvmm, 2026": (cvmm_rewrite, "the author's rewritten cvmm twice, our router"),
}
"""Peers with ReLU and with SwiGLU experts: how to build them from our layer, and what they are."""
GLU_EXPERTS: dict[str, tuple[Experts, str]] = {
    **EXPERTS,
    "SonicMoE": (SonicMoE, "sonicmoe's general routing, our router"),
    "Liger": (Liger, "liger_kernel's fused MoE, our router"),
}


def entries(build: Callable[[Experts], Any], *, glu: bool) -> tuple[Entry, ...]:
    """Entries of all GPU peers; ``build`` makes a contender from experts."""
    return tuple(
        Entry(name, "peer", about, lambda make=make: build(make))  # type: ignore[misc]
        for name, (make, about) in (GLU_EXPERTS if glu else EXPERTS).items()
    )
