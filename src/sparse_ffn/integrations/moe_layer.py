"""Checkpoints of the σ-MoE paper's own code: RobertCsordas/moe_layer and the MoE layers of RobertCsordas/moe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_ffn.checks import check_current, check_type
from sparse_ffn.integrations.checkpoints import Keys, check_free, filled
from sparse_ffn.layers import MoE
from sparse_ffn.layers.rows.base import check_dense

COUNTS = "kv_sel_counts_100"  # a statistic that RobertCsordas/moe keeps in its state


def from_moe_layer(state_dict: Mapping[str, Tensor], k: int, *, prefix: str = "", **options: Any) -> MoE:
    """Make a ``MoE`` from the state of the paper's MoE layer.

    Its tensors are ``keys`` [E, D, G], ``values`` [E, G, O], ``expert_sel`` [E, D] and perhaps ``bias`` [E, G] and
    ``o_bias`` [O]. What else its code knows (shared keys, a learned selection bias or scale, an MLP selector) has no
    counterpart here and is an error.

    Args:
        state_dict: any that contains the layer.
        k: selected experts: its ``k`` in moe_layer, its ``n_heads`` in moe. No tensor says it.
        prefix: of the layer's keys, such as ``"layers.3.pkm."``; every key that starts with it must be used.
        options: of ``MoE``. ``router`` is ``"sigmoid"`` unless said otherwise; the code's selection modes ``"gate"``
            and ``"softmax"`` are ``"softmax"`` (``"softmax_topk"`` with ``activation_after_topk``), ``"sinkmoid"`` and
            ``"sinkmoid2"`` are ``"sinkhorn"``. ``activation`` is ``"relu"`` unless said otherwise. The bias of
            ``balance="bias"`` is 0 at first.

    Returns:
        The layer, in the tensors' dtype and on their device.

    Raises:
        ValueError: a key that is missing or that nothing uses, a tensor of another size than the others say, or an
            option that they decide, as ``bias``.
    """
    check_free(options, ("d_model", "n_experts", "expert_size", "bias", "d_out", "device", "dtype"))
    keys = Keys(state_dict, prefix)
    stack, values = keys.take("keys", 3).mT, keys.take("values", 3)
    ours = {"keys": stack, "values": values, "router.weight": keys.take("expert_sel", 2)}
    bias = "bias" in keys.left
    if bias:
        ours |= {"key_bias": keys.take("bias", 2), "out_bias": keys.take("o_bias", 1)}
    keys.left.pop(COUNTS, None)
    keys.finish()
    n_experts, size, d_model = stack.shape
    layer = MoE(
        d_model, n_experts, size, k, bias=bias, d_out=values.shape[2], device="meta", dtype=values.dtype, **options
    )  # fmt: skip
    return filled(layer, ours)


def to_moe_layer(layer: MoE, *, prefix: str = "") -> dict[str, Tensor]:
    """The state of the paper's MoE layer that computes what a layer computes: ``from_moe_layer`` backwards.

    Args:
        layer: with a router that is nothing but ``router.weight``, and no GLU.
        prefix: put before each name.

    Raises:
        ValueError: the layer has a parameter that the paper's code has no place for, or a router of its own width, or
            it is sharded or accelerate holds it.
        TypeError: no ``MoE``.
    """
    if not isinstance(layer, MoE):
        raise TypeError(f"layer must be a MoE, got {type(layer).__name__}")
    check_dense(layer)
    check_type("prefix", prefix, str, "a string")
    names = {
        "keys": "keys",
        "values": "values",
        "router.weight": "expert_sel",
        "key_bias": "bias",
        "out_bias": "o_bias",
    }
    state = layer.state_dict()
    if layer.d_router != layer.d_model:
        raise ValueError(f"the paper's router sees x, this one an input of its own (d_router = {layer.d_router})")
    if layer.null_experts:
        raise ValueError(f"the paper's layer has no null experts, this one has null_experts = {layer.null_experts}")
    if foreign := sorted(state.keys() - names.keys()):
        raise ValueError(f"the paper's MoE layer has no place for {', '.join(foreign)}")
    for name in state:
        check_current(layer, name)
    state["keys"] = state["keys"].mT
    return {prefix + names[name]: tensor.detach().clone().contiguous() for name, tensor in state.items()}
