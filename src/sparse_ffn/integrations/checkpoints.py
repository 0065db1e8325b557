"""Checkpoints of transformers' MoE models: the state of one block in, a layer out, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_current, check_flag, check_tensor, check_type, shown
from sparse_ffn.integrations.families import (
    ACTIVATIONS,
    FAMILIES,
    Family,
    facts_of,
    is_latent,
    names,
    router_of,
    scale_of_values,
)
from sparse_ffn.layers import DenseFFN, LatentMoE, MoE, SharedExpertMoE
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.routing import Router

Layer = TypeVar("Layer", bound=nn.Module)


def from_transformers(
    state_dict: Mapping[str, Tensor], config: Any, *, prefix: str = "", **options: Any
) -> MoE | LatentMoE | SharedExpertMoE:
    """Make a layer from one MoE block of a transformers checkpoint; it computes what the block computes.

    Takes ``mixtral``, ``olmoe``, ``qwen2_moe``, ``qwen3_moe``, ``deepseek_v2``, ``deepseek_v3``, ``longcat_flash`` and
    ``nemotron_h``, with experts fused (``experts.gate_up_proj`` [E, 2G, D]) or one by one
    (``experts.0.gate_proj.weight``). A scaling factor of the gates is multiplied into the values; LongCat-Flash's is in
    its router, since it scales the identity experts too. A latent projection makes the result a ``LatentMoE``, a
    shared expert a ``SharedExpertMoE``. What only training has, such as Mixtral's jitter, is left out.

    Args:
        state_dict: any that contains the block.
        config: the model's: a ``PretrainedConfig``, or what its config.json holds.
        prefix: of the block's keys, such as ``"model.layers.3.mlp."``; every key that starts with it must be used.
        options: of ``MoE``, for training: ``balance``, ``expert_dropout``, ... A correction bias, as DeepSeek-V3,
            Nemotron-H and LongCat-Flash have it, means ``balance="bias"``, which is the default there; for the others
            it is 0 at first.

    Returns:
        The layer, in the dtype and on the device of the experts.

    Raises:
        ValueError: a model that no layer here computes exactly, a key that is missing, one that nothing uses, a tensor
            of another size than the others or the config say, or an option that they decide, as ``router``.
    """
    facts = facts_of(config)
    check_free(options, ("d_model", "d_latent", "n_experts", "expert_size", "k", "router", "device", "dtype"))
    family, keys = FAMILIES[facts["model_type"]], Keys(state_dict, prefix)
    experts = _experts(keys, family)
    shared = family.shared is not None and f"{family.shared}.up_proj.weight" in keys.left
    core = ("routed." if shared else "") + ("moe." if is_latent(facts) else "")
    ours = {core + name: tensor for name, tensor in experts.items()}
    ours[f"{core}values"] = experts["values"].mT * scale_of_values(facts)
    for name, theirs in names(facts, shared).items():
        tensor = keys.take(theirs, 1 if theirs == family.correction else 2)
        ours[name] = tensor.mT if name == "shared.values" else tensor
    keys.finish()
    routed = _empty(facts, {name.removeprefix("routed."): tensor for name, tensor in ours.items()}, options)
    layer: MoE | LatentMoE | SharedExpertMoE = routed
    if shared:
        moe, d_ff = _moe(routed), ours["shared.keys"].shape[0]
        dense = DenseFFN(
            routed.d_model, d_ff, activation=moe.activation, glu=family.glu, bias=False, device="meta",
            dtype=moe.values.dtype,
        )  # fmt: skip
        layer = SharedExpertMoE(routed, dense, gated=facts["model_type"] == "qwen2_moe")
    _check_fits(layer, facts)
    return filled(layer, ours)


def _empty(facts: Mapping[str, Any], ours: Mapping[str, Tensor], options: Mapping[str, Any]) -> MoE | LatentMoE:
    """The routed part, on meta, of the sizes that the tensors have."""
    family, latent = FAMILIES[facts["model_type"]], is_latent(facts)
    core = "moe." if latent else ""
    (n_experts, size, width), dtype = ours[f"{core}keys"].shape, ours[f"{core}keys"].dtype
    d_model = ours["down.weight"].shape[1] if latent else width
    null: dict[str, Any] = {"null_experts": facts.get("zero_expert_num", 0), "null_kind": "identity"}
    made = {
        **{"activation": ACTIVATIONS[facts[family.activation]], "glu": family.glu, "device": "meta", "dtype": dtype},
        **(null if null["null_experts"] else {}),
        **({"balance": "bias"} if family.correction else {}),
        **options,
    }
    router = router_of(facts)
    sizes = (n_experts, size, facts["num_experts_per_tok"])
    layer: MoE | LatentMoE
    if latent:
        layer = LatentMoE(d_model, width, *sizes, router=router, **made)
    else:
        layer = MoE(d_model, *sizes, router=router, **made)
    if family.correction is not None and _moe(layer).router.bias is None:
        raise ValueError(f"balance = {shown(made['balance'])} must hold 'bias': the checkpoint has a correction bias")
    _moe(layer).router.to(ours[f"{core}router.weight"].dtype)  # some models keep it wider than the experts
    return layer


def to_transformers(
    layer: MoE | LatentMoE | SharedExpertMoE, config: Any, *, prefix: str = "", fused: bool = True
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
        ValueError: the layer is not what the config says, masked, sharded, or held by accelerate.
        TypeError: no ``MoE``, ``LatentMoE`` or ``SharedExpertMoE``.
    """
    if not isinstance(layer, (MoE, LatentMoE, SharedExpertMoE)):
        raise TypeError(f"layer must be a MoE, a LatentMoE or a SharedExpertMoE, got {type(layer).__name__}")
    check_type("prefix", prefix, str, "a string")
    fused = check_flag("fused", fused)
    facts, moe = facts_of(config), _moe(layer)
    check_dense(moe)
    _check_fits(layer, facts)
    others = names(facts, isinstance(layer, SharedExpertMoE))
    core = next(f"{name}." if name else "" for name, module in layer.named_modules() if module is moe)
    for name in (*(core + stack for stack in ("keys", "gate_keys", "values")), *others):
        check_current(layer, name)
    family = FAMILIES[facts["model_type"]]
    if family.correction is None and moe.router.bias is not None and moe.router.bias.any():
        raise ValueError(f"the layer is no {facts['model_type']} block: its router's selection bias has no place there")
    down = moe.values.mT / scale_of_values(facts)
    matrices = [moe.keys, down] if moe.gate_keys is None else [moe.gate_keys, moe.keys, down]
    if not fused:
        parts = zip(family.experts, matrices, strict=True)
        state = {f"experts.{e}.{part}.weight": m[e] for part, m in parts for e in range(moe.n_experts)}
    elif moe.gate_keys is None:
        state = {"experts.up_proj": moe.keys, "experts.down_proj": down}
    else:
        unread = moe.keys.new_zeros(moe.null_experts, 2 * moe.expert_size, moe.d_model)  # transformers stores them
        state = {"experts.gate_up_proj": torch.cat((torch.cat((moe.gate_keys, moe.keys), 1), unread))}
        state["experts.down_proj"] = down
    for name, theirs in others.items():
        tensor: Tensor = attrgetter(name)(layer)
        state[theirs] = tensor.mT if name == "shared.values" else tensor
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _moe(layer: MoE | LatentMoE | SharedExpertMoE) -> MoE:
    routed = layer.routed if isinstance(layer, SharedExpertMoE) else layer
    moe = routed.moe if isinstance(routed, LatentMoE) else routed
    check_type("the mixture in layer", moe, MoE, "a MoE")
    assert isinstance(moe, MoE)
    return moe


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


def check_free(options: Mapping[str, Any], decided: Iterable[str]) -> None:
    """Raise ValueError for an option that the checkpoint decides."""
    for name in decided:
        if name in options:
            raise ValueError(f"{name} = {shown(options[name])} is for the checkpoint to say: leave it out")


def filled(layer: Layer, tensors: Mapping[str, Tensor]) -> Layer:
    """A layer that was built on meta, with these tensors for its parameters and buffers, on their device.

    A selection bias, which only training needs, is 0 where none is given.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """
    layer.to_empty(device=next(iter(tensors.values())).device)
    biases = {name: torch.zeros_like(t) for name, t in layer.state_dict().items() if name.endswith("router.bias")}
    try:
        layer.load_state_dict({**biases, **tensors})
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the layer: {error}") from error
    return layer


def _check_fits(layer: MoE | LatentMoE | SharedExpertMoE, facts: Mapping[str, Any]) -> None:
    kind, family, moe = facts["model_type"], FAMILIES[facts["model_type"]], _moe(layer)
    shared = isinstance(layer, SharedExpertMoE)
    routed = layer.routed if isinstance(layer, SharedExpertMoE) else layer
    null_experts = facts.get("zero_expert_num") or 0
    n_experts = [facts[n] for n in ("num_local_experts", "num_experts", "n_routed_experts") if facts.get(n) is not None]
    sizes = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    size = next((facts[name] for name in sizes if facts.get(name)), moe.expert_size)
    scored, k = moe.n_experts + null_experts, facts["num_experts_per_tok"]
    router = router_of(facts)(moe.d_router, scored, k, device="meta")
    checks = {
        "router": (_traits(moe.router), _traits(router)),
        "activation": (moe.activation, ACTIVATIONS[facts[family.activation]]),
        "glu": (moe.gate_keys is not None, family.glu),
        "bias": (moe.out_bias is not None, False),
        "d_out": (layer.d_out, layer.d_model),
        "shared expert": (shared, kind == "qwen2_moe" or (shared and family.shared is not None)),
        "gated shared expert": (isinstance(layer, SharedExpertMoE) and layer.gate is not None, kind == "qwen2_moe"),
        "latent projection": (isinstance(routed, LatentMoE), is_latent(facts)),
        "d_model": (layer.d_model, facts.get("hidden_size", layer.d_model)),
        "d_latent": (moe.d_model, facts.get("moe_latent_size") or layer.d_model),
        "d_router": (moe.d_router, layer.d_model),
        "n_experts": (moe.n_experts, next(iter(n_experts), moe.n_experts)),
        "null_experts": (moe.null_experts, null_experts),
        "null_kind": (moe.null_kind if null_experts else None, "identity" if null_experts else None),
        "expert_size": (moe.expert_size, size),
        "selection bias": (moe.router.bias is not None, family.correction is not None or moe.router.bias is not None),
    }
    if isinstance(layer, SharedExpertMoE):
        dense = layer._own_shared()
        checks |= {
            "shared expert's activation": (dense.activation, checks["activation"][1]),
            "shared expert's glu": (dense.gate_keys is not None, family.glu),
            "shared expert's bias": (dense.out_bias is not None, False),
        }
    if isinstance(routed, LatentMoE):
        checks["projections' bias"] = (routed.down.bias is not None or routed.up.bias is not None, False)
    for what, (has, should) in checks.items():
        if has != should:
            raise ValueError(f"the layer is no {kind} block of this config: its {what} is {has!r}, not {should!r}")


def _traits(router: Router) -> tuple[Any, ...]:
    """What decides which function a router computes."""
    options = ("normalize", "n_groups", "topk_groups", "scale")
    found = {name: getattr(router, name, None) for name in options}
    return type(router).__name__, router.k, *((name, value) for name, value in found.items() if value is not None)


def _experts(keys: Keys, family: Family) -> dict[str, Tensor]:
    """The experts' gate and up [E, G, D] and down [E, D, G], by our names."""
    ours = [*(["gate_keys"] if family.glu else []), "keys", "values"]
    indices = {name.split(".")[1] for name in keys.left if name.startswith("experts.")}
    if indices and all(index.isdecimal() for index in indices):
        matrices = [
            _stack([keys.take(f"experts.{e}.{part}.weight", 2) for e in range(len(indices))], part)
            for part in family.experts
        ]
    elif family.glu:
        both, down = keys.take("experts.gate_up_proj", 3), keys.take("experts.down_proj", 3)
        matrices = [*both[: down.shape[0]].chunk(2, dim=1), down]  # LongCat-Flash has slices for its null experts
    else:
        matrices = [keys.take("experts.up_proj", 3), keys.take("experts.down_proj", 3)]
    return dict(zip(ours, matrices, strict=True))


def _stack(matrices: list[Tensor], part: str) -> Tensor:
    shapes = sorted({tuple(matrix.shape) for matrix in matrices})
    if len(shapes) > 1:
        raise ValueError(f"the experts' {part} differ in shape: {', '.join(map(str, shapes))}")
    return torch.stack(matrices)
