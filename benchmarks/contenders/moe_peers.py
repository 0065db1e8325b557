"""Mixtures of experts of other libraries, brought to the same sizes and, where they can be, to the same weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_ffn as sf
from benchmarks.measuring.contender import Contender, Gradients, Oracle, own_gradients, require, require_memory
from benchmarks.shapes import MoEShape

CHECKED_TOKENS = 64  # of the peers whose memory traffic is far above their arithmetic

ST_MOE = (
    "its whole layer (softmax gate, renormalised), with our expert and no random dropping; capacity for k slots a "
    "token: what overflows an expert is dropped; bf16 by autocast, since it refuses bf16 weights. Checked against "
    "SoftmaxMoE in fp32 at a capacity that drops nothing"
)
PEER = (
    "its whole layer: as many single-unit experts retrieved for a token as ours has active units (k·G, in heads of "
    "32), from as many in all (the nearest square). Checked against its formula"
)


class TransformersExperts(nn.Module):
    """MixtralExperts with our weights: gate and up rows of an expert lie in one matrix."""

    def __init__(self, layer: sf.MoE, shape: MoEShape, implementation: str) -> None:
        super().__init__()
        mixtral = require("transformers.models.mixtral.modeling_mixtral", "'transformers>=5'")
        config = require("transformers", "'transformers>=5'").MixtralConfig(
            hidden_size=shape.D,
            intermediate_size=shape.G,
            num_local_experts=shape.E,
            num_experts_per_tok=shape.k,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        self.router = layer.router
        self.experts = mixtral.MixtralExperts(config).to(layer.keys.device, layer.keys.dtype)
        assert layer.gate_keys is not None
        with torch.no_grad():
            self.experts.gate_up_proj.copy_(torch.cat([layer.gate_keys, layer.keys], dim=1))
            self.experts.down_proj.copy_(layer.values.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        routing = self.router(x)
        y: Tensor = self.experts(x, routing.index_TK, routing.gate_TK.to(x.dtype))
        return y


def transformers_experts(layer: sf.MoE, oracle: Oracle, shape: MoEShape, implementation: str) -> Contender:
    """One experts implementation of transformers v5."""
    module = TransformersExperts(layer, shape, implementation)
    tokens = None
    if implementation == "batched_mm":  # gathers the weights of every slot, and backward their gradients
        tokens = CHECKED_TOKENS
        require_memory(2 * shape.T * shape.k * 3 * shape.G * shape.D * layer.keys.element_size(), layer.keys.device)

    def gradients(module: nn.Module) -> Gradients:
        found = own_gradients(module)
        gate, up = found["experts.gate_up_proj"].chunk(2, dim=1)
        values = found["experts.down_proj"].transpose(1, 2)
        return {"router.weight": found["router.weight"], "gate_keys": gate, "keys": up, "values": values}

    return Contender(module, oracle, gradients=gradients, tokens=tokens)


class STMoE(nn.Module):
    """st-moe-pytorch's MoE with our weights; keeps the auxiliary loss of its last forward pass."""

    loss: Tensor

    def __init__(self, layer: sf.MoE, shape: MoEShape, capacity: float) -> None:
        super().__init__()
        package = require("st_moe_pytorch", "st-moe-pytorch")
        factory: dict[str, Any] = {"device": layer.keys.device, "dtype": torch.float32}
        experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(shape.D, shape.G, bias=False, **factory),
                nn.ReLU(),
                nn.Linear(shape.G, shape.D, bias=False, **factory),
            )
            for _ in range(shape.E)
        )
        self.moe = package.MoE(
            dim=shape.D,
            num_experts=shape.E,
            gating_top_n=shape.k,
            threshold_train=0.0,
            threshold_eval=0.0,
            capacity_factor_train=capacity,
            capacity_factor_eval=capacity,
            experts=experts,
            straight_through_dispatch_tensor=False,  # it would change the router's gradient
        ).to(**factory)
        with torch.no_grad():
            self.moe.gate.to_gates.weight.copy_(layer.router.weight)
            for expert, keys, values in zip(experts, layer.keys, layer.values, strict=True):
                expert[0].weight.copy_(keys)  # type: ignore[index]
                expert[2].weight.copy_(values.t())  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            result = self.moe(x.unsqueeze(0))
        self.loss = result.total_aux_loss.sum()
        y: Tensor = result.outputs.squeeze(0).to(x.dtype)
        return y


def st_moe(layer: sf.MoE, shape: MoEShape) -> Contender:
    """st-moe-pytorch's layer."""
    slots = max(4, shape.T * shape.k // shape.E)  # an expert's capacity
    require_memory((shape.k + 3) * shape.T * shape.E * slots * 4, layer.keys.device)
    module = STMoE(layer, shape, capacity=shape.k)
    oracle = sf.SoftmaxMoE(shape.D, shape.E, shape.G, shape.k, balance="none").to(layer.keys)
    oracle.load_state_dict(layer.state_dict())

    def gradients(module: nn.Module) -> Gradients:
        found = own_gradients(module)
        experts = range(shape.E)
        keys = torch.stack([found[f"moe.experts.experts.{e}.0.weight"] for e in experts])
        values = torch.stack([found[f"moe.experts.experts.{e}.2.weight"].t() for e in experts])
        return {"router.weight": found["moe.gate.to_gates.weight"], "keys": keys, "values": values}

    def loss(module: nn.Module) -> Tensor:
        assert isinstance(module, STMoE)
        return module.loss

    return Contender(
        module,
        Oracle(oracle),
        gradients=gradients,
        checked=STMoE(layer, shape, capacity=shape.E),
        tokens=CHECKED_TOKENS,
        unchecked_loss=loss,
    )


class PEERLayer(nn.Module):
    """PEER-pytorch's layer on tokens without a batch dimension."""

    def __init__(self, shape: MoEShape, n_keys: int, heads: int, per_head: int, **factory: Any) -> None:
        super().__init__()
        package = require("PEER_pytorch", "PEER-pytorch")
        self.peer = package.PEER(
            shape.D,
            heads=heads,
            num_experts=n_keys**2,
            num_experts_per_head=per_head,
            non_competing_scores=False,  # else it retrieves one expert a head
        ).to(**factory)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        y: Tensor = self.peer(x.unsqueeze(0)).squeeze(0)
        return y


class PEERFormula(nn.Module):
    """What PEER computes, in this library's terms: product keys choose units, softmax weighs them."""

    def __init__(self, layer: PEERLayer, per_head: int) -> None:
        super().__init__()
        self.per_head = per_head
        for name, p in layer.named_parameters():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(p.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        p = dict(self.named_parameters())
        keys = p["peer_keys"]
        heads, _, _, width = keys.shape
        query = F.linear(x, p["peer_to_queries_0_weight"]).view(x.shape[0], 2, heads, width)
        first, second = torch.einsum("tshc,hnsc->sthn", query, keys)
        score, index = sf.functional.product_key_topk(first, second, self.per_head)
        down, up = p["peer_weight_down_embed_weight"][index], p["peer_weight_up_embed_weight"][index]
        hidden = F.gelu(torch.einsum("td,thkd->thk", x, down)) * score.softmax(-1)
        return torch.einsum("thk,thkd->td", hidden, up)


def peer(shape: MoEShape, **factory: Any) -> Contender:
    """PEER-pytorch's layer."""
    units = shape.k * shape.G
    per_head = math.gcd(units, 32)
    n_keys = max(math.isqrt(shape.E * shape.G), per_head)
    size = torch.empty((), dtype=factory["dtype"]).element_size()
    # gathers two rows for every unit retrieved, and backward their gradients
    require_memory(4 * shape.T * units * shape.D * size, torch.device(factory["device"]))
    module = PEERLayer(shape, n_keys, units // per_head, per_head, **factory)

    def gradients(module: nn.Module) -> Gradients:
        return {name.replace(".", "_"): grad for name, grad in own_gradients(module).items()}

    return Contender(
        module,
        Oracle(PEERFormula(module, per_head)),
        gradients=gradients,
        checked=copy.deepcopy(module).float(),
        tokens=CHECKED_TOKENS,
    )
