"""The configs of conversion by name: those of layers without a router stand here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_ffn import layers
from sparse_ffn.checks import check_choice, check_type
from sparse_ffn.convert.config_base import OF_CONVERSION as OF_CONVERSION
from sparse_ffn.convert.config_base import FFNConfig as FFNConfig
from sparse_ffn.convert.config_experts import ExpertsConfig as ExpertsConfig
from sparse_ffn.convert.config_experts import (
    LowRankMoEConfig,
    MoEConfig,
    NoisyTopKMoEConfig,
    SBaseMoEConfig,
    SigmaMoEConfig,
    SoftmaxMoEConfig,
    SwitchMoEConfig,
)
from sparse_ffn.convert.init.weights import FFNWeights


@dataclass(frozen=True, kw_only=True)
class DenseFFNConfig(FFNConfig):
    """For ``DenseFFN``: the same function in this library's layout (``init="split"``), or a fresh one."""

    layer: ClassVar[type[layers.SparseFFN]] = layers.DenseFFN
    inits = ("split", "fresh")

    init: str = "split"
    d_ff: int | None = None
    glu: bool | None = None
    bias: bool | None = None

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        if self.init != "fresh" and self.d_ff not in (None, ffn.d_ff):
            raise ValueError(f"d_ff = {self.d_ff} must be the FFN's {ffn.d_ff}: init={self.init!r} keeps its units")
        return {"d_ff": self.d_ff or ffn.d_ff}


@dataclass(frozen=True, kw_only=True)
class TopKFFNConfig(DenseFFNConfig):
    """For ``TopKFFN``. ``init="topk"`` keeps keys and values: exact at k = d_ff.

    Args:
        k: units kept; None for a quarter of them.
        norm_aware: as the layer's.
        rank_by: as the layer's; ``"gate"`` is for the FFNs that are GLUs.
    """

    layer = layers.TopKFFN
    inits = ("topk", "fresh")

    init: str = "topk"
    k: int | None = None
    norm_aware: bool = False
    rank_by: str = "hidden"

    def _trial(self, given: dict[str, Any]) -> dict[str, Any]:
        return super()._trial({"glu": True, **given} if self.rank_by == "gate" else given)

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        sizes = super()._sizes(ffn)
        return {**sizes, "k": self.k or max(1, sizes["d_ff"] // 4)}


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
    experts: bool = False
    gated: bool = False

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        n = self.n_sub_keys or 1 + math.isqrt(ffn.d_ff - 1)
        return {"n_sub_keys": n, "k": self.k or max(1, ffn.d_ff // 4)}


CONFIGS: tuple[type[FFNConfig], ...] = (
    DenseFFNConfig, TopKFFNConfig, ProductKeyMemoryConfig, MoEConfig, SigmaMoEConfig, SoftmaxMoEConfig, SwitchMoEConfig,
    SBaseMoEConfig, NoisyTopKMoEConfig, LowRankMoEConfig,
)  # fmt: skip


def config_from_dict(values: Mapping[str, Any]) -> FFNConfig:
    """The config that ``to_dict`` wrote.

    Args:
        values: what ``to_dict`` returned, or the same read back from JSON.

    Raises:
        ValueError: no such config, or a value that it refuses.
        TypeError: no mapping, or a field that the config does not have.
    """
    check_type("values", values, Mapping, "what to_dict returned")
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    name = fields.pop("config", None)
    kinds = {cls.__name__: cls for cls in CONFIGS}
    check_choice("the config of values", name, kinds)
    kind = kinds[str(name)]
    names = [field.name for field in dataclasses.fields(kind)]
    if foreign := [key for key in fields if key not in names]:
        raise TypeError(f"values has {', '.join(map(repr, foreign))}, but {name} only {', '.join(names)}")
    return kind(**fields)
