"""config_of: the config that a layer's present options amount to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from sparse_ffn.convert.config import CONFIGS, DenseFFNConfig, FFNConfig
from sparse_ffn.convert.config_base import Converted
from sparse_ffn.convert.config_experts import ExpertsConfig
from sparse_ffn.layers import LatentMoE, SparseFFN, SwitchHeadAttention
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.routing import ROUTERS, Router


def config_of(layer: Converted) -> FFNConfig:
    """The config that makes layers of a layer's sizes and options, as they are now, with fresh weights.

    Args:
        layer: any; what was set on it after it was made (``layer.k = 2``) counts.

    Raises:
        TypeError: no layer of this library, or one of a class that no config is for.
        ValueError: the layer has a router that its config does not make, or a shared expert of another kind than its
            own or with a gate.
    """
    if isinstance(layer, SharedExpertMoE):
        return _beside_shared(layer)
    if not isinstance(layer, (SparseFFN, LatentMoE, SwitchHeadAttention)):
        raise TypeError(f"layer must be a layer of sparse_ffn, got {type(layer).__name__}")
    kind: Any = next((kind for kind in CONFIGS if kind.layer is _own_class(layer)), None)
    if kind is None:
        raise TypeError(f"no config is for {type(layer).__name__}: there are {', '.join(c.__name__ for c in CONFIGS)}")
    router = layer._own_router() if isinstance(layer, Routed) else None
    default: Any = kind(init="fresh")
    config: FFNConfig = kind(init="fresh", **{n: _option(layer, router, n, v) for n, v in default.arguments().items()})
    if router is not None:
        widths: dict[str, Any] = {"d_model": layer.d_model, "d_out": layer.d_out, "device": "meta"}
        twin: Any = config.layer(**widths, **config.arguments())
        if _function(router) != _function(twin.router):
            raise ValueError(f"no {kind.__name__} makes a layer with this router, {router}")
    return config


def _beside_shared(layer: SharedExpertMoE) -> FFNConfig:
    """The routed experts' config, with the size of the shared one, which has to be what that config makes."""
    routed: Any = layer._own_routed()  # a LatentMoE is no layer that has a config
    config, shared = config_of(routed), config_of(layer._own_shared())
    names = ("activation", "glu", "bias", "dropout", "init_scale")
    if not isinstance(config, ExpertsConfig):
        raise ValueError(f"no {type(config).__name__} makes a layer with a shared expert")
    why = None
    if type(shared) is not DenseFFNConfig:
        why = f"that is a {shared.layer.__name__}"
    elif differing := [name for name in names if getattr(config, name) != getattr(shared, name)]:
        why = f"whose {', '.join(differing)} differ"
    elif layer.gate is not None:
        why = "with a gate"
    if why is not None:
        raise ValueError(f"no {type(config).__name__} makes a layer with a shared expert {why}")
    return replace(config, shared_size=layer.shared.d_ff)


def _option(layer: SparseFFN, router: Router | None, name: str, default: Any) -> Any:
    """What the argument of that name would have to be now."""
    if name == "n_layers":
        return None  # init_scale says it
    if name in ("glu", "bias"):
        return getattr(layer, "gate_keys" if name == "glu" else "out_bias") is not None
    if name == "router" and router is not None:
        return next((known for known, cls in ROUTERS.items() if cls is _own_class(router)), default)
    if name == "sync_balance" and isinstance(layer, Routed):
        return layer.sync_balance is not False  # a config knows no group
    value = getattr(layer if hasattr(layer, name) else router, name)
    return value[0] if name in ("balance", "balance_weight") and len(value) == 1 else value


def _function(router: Router) -> tuple[Any, ...]:
    """What decides the function that a router computes: its class and all that its repr shows."""
    return _own_class(router), router.extra_repr()


def _own_class(module: nn.Module) -> type:
    """The class below those that FSDP and parametrisations put before it."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch."))
