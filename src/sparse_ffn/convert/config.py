"""The configs of conversion: the layers' arguments, sizes optional, and what becomes of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_ffn import layers
from sparse_ffn.checks import check_choice, check_type
from sparse_ffn.convert.config_base import OF_CONVERSION as OF_CONVERSION
from sparse_ffn.convert.config_base import FFNConfig as FFNConfig
from sparse_ffn.convert.config_experts import ExpertsConfig as ExpertsConfig
from sparse_ffn.convert.config_experts import MoEConfig as MoEConfig
from sparse_ffn.convert.config_experts import NoisyTopKMoEConfig as NoisyTopKMoEConfig
from sparse_ffn.convert.config_experts import SBaseMoEConfig as SBaseMoEConfig
from sparse_ffn.convert.config_experts import SigmaMoEConfig as SigmaMoEConfig
from sparse_ffn.convert.config_experts import SoftmaxMoEConfig as SoftmaxMoEConfig
from sparse_ffn.convert.config_experts import SwitchMoEConfig as SwitchMoEConfig
from sparse_ffn.convert.init.weights import FFNWeights


@dataclass(frozen=True, kw_only=True)
class DenseFFNConfig(FFNConfig):
    """For ``DenseFFN``: the same function in this library's layout (``init="split"``), or a fresh one."""

    layer = layers.DenseFFN
    inits = ("split", "fresh")

    init: str = "split"
    d_ff: int | None = None
    glu: bool | None = None
    bias: bool | None = None

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        return {"d_ff": _d_ff(self, ffn)}


@dataclass(frozen=True, kw_only=True)
class TopKFFNConfig(FFNConfig):
    """For ``TopKFFN``. ``init="topk"`` keeps keys and values: exact at k = d_ff.

    Args:
        k: units kept; None for a quarter of them.
    """

    layer = layers.TopKFFN
    inits = ("topk", "fresh")

    init: str = "topk"
    d_ff: int | None = None
    k: int | None = None
    glu: bool | None = None
    bias: bool | None = None
    norm_aware: bool = False

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        d_ff = _d_ff(self, ffn)
        return {"d_ff": d_ff, "k": max(1, d_ff // 4) if self.k is None else self.k}


@dataclass(frozen=True, kw_only=True)
class ProductKeyMemoryConfig(FFNConfig):
    """For ``ProductKeyMemory``. ``init="pkm"`` lays the units out on the nearest grid of product keys.

    Exact at k = d_ff where the keys are products, as those of trained FFNs are not.

    Args:
        n_sub_keys: n; None for the least n with n² >= d_ff. ``"pkm"`` needs n² = d_ff.
        k: values read by a head; None for a quarter of d_ff.
    """

    layer = layers.ProductKeyMemory
    inits = ("pkm", "fresh")

    n_sub_keys: int | None = None
    k: int | None = None
    n_heads: int = 1
    query_dim: int | None = None
    query_bias: bool = False
    query_norm: str | None = None
    norm_affine: bool = False
    value_init: str = "paper"
    sparse_grad: bool = False

    def _wanted(self, ffn: FFNWeights) -> dict[str, Any]:
        return {}

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        n = self.n_sub_keys or 1 + math.isqrt(ffn.d_ff - 1)
        return {"n_sub_keys": n, "k": max(1, ffn.d_ff // 4) if self.k is None else self.k}


CONFIGS: tuple[type[FFNConfig], ...] = (
    DenseFFNConfig,
    TopKFFNConfig,
    ProductKeyMemoryConfig,
    MoEConfig,
    SigmaMoEConfig,
    SoftmaxMoEConfig,
    SwitchMoEConfig,
    SBaseMoEConfig,
    NoisyTopKMoEConfig,
)


def config_from_dict(values: Mapping[str, Any]) -> FFNConfig:
    """The config that ``to_dict`` wrote.

    Args:
        values: what ``to_dict`` returned, or the same read back from JSON.

    Raises:
        ValueError: no such config, or a value that it refuses.
        TypeError: no mapping, or a field that the config does not have.
    """
    check_type("values", values, Mapping, "what to_dict returned")
    values = dict(values)
    name = values.pop("config", None)
    kinds = {cls.__name__: cls for cls in CONFIGS}
    check_choice("the config of values", name, kinds)
    kind = kinds[str(name)]
    names = [field.name for field in dataclasses.fields(kind)]
    if foreign := [key for key in values if key not in names]:
        raise TypeError(f"values has {', '.join(map(repr, foreign))}, but {name} only {', '.join(names)}")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kind(**fields)


def _d_ff(config: DenseFFNConfig | TopKFFNConfig, ffn: FFNWeights) -> int:
    if config.init != "fresh" and config.d_ff not in (None, ffn.d_ff):
        raise ValueError(f"d_ff = {config.d_ff} must be the FFN's {ffn.d_ff}: init={config.init!r} keeps its units")
    return config.d_ff or ffn.d_ff
