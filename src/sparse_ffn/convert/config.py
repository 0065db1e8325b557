"""The configs of conversion: the layers' arguments, sizes optional, and what becomes of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sparse_ffn import layers
from sparse_ffn.checks import check_choice, check_positive
from sparse_ffn.convert.weights import FFNWeights
from sparse_ffn.layers.base import SparseFFN

Self = TypeVar("Self", bound="FFNConfig")


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """What all configs share. A field that is None is taken from the FFN that is replaced.

    ``d_model``, ``d_out``, device and dtype always are the FFN's.

    Args:
        init: what the new layer starts from; each config says which words it takes. ``"fresh"`` is the layer's own
            initialisation.
        activation: as the layers'. With an ``init`` that carries weights it must be the FFN's or None.
        dropout: on the hidden units.
        init_scale: of a fresh layer.
        n_layers: of a fresh layer.

    Raises:
        ValueError: an ``init`` that this layer does not have; a size below 1.
        TypeError: a size that is no int.
    """

    layer: ClassVar[type[SparseFFN]]
    inits: ClassVar[tuple[str, ...]]

    init: str = "fresh"
    activation: str | None = None
    dropout: float | None = None
    init_scale: float = 1.0
    n_layers: int | None = None

    def __post_init__(self) -> None:
        check_choice("init", self.init, self.inits)
        for name in ("d_ff", "n_sub_keys", "n_experts", "expert_size", "k"):
            size = getattr(self, name, None)
            if size is not None:
                check_positive(name, size)

    def resolve(self: Self, ffn: FFNWeights) -> Self:
        """This config with every None replaced by what the FFN says.

        Args:
            ffn: the FFN that is replaced.

        Raises:
            ValueError: a field that contradicts the FFN, or sizes that do not fit it.
        """
        wanted = {"activation": ffn.activation, "dropout": ffn.dropout, **self._wanted(ffn)}
        found: dict[str, Any] = {}
        for name, value in wanted.items():
            own = getattr(self, name)
            found[name] = value if own is None else own
            if self.init != "fresh" and name != "dropout" and found[name] != value:
                raise ValueError(
                    f"{name} = {own!r} contradicts the FFN, which has {value!r}, and init={self.init!r} keeps its "
                    'function: leave it out, or take init="fresh"'
                )
        return dataclasses.replace(self, **found, **self._sizes(ffn))

    def _wanted(self, ffn: FFNWeights) -> dict[str, Any]:
        return {"glu": ffn.gate_keys is not None, "bias": ffn.key_bias is not None or ffn.out_bias is not None}

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        return {}

    def arguments(self) -> dict[str, Any]:
        """The arguments of the layer that a resolved config stands for, without widths, device and dtype."""
        kept = {f.name for f in dataclasses.fields(self)} - OF_CONVERSION
        return {name: getattr(self, name) for name in kept}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``config_from_dict`` goes back."""
        return {"config": type(self).__name__, **dataclasses.asdict(self)}


OF_CONVERSION = {"init", "cluster_by", "router_init"}


def config_from_dict(values: Mapping[str, Any]) -> FFNConfig:
    """The config that ``to_dict`` wrote.

    Args:
        values: what ``to_dict`` returned, or the same read back from JSON.

    Raises:
        ValueError: no such config.
        TypeError: a field that the config does not have.
    """
    values = dict(values)
    name = values.pop("config", None)
    kinds = {cls.__name__: cls for cls in CONFIGS}
    check_choice("config", name, kinds)
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return kinds[str(name)](**fields)


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
    query_norm: str | None = None
    value_init: str = "paper"
    sparse_grad: bool = False

    def _wanted(self, ffn: FFNWeights) -> dict[str, Any]:
        return {}

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        n = self.n_sub_keys or 1 + math.isqrt(ffn.d_ff - 1)
        return {"n_sub_keys": n, "k": max(1, ffn.d_ff // 4) if self.k is None else self.k}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(FFNConfig):
    """The MoE family's arguments, and how a dense FFN becomes experts.

    Args:
        n_experts: E; None for d_ff / expert_size (8 for ``"upcycle"``).
        expert_size: G; None for d_ff / n_experts, or if that is None too the largest divisor of d_ff up to 128 (d_ff
            for ``"upcycle"``).
        k: experts for a token; None for a quarter of them (2 for ``"upcycle"``).
        init: ``"split"`` cuts the hidden units into experts in their order, ``"cluster"`` groups units that belong
            together; both give the dense output at k = n_experts. ``"upcycle"`` copies the whole FFN into every expert,
            ``"fresh"`` starts anew.
        cluster_by: ``"keys"`` or ``"coactivation"`` (needs calibration); None for the latter with calibration.
        router_init: ``"mean_keys"`` (Avg-K) or ``"fitted"`` to the experts' true contributions (needs calibration);
            None for the latter with calibration.

    ``"fresh"`` takes no notice of the last two: with it a config that was used makes layers of the same shapes.

    Raises:
        ValueError: as all configs; ``cluster_by`` or ``router_init`` with an ``init`` that has no use for it.
    """

    inits = ("split", "cluster", "upcycle", "fresh")

    init: str = "split"
    n_experts: int | None = None
    expert_size: int | None = None
    k: int | None = None
    glu: bool | None = None
    bias: bool | None = None
    expert_dropout: float = 0.0
    balance: str | Sequence[str] = "entropy"
    balance_weight: float | Sequence[float] = 1e-3
    balance_over: str = "batch"
    aux: str = "attach"
    sync_balance: bool = False
    cluster_by: str | None = None
    router_init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_by is not None:
            check_choice("cluster_by", self.cluster_by, ("keys", "coactivation"))
        if self.router_init is not None:
            check_choice("router_init", self.router_init, ("mean_keys", "fitted"))
        if self.init in ("split", "upcycle") and self.cluster_by is not None:
            raise ValueError(f'cluster_by = {self.cluster_by!r} is for init = "cluster", not init = {self.init!r}')
        if self.init == "upcycle" and self.router_init is not None:
            raise ValueError(f'router_init = {self.router_init!r} is not for init = "upcycle": its router is fresh')

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        if self.init == "upcycle":
            n, size = self.n_experts or 8, self.expert_size or ffn.d_ff
            if size != ffn.d_ff:
                raise ValueError(f"expert_size = {size} must be d_ff = {ffn.d_ff} to upcycle: each expert is a copy")
            return {"n_experts": n, "expert_size": size, "k": self.k or min(2, n)}
        n, size = self.n_experts or 0, self.expert_size or 0
        if not size:
            size = ffn.d_ff // n if n else max(g for g in range(1, 129) if ffn.d_ff % g == 0)
        n = n or ffn.d_ff // size
        if self.init != "fresh" and n * size != ffn.d_ff:
            raise ValueError(
                f"n_experts·expert_size = {n}·{size} must be d_ff = {ffn.d_ff}: init={self.init!r} deals out its units"
            )
        return {"n_experts": n, "expert_size": size, "k": self.k or max(1, n // 4)}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ExpertsConfig):
    """For ``MoE``: fields as all configs of the family, and ``router``, by name.

    ``router="open"`` weighs every selected expert 1, so that a converted layer computes a part of the dense sum.
    """

    layer = layers.MoE

    router: str = "sigmoid"


@dataclass(frozen=True, kw_only=True)
class SigmaMoEConfig(ExpertsConfig):
    """For ``SigmaMoE``."""

    layer = layers.SigmaMoE


@dataclass(frozen=True, kw_only=True)
class SoftmaxMoEConfig(ExpertsConfig):
    """For ``SoftmaxMoE``, with its ``order``."""

    layer = layers.SoftmaxMoE

    order: str = "renormalize"


@dataclass(frozen=True, kw_only=True)
class SwitchMoEConfig(ExpertsConfig):
    """For ``SwitchMoE``."""

    layer = layers.SwitchMoE

    k: int | None = 1
    balance: str | Sequence[str] = "switch"
    balance_weight: float | Sequence[float] = 1e-2


@dataclass(frozen=True, kw_only=True)
class SBaseMoEConfig(ExpertsConfig):
    """For ``SBaseMoE``, with its ``n_iters``."""

    layer = layers.SBaseMoE

    n_iters: int = 3
    balance: str | Sequence[str] = "none"


@dataclass(frozen=True, kw_only=True)
class NoisyTopKMoEConfig(ExpertsConfig):
    """For ``NoisyTopKMoE``."""

    layer = layers.NoisyTopKMoE

    balance: str | Sequence[str] = "cv2"


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


def _d_ff(config: DenseFFNConfig | TopKFFNConfig, ffn: FFNWeights) -> int:
    if config.init != "fresh" and config.d_ff not in (None, ffn.d_ff):
        raise ValueError(f"d_ff = {config.d_ff} must be the FFN's {ffn.d_ff}: init={config.init!r} keeps its units")
    return config.d_ff or ffn.d_ff
