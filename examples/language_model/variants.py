"""The four feed-forward layers that are compared, at equal parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_ffn import MoE, ProductKeyMemory, SigmaMoE, SparseFFN, TopKFFN, parameter_equal

from .configs import Config
from .model import ByteModel, ByteTransformer, init_linear_


def dense(config: Config) -> nn.Module:
    """The FFN as everybody writes it. Dropout on the hidden units, where the configuration has any, as in the paper."""
    up, down = nn.Linear(config.d_model, config.d_ff), nn.Linear(config.d_ff, config.d_model)
    for linear in (up, down):
        init_linear_(linear, config.n_layers)
    if config.dropout:
        return nn.Sequential(up, nn.ReLU(), nn.Dropout(config.dropout), down)
    return nn.Sequential(up, nn.ReLU(), down)


def mixture(cls: type[MoE], config: Config, **choices: Any) -> MoE:
    """Experts of the configuration's size; `choices` come before its other settings and the layer's own."""
    choices = {"expert_size": config.expert_size, "k": config.experts_k, "n_layers": config.n_layers, **choices}
    return cls(**parameter_equal(cls, config.d_model, config.d_ff, **choices))


def sigma_moe(config: Config, **choices: Any) -> MoE:
    """No dropout on hidden units: whole experts are dropped instead (paper, section 5)."""
    settings = {"expert_dropout": config.expert_dropout, "balance_weight": config.balance_weight}
    return mixture(SigmaMoE, config, **{**settings, **choices})


def topk(config: Config) -> nn.Module:
    size = parameter_equal(TopKFFN, config.d_model, config.d_ff, k=config.topk_k)
    return TopKFFN(**size, dropout=config.dropout, n_layers=config.n_layers)


def product_key(config: Config, **choices: Any) -> nn.Module:
    """The paper uses no dropout inside the memory."""
    choices = {"k": config.pkm_k, "n_heads": config.pkm_heads, "n_layers": config.n_layers, **choices}
    return ProductKeyMemory(**parameter_equal(ProductKeyMemory, config.d_model, config.d_ff, **choices))


VARIANTS: dict[str, Callable[[Config], nn.Module]] = {
    "dense": dense,
    "moe": sigma_moe,
    "topk": topk,
    "pkm": product_key,
}
LABELS = {"dense": "nn.Sequential", "moe": "SigmaMoE", "topk": "TopKFFN", "pkm": "ProductKeyMemory"}


def build(variant: str, config: Config, seed: int) -> ByteTransformer:
    return transformer(VARIANTS[variant], config, seed)


def transformer(make_ffn: Callable[[Config], nn.Module], config: Config, seed: int) -> ByteTransformer:
    torch.manual_seed(seed)
    return ByteTransformer(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_head=config.d_head,
        context=config.context,
        dropout=config.dropout,
        make_ffn=lambda _: make_ffn(config),
    )


def ffn_flops(model: ByteModel) -> int:
    """Of one forward pass of all FFNs for one byte, two per multiply-add; routers included, biases not."""
    flops = 0
    for ffn in model.ffns:
        if isinstance(ffn, nn.Sequential):
            flops += sum(2 * part.in_features * part.out_features for part in ffn if isinstance(part, nn.Linear))
        else:
            assert isinstance(ffn, SparseFFN)
            flops += ffn.flops_per_token()
    return flops
