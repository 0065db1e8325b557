"""Mixtures of experts that other libraries compute on GPUs, with our weights behind our router.

None of them is installed with this library. Each adapter calls the peer's own kernels as its documentation says; a peer
that cannot be imported, or that refuses a shape or a dtype, is a line in the table that says why.
"""

from __future__ import annotations

import contextlib
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
from benchmarks.contender import Entry, Gradients, NotInstalled, imported, require

# T tokens, D d_model, E experts, G units of an expert, K selected. Ours: keys, gate_keys and values [E, G, D]

MOE_LAYER, CVMM = "MOE_LAYER_PATH", "CVMM_PATH"
"""Where the author's code lies, which no package ships: the folder that holds ``moe_layer/`` (``triton_src`` of
RobertCsordas/moe_layer), and the one that holds the rewritten ``cvmm.py`` (RobertCsordas/cvmm_codex)."""

Experts = Callable[[sf.MoE], nn.Module]


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
        mlp = require("scattermoe.mlp", "git+https://github.com/shawntan/scattermoe")
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
    """sonicmoe's general routing: rows of gate and up interleaved [E, 2G, D], the other matrix [E, D, G]; bf16 only."""

    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        self.functional = require("sonicmoe.functional", "sonic-moe")
        kinds = require("sonicmoe.enums", "sonic-moe").ActivationType
        self.glu = layer.gate_keys is not None
        self.kind = kinds.SWIGLU if self.glu else kinds.RELU
        first = layer.keys
        if layer.gate_keys is not None:
            first = torch.stack([layer.gate_keys, layer.keys], dim=2).flatten(1, 2)
        self.up = nn.Parameter(first.detach().clone().contiguous())
        self.down = nn.Parameter(layer.values.detach().transpose(1, 2).contiguous())

    def forward(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        token = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(index.shape[1])
        y, _ = self.functional.moe_general_routing_inputs(
            x=x, router_scores=gate.flatten().float(), token_indices=token, expert_indices=index.flatten().int(),
            w1=self.up.permute(1, 2, 0), b1=None, w2=self.down.permute(1, 2, 0), b2=None, E=len(self.up),
            stream_id=_stream(x), activation_type=self.kind, is_inference_mode_enabled=not torch.is_grad_enabled(),
        )  # fmt: skip
        return y  # type: ignore[no-any-return]

    def gradients(self) -> Gradients:
        """See the base class."""
        up, found = gradient(self.up), {"values": gradient(self.down).transpose(1, 2)}
        return {"keys": up[:, 1::2], "gate_keys": up[:, ::2], **found} if self.glu else {"keys": up, **found}


def _stream(x: Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.device.type == "cuda" else 0


class MegaBlocks(PeerExperts):
    """megablocks' dropless experts: matrices [E·G, D]; of a GLU w1 is the gate and v1 the other half."""

    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        arguments = require("megablocks.layers.arguments", "megablocks")
        dmoe = require("megablocks.layers.dmoe", "megablocks")
        E, G, D = layer.keys.shape
        self.glu = layer.gate_keys is not None
        made = dmoe.ParallelDroplessMLP(
            arguments.Arguments(
                hidden_size=D, ffn_hidden_size=G, moe_num_experts=E, moe_top_k=layer.k, moe_loss_weight=0.0,
                bias=False, return_bias=False, activation_fn=F.silu if self.glu else F.relu,
                mlp_type="glu" if self.glu else "mlp", mlp_impl="grouped", fp16=False,
                bf16=layer.keys.dtype == torch.bfloat16, device=layer.keys.device,
            )
        )  # fmt: skip
        self.experts = made.to(layer.keys.device, layer.keys.dtype)
        names = {"keys": "v1", "gate_keys": "w1", "values": "w2"} if self.glu else {"keys": "w1", "values": "w2"}
        self.weights = {ours: getattr(self.experts.mlp, theirs) for ours, theirs in names.items()}
        with torch.no_grad():
            for ours, weight in self.weights.items():
                weight.copy_(getattr(layer, ours).view_as(weight))
        self.sizes = (E, G, D)

    def forward(self, x: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y: Tensor = self.experts(x.unsqueeze(0), None, gate, index)
        return y.squeeze(0)

    def gradients(self) -> Gradients:
        """See the base class."""
        return {ours: gradient(weight).view(self.sizes) for ours, weight in self.weights.items()}


class Liger(PeerExperts):
    """liger_kernel's fused MoE, a SwiGLU: rows of gate, then of up [E, 2G, D], the other matrix [E, D, G]."""

    def __init__(self, layer: sf.MoE) -> None:
        super().__init__()
        self.function = require("liger_kernel.ops.fused_moe", "liger-kernel").LigerFusedMoEFunction
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


def from_folder(variable: str, module: str) -> ModuleType:
    """Import a module that lies in the folder which an environment variable names.

    Raises:
        NotInstalled: the variable is not set, or the import fails.
    """
    folder = os.environ.get(variable)
    if not folder:
        raise NotInstalled(f"{variable} does not say where it lies")
    with _first_on_the_path(str(Path(folder).resolve())):
        return imported(module, f"{variable} is {folder}")


@contextlib.contextmanager
def _first_on_the_path(folder: str) -> Any:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def moe_layer(layer: sf.MoE) -> PeerExperts:
    """The author's published kernels."""
    return AuthorsCVMM(layer, from_folder(MOE_LAYER, "moe_layer.cvmm"))


def cvmm_rewrite(layer: sf.MoE) -> PeerExperts:
    """The author's rewrite of them."""
    return AuthorsCVMM(layer, from_folder(CVMM, "cvmm"))


EXPERTS: dict[str, tuple[Experts, str]] = {
    "ScatterMoE": (ScatterMoE, "scattermoe's MLP, our router"),
    "SonicMoE": (SonicMoE, "sonicmoe's general routing, our router"),
    "MegaBlocks": (MegaBlocks, "megablocks' dropless experts by grouped GEMM, our router"),
    "moe_layer": (moe_layer, "the author's published cvmm twice, our router; fp16 inside for bf16"),
    "cvmm, 2026": (cvmm_rewrite, "the author's rewritten cvmm twice, our router"),
}
"""Peers with ReLU and with SwiGLU experts: how to build them from our layer, and what they are."""
GLU_EXPERTS: dict[str, tuple[Experts, str]] = {
    **EXPERTS,
    "Liger": (Liger, "liger_kernel's fused MoE, our router"),
}


def entries(build: Callable[[Experts], Any], *, glu: bool) -> tuple[Entry, ...]:
    """Entries of all GPU peers; ``build`` makes a contender from experts."""
    return tuple(
        Entry(name, "peer", about, lambda make=make: build(make))  # type: ignore[misc]
        for name, (make, about) in (GLU_EXPERTS if glu else EXPERTS).items()
    )
