"""Checkpoints of transformers' MoE models: the state of one block in, a layer out, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_choice, check_flag, check_tensor, check_type, shown
from sparse_ffn.layers import DenseFFN, MoE
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.routing import ROUTERS, Router
from sparse_ffn.routing.deepseek import DeepSeekRouter

Layer = TypeVar("Layer", bound=nn.Module)

PARTS = ("gate_proj", "up_proj", "down_proj")  # of a gated FFN: our gate_keys, keys, values (transposed)
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "squared_relu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "linear": "identity",
}  # fmt: skip
"""transformers' names of activations and ours."""
CORRECTION_BIAS = "gate.e_score_correction_bias"


@dataclass(frozen=True)
class Style:
    """How a family of models names the tensors of a block, and what decides its function."""

    expert: tuple[str, str, str] = PARTS
    """The three matrices in checkpoints that hold each expert by itself."""
    shared: str | None = None
    """The shared expert; None where the family has none."""
    facts: tuple[str, ...] = ("norm_topk_prob",)
    """What its config must say, besides what all must."""


STYLES = {
    "mixtral": Style(expert=("w1", "w3", "w2"), facts=()),
    "olmoe": Style(),
    "qwen2_moe": Style(shared="shared_expert"),
    "qwen3_moe": Style(),
    "deepseek_v2": Style(shared="shared_experts", facts=("routed_scaling_factor", "topk_method", "norm_topk_prob")),
    "deepseek_v3": Style(
        shared="shared_experts", facts=("routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob")
    ),
}


def from_transformers(
    state_dict: Mapping[str, Tensor], config: Any, *, prefix: str = "", **options: Any
) -> MoE | SharedExpertMoE:
    """Make a layer from one MoE block of a transformers checkpoint; it computes what the block computes.

    Takes ``mixtral``, ``olmoe``, ``qwen2_moe``, ``qwen3_moe``, ``deepseek_v2`` and ``deepseek_v3``, with experts fused
    (``experts.gate_up_proj`` [E, 2G, D]) or one by one (``experts.0.gate_proj.weight``). A scaling factor of the gates
    is multiplied into the values. A shared expert makes the result a ``SharedExpertMoE``. What only training has, such
    as Mixtral's jitter, is left out.

    Args:
        state_dict: any that contains the block.
        config: the model's: a ``PretrainedConfig``, or what its config.json holds.
        prefix: of the block's keys, such as ``"model.layers.3.mlp."``; every key that starts with it must be used.
        options: of ``MoE``, for training: ``balance``, ``aux``, ... DeepSeek-V3's correction bias means
            ``balance="bias"``, which is the default there.

    Returns:
        The layer, in the dtype and on the device of the experts.

    Raises:
        ValueError: a model that no layer here computes exactly, a key that is missing, one that nothing uses, or a
            tensor of another size than the others or the config say.
    """
    facts = _facts(config)
    style, keys = STYLES[facts["model_type"]], Keys(state_dict, prefix)
    gate_keys, up, down = _experts(keys, style)
    shared = style.shared is not None and f"{style.shared}.up_proj.weight" in keys.left
    routed = "routed." if shared else ""
    ours = {"keys": up, "gate_keys": gate_keys, "values": down.mT * facts.get("routed_scaling_factor", 1.0)}
    ours = {routed + name: tensor for name, tensor in ours.items()}
    for name, theirs in _names(facts, shared).items():
        tensor = keys.take(theirs, 1 if theirs == CORRECTION_BIAS else 2)
        ours[name] = tensor.mT if name == "shared.values" else tensor
    keys.finish()
    if facts["model_type"] == "deepseek_v3":
        options = {"balance": "bias", **options}
    sizes = (up.shape[2], up.shape[0], up.shape[1], facts["num_experts_per_tok"])
    router, act, dtype = _router(facts, *sizes[:2]), ACTIVATIONS[facts["hidden_act"]], up.dtype
    moe = MoE(*sizes, router=router, activation=act, glu=True, device="meta", dtype=dtype, **options)
    moe.router.to(ours[f"{routed}router.weight"].dtype)  # some models keep it wider than the experts
    layer: MoE | SharedExpertMoE = moe
    if shared:
        d_ff = ours["shared.keys"].shape[0]
        dense = DenseFFN(sizes[0], d_ff, activation=act, glu=True, bias=False, device="meta", dtype=dtype)
        layer = SharedExpertMoE(moe, dense, gated=facts["model_type"] == "qwen2_moe")
    _check_fits(layer, moe, facts)
    return filled(layer, ours)


def to_transformers(
    layer: MoE | SharedExpertMoE, config: Any, *, prefix: str = "", fused: bool = True
) -> dict[str, Tensor]:
    """The block of a transformers checkpoint that computes what a layer computes: ``from_transformers`` backwards.

    Args:
        layer: of the structure that ``from_transformers`` makes for this config.
        config: the model's.
        prefix: put before each name.
        fused: fused experts, as transformers 5 has them; otherwise one by one.

    Returns:
        Names and tensors; its scaling factor is divided out of the values.

    Raises:
        ValueError: the layer is not what the config says.
        TypeError: no ``MoE`` and no ``SharedExpertMoE``.
    """
    if not isinstance(layer, (MoE, SharedExpertMoE)):
        raise TypeError(f"layer must be a MoE or a SharedExpertMoE, got {type(layer).__name__}")
    check_type("prefix", prefix, str, "a string")
    fused = check_flag("fused", fused)
    facts = _facts(config)
    style = STYLES[facts["model_type"]]
    moe = layer.routed if isinstance(layer, SharedExpertMoE) else layer
    check_dense(moe)
    _check_fits(layer, moe, facts)
    gate, up = moe.gate_keys, moe.keys
    down = moe.values.mT / facts.get("routed_scaling_factor", 1.0)
    assert gate is not None  # _check_fits
    if fused:
        state = {"experts.gate_up_proj": torch.cat((gate, up), 1), "experts.down_proj": down}
    else:
        matrices = zip(style.expert, (gate, up, down), strict=True)
        state = {f"experts.{e}.{part}.weight": m[e] for part, m in matrices for e in range(moe.n_experts)}
    for name, theirs in _names(facts, isinstance(layer, SharedExpertMoE)).items():
        tensor: Tensor = attrgetter(name)(layer)
        state[theirs] = tensor.mT if name == "shared.values" else tensor
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _names(facts: Mapping[str, Any], shared: bool) -> dict[str, str]:
    """Our names and theirs of all tensors but the experts'; the shared expert's values are transposed."""
    kind, routed = facts["model_type"], "routed." if shared else ""
    names = {f"{routed}router.weight": "gate.weight"}
    if kind == "deepseek_v3":
        names[f"{routed}router.bias"] = CORRECTION_BIAS
    if shared:
        ours = ("shared.gate_keys", "shared.keys", "shared.values")
        names |= {name: f"{STYLES[kind].shared}.{part}.weight" for name, part in zip(ours, PARTS, strict=True)}
        if kind == "qwen2_moe":
            names["gate.weight"] = "shared_expert_gate.weight"
    return names


class Keys:
    """The tensors of a state dict under a prefix, taken one by one until none is left."""

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        check_type("state_dict", state_dict, Mapping, "a mapping from names to tensors")
        check_type("prefix", prefix, str, "a string")
        self.prefix = prefix
        self.left = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}

    def take(self, name: str, dim: int) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: there is none, or it has not that many dimensions.
        """
        if name not in self.left:
            raise ValueError(f"the checkpoint has no {self.prefix + name!r}; it still has {sorted(self.left)[:20]}")
        tensor = self.left.pop(name)
        check_tensor(repr(self.prefix + name), tensor)
        if tensor.dim() != dim:
            raise ValueError(f"{self.prefix + name!r} must have {dim} dimensions, got {list(tensor.shape)}")
        return tensor

    def finish(self) -> None:
        """Raise ValueError unless every tensor was taken."""
        if self.left:
            unused = ", ".join(repr(self.prefix + name) for name in sorted(self.left))
            raise ValueError(f"the checkpoint has keys that this layer has no place for: {unused}")


def filled(layer: Layer, tensors: Mapping[str, Tensor]) -> Layer:
    """A layer that was built on meta, with these tensors for its parameters and buffers, on their device.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """
    layer.to_empty(device=next(iter(tensors.values())).device)
    try:
        layer.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the layer: {error}") from error
    return layer


def _facts(config: Any) -> dict[str, Any]:
    """The config as a dict, if it is of a model whose blocks a layer can compute."""
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise TypeError(f"config must be a config of transformers or a dict of its values, got {shown(config)}")
    facts = dict(config) if isinstance(config, Mapping) else config.to_dict()
    check_choice("config.model_type", facts.get("model_type"), STYLES)
    needed = ("num_experts_per_tok", "hidden_act", *STYLES[facts["model_type"]].facts)
    missing = sorted(name for name in needed if facts.get(name) is None)
    if missing:
        raise ValueError(f"config must say {', '.join(missing)}, which decide what the block computes")
    check_choice("config.hidden_act", facts["hidden_act"], ACTIVATIONS)
    if facts["model_type"] == "deepseek_v2" and (facts["topk_method"] != "greedy" or facts["norm_topk_prob"]):
        raise ValueError(
            f"config has topk_method = {facts['topk_method']!r} and norm_topk_prob = {facts['norm_topk_prob']!r}: of "
            "DeepSeek-V2's routers only 'greedy' without renormalisation has a counterpart here"
        )
    return facts


def _check_fits(layer: MoE | SharedExpertMoE, moe: MoE, facts: Mapping[str, Any]) -> None:
    kind, shared = facts["model_type"], isinstance(layer, SharedExpertMoE)
    n_experts = [facts[n] for n in ("num_local_experts", "num_experts", "n_routed_experts") if facts.get(n) is not None]
    size = facts.get("moe_intermediate_size") or facts.get("intermediate_size", moe.expert_size)
    checks = {
        "router": (_traits(moe.router), _traits(_router(facts, moe.d_model, moe.n_experts))),
        "activation": (moe.activation, ACTIVATIONS[facts["hidden_act"]]),
        "glu": (moe.gate_keys is not None, True),
        "bias": (moe.out_bias is not None, False),
        "d_out": (moe.d_out, moe.d_model),
        "shared expert": (shared, kind == "qwen2_moe" or (shared and kind.startswith("deepseek"))),
        "gated shared expert": (isinstance(layer, SharedExpertMoE) and layer.gate is not None, kind == "qwen2_moe"),
        "d_model": (moe.d_model, facts.get("hidden_size", moe.d_model)),
        "d_router": (moe.d_router, moe.d_model),
        "n_experts": (moe.n_experts, next(iter(n_experts), moe.n_experts)),
        "expert_size": (moe.expert_size, size),
    }
    for what, (has, should) in checks.items():
        if has != should:
            raise ValueError(f"the layer is no {kind} block of this config: its {what} is {has!r}, not {should!r}")


def _traits(router: Router) -> tuple[Any, ...]:
    """What decides which function a router computes."""
    options = ("normalize", "n_groups", "topk_groups")
    found = {name: getattr(router, name, None) for name in options}
    return type(router).__name__, router.k, *((name, value) for name, value in found.items() if value is not None)


def _router(facts: Mapping[str, Any], d_model: int, n_experts: int) -> Router:
    """A router on meta that ranks and weighs as the model's does."""
    k: int = facts["num_experts_per_tok"]
    if facts["model_type"] == "deepseek_v3":
        return DeepSeekRouter(
            d_model, n_experts, k, normalize=facts["norm_topk_prob"], n_groups=facts["n_group"],
            topk_groups=facts["topk_group"], selection_bias=True, device="meta",
        )  # fmt: skip
    normalized = facts["model_type"] == "mixtral" or facts.get("norm_topk_prob", False)
    return ROUTERS["softmax_topk" if normalized else "softmax"](d_model, n_experts, k, device="meta")


def _experts(keys: Keys, style: Style) -> tuple[Tensor, Tensor, Tensor]:
    """The experts' gate and up [E, G, D] and down [E, D, G]."""
    indices = {name.split(".")[1] for name in keys.left if name.startswith("experts.")}
    if not all(index.isdecimal() for index in indices) or not indices:
        gate, up = keys.take("experts.gate_up_proj", 3).chunk(2, dim=1)
        return gate, up, keys.take("experts.down_proj", 3)
    gate, up, down = (
        _stack([keys.take(f"experts.{e}.{part}.weight", 2) for e in range(len(indices))], part) for part in style.expert
    )
    return gate, up, down


def _stack(matrices: list[Tensor], part: str) -> Tensor:
    shapes = sorted({tuple(matrix.shape) for matrix in matrices})
    if len(shapes) > 1:
        raise ValueError(f"the experts' {part} differ in shape: {', '.join(map(str, shapes))}")
    return torch.stack(matrices)
