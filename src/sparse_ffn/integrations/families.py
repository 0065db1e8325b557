"""The families of transformers' MoE models: the names of a block's tensors, and what a config says of its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_ffn.checks import check_choice, shown
from sparse_ffn.routing import ROUTERS, DeepSeekRouter, LongCatRouter, Router

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "squared_relu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "linear": "identity",
}  # fmt: skip
"""transformers' names of activations and ours."""
OURS = {"gate_proj": "gate_keys", "up_proj": "keys", "down_proj": "values"}
"""Of an FFN; values are transposed."""


@dataclass(frozen=True)
class Family:
    """How a family of models names the tensors of a block, and what decides its function."""

    experts: tuple[str, ...] = tuple(OURS)
    """The matrices of an expert in checkpoints that hold each by itself: gate (in a GLU), up and down."""
    shared: str | None = None
    """The shared expert; None where the family has none."""
    router: str = "gate.weight"
    correction: str | None = None
    """The bias that only ranks; None where there is none."""
    activation: str = "hidden_act"
    facts: tuple[str, ...] = ("norm_topk_prob",)
    """What its config must say, besides what all must."""

    @property
    def glu(self) -> bool:
        """Whether the experts are gated."""
        return len(self.experts) == len(OURS)


CORRECTION = "e_score_correction_bias"
GROUPS = ("routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob")
FAMILIES = {
    "mixtral": Family(experts=("w1", "w3", "w2"), facts=()),
    "olmoe": Family(),
    "qwen2_moe": Family(shared="shared_expert"),
    "qwen3_moe": Family(),
    "deepseek_v2": Family(shared="shared_experts", facts=("routed_scaling_factor", "topk_method", "norm_topk_prob")),
    "deepseek_v3": Family(shared="shared_experts", correction=f"gate.{CORRECTION}", facts=GROUPS),
    "nemotron_h": Family(
        ("up_proj", "down_proj"), "shared_experts", correction=f"gate.{CORRECTION}", activation="mlp_hidden_act",
        facts=GROUPS,
    ),
    "longcat_flash": Family(
        router="router.classifier.weight", correction=f"router.{CORRECTION}",
        facts=("routed_scaling_factor", "zero_expert_num"),
    ),
}  # fmt: skip


def facts_of(config: Any) -> dict[str, Any]:
    """The config as a dict, if it is of a model whose blocks a layer can compute.

    Raises:
        TypeError: no config.
        ValueError: of another model, or it does not say enough, or something that no layer computes.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise TypeError(f"config must be a config of transformers or a dict of its values, got {shown(config)}")
    facts = dict(config) if isinstance(config, Mapping) else config.to_dict()
    check_choice("config.model_type", facts.get("model_type"), FAMILIES)
    kind, family = facts["model_type"], FAMILIES[facts["model_type"]]
    if "moe_topk" in facts:
        facts["num_experts_per_tok"] = facts["moe_topk"]
    needed = ("num_experts_per_tok", family.activation, *family.facts)
    missing = sorted(name for name in needed if facts.get(name) is None)
    if missing:
        raise ValueError(f"config must say {', '.join(missing)}, which decide what the block computes")
    check_choice(f"config.{family.activation}", facts[family.activation], ACTIVATIONS)
    if kind == "deepseek_v2" and (facts["topk_method"] != "greedy" or facts["norm_topk_prob"]):
        raise ValueError(
            f"config has topk_method = {facts['topk_method']!r} and norm_topk_prob = {facts['norm_topk_prob']!r}: of "
            "DeepSeek-V2's routers only 'greedy' without renormalisation has a counterpart here"
        )
    if kind == "nemotron_h" and facts.get("mlp_bias"):
        raise ValueError("config has mlp_bias = True, and the biases of Nemotron-H's blocks are not read here")
    if facts.get("zero_expert_type", "identity") != "identity":
        raise ValueError(f"config has zero_expert_type = {facts['zero_expert_type']!r}, and only 'identity' is read")
    return facts


def router_of(facts: Mapping[str, Any]) -> Callable[..., Router]:
    """What makes a router of the arguments of ``Router`` that ranks and weighs as the model's does."""
    if facts["model_type"] in ("deepseek_v3", "nemotron_h"):
        return partial(
            DeepSeekRouter, normalize=facts["norm_topk_prob"], n_groups=facts["n_group"],
            topk_groups=facts["topk_group"],
        )  # fmt: skip
    if facts["model_type"] == "longcat_flash":
        return partial(LongCatRouter, scale=float(facts["routed_scaling_factor"]))
    normalized = facts["model_type"] == "mixtral" or facts.get("norm_topk_prob", False)
    return ROUTERS["softmax_topk" if normalized else "softmax"]


def scale_of_values(facts: Mapping[str, Any]) -> float:
    """What the values are multiplied with: the gates' factor, where the router does not have it itself."""
    return 1.0 if facts["model_type"] == "longcat_flash" else facts.get("routed_scaling_factor", 1.0)


def names(facts: Mapping[str, Any], shared: bool) -> dict[str, str]:
    """Our names and theirs of all tensors but the experts'; the shared expert's values are transposed."""
    family = FAMILIES[facts["model_type"]]
    routed = "routed." if shared else ""
    found = {}
    if is_latent(facts):
        found = {f"{routed}down.weight": "fc1_latent_proj.weight", f"{routed}up.weight": "fc2_latent_proj.weight"}
        routed += "moe."
    found[f"{routed}router.weight"] = family.router
    if family.correction is not None:
        found[f"{routed}router.bias"] = family.correction
    if shared:
        parts = list(OURS)[not family.glu :]
        found |= {f"shared.{OURS[part]}": f"{family.shared}.{part}.weight" for part in parts}
        if facts["model_type"] == "qwen2_moe":
            found["gate.weight"] = "shared_expert_gate.weight"
    return found


def is_latent(facts: Mapping[str, Any]) -> bool:
    """Whether the experts stand between two projections."""
    return facts.get("moe_latent_size") is not None
