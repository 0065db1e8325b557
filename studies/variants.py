"""The feed-forward layers of the study, at equal parameters but for the last; the demo's and others of the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from examples.language_model.configs import Config
from examples.language_model.variants import dense, mixture, product_key, sigma_moe, topk
from sparse_ffn import MoE, NoisyTopKMoE, SBaseMoE, SoftmaxMoE, SwitchMoE


@dataclass(frozen=True)
class Variant:
    """One FFN: what tables call it, and how it is made."""

    label: str
    make: Callable[[Config], nn.Module]
    ablation: bool = False
    """Compared with SigmaMoE, of which it differs in one thing, and not with dense."""


def sigma(**choices: Any) -> Callable[[Config], nn.Module]:
    return partial(sigma_moe, **choices)


def softmax(router: str) -> Callable[[Config], nn.Module]:
    """SigmaMoE with other gates, as in the paper's ablation."""
    return lambda config: mixture(
        SoftmaxMoE,
        config,
        router=router,
        expert_dropout=config.expert_dropout,
        balance_weight=config.balance_weight,
    )


def of_own(cls: type[MoE]) -> Callable[[Config], nn.Module]:
    """The sizes of SigmaMoE; the balance loss and its weight are the layer's defaults."""
    return lambda config: mixture(cls, config)


def switch(config: Config) -> nn.Module:
    """As much arithmetic as SigmaMoE in one expert: 4 x the size, a quarter of the number."""
    return mixture(SwitchMoE, config, k=1, expert_size=config.experts_k * config.expert_size)


def top(share: int) -> Callable[[Config], nn.Module]:
    return lambda config: topk(replace(config, topk_k=config.d_ff // share))


def regrouped(k: int) -> Callable[[Config], nn.Module]:
    """SigmaMoE with k experts of another size, and k times the size as before."""
    return lambda config: sigma_moe(config, k=k, expert_size=config.experts_k * config.expert_size // k)


def share(part: int) -> Callable[[Config], nn.Module]:
    return lambda config: sigma_moe(config, k=config.n_experts // part)


@torch.no_grad()
def scaled_by_expert(config: Config) -> nn.Module:
    """Values of standard deviation c/sqrt(G), as an FFN of G units would have them, instead of c/sqrt(E·G)."""
    layer = sigma_moe(config)
    layer.values.mul_(math.sqrt(layer.n_experts))
    return layer


def dense_of_equal_flops(config: Config) -> nn.Module:
    """The dense FFN with as much arithmetic as SigmaMoE, its router included: far fewer parameters."""
    wanted = sigma_moe(config, device="meta").flops_per_token()
    return dense(replace(config, d_ff=round(wanted / (4 * config.d_model))))


DENSE, SIGMA = "dense", "sigma"
BOUND = "dense-equal-flops"
"""What sparse layers are to be better than: as much arithmetic, and no more parameters than that takes."""
# in the order of running
VARIANTS: dict[str, Variant] = {
    DENSE: Variant("dense, ReLU", dense),
    SIGMA: Variant("SigmaMoE, 25%", sigma_moe),
    "topk-16": Variant("TopKFFN, k = d_ff/16", top(16)),
    "pkm": Variant("ProductKeyMemory, ReLU", product_key),
    "switch": Variant("SwitchMoE", switch),
    "topk-4": Variant("TopKFFN, k = d_ff/4", top(4)),
    "sigma-8": Variant("SigmaMoE, 12.5%", share(8)),
    "softmax-after": Variant("SoftmaxMoE, renormalised", softmax("softmax_topk")),
    "softmax-before": Variant("SoftmaxMoE, before top-k", softmax("softmax")),
    "pkm-softmax": Variant("ProductKeyMemory, softmax", partial(product_key, activation="softmax")),
    "sbase": Variant("SBaseMoE", of_own(SBaseMoE)),
    "noisy": Variant("NoisyTopKMoE", of_own(NoisyTopKMoE)),
    "dense-equal-flops": Variant("dense of SigmaMoE's FLOPs", dense_of_equal_flops),
    "sigma-2": Variant("8 experts of 16, 50%", share(2), ablation=True),
    "sigma-no-balance": Variant("no balance loss", sigma(balance="none"), ablation=True),
    "sigma-expert-dropout": Variant("expert dropout 0.05", sigma(expert_dropout=0.05), ablation=True),
    "sigma-values-std": Variant("values of std c/√G", scaled_by_expert, ablation=True),
    "sigma-k1": Variant("1 expert, 4 x the size", regrouped(1), ablation=True),
    "sigma-k2": Variant("2 experts, 2 x the size", regrouped(2), ablation=True),
    "sigma-k8": Variant("8 experts, half the size", regrouped(8), ablation=True),
}
