"""The configs of conversion: a layer's arguments, of which sizes may be left out, and what becomes of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sparse_ffn import layers
from sparse_ffn.checks import check_choice, check_positive, check_rate, check_type, plain
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.routing import ROUTERS

Self = TypeVar("Self", bound="FFNConfig")
SIZES = ("d_ff", "n_sub_keys", "n_experts", "expert_size", "k", "rank")
OF_CONVERSION = {"init", "cluster_by", "router_init", "reinit"}
"""Fields that say what becomes of the weights, and that no layer has."""
EXPERT_SIZES = (16, 128)
"""The least and the largest size of an expert that is chosen when the config gives none. The paper's best is 128."""


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """What all configs share. A field that is None is taken from the FFN that is replaced.

    ``d_model``, ``d_out``, device and dtype always are the FFN's.

    Args:
        init: what the new layer starts from; each config says which words it takes. ``"fresh"`` is the layer's own
            initialisation.
        activation: as the layers'. With an ``init`` that carries weights it must be the FFN's or None, as ``glu`` and
            ``bias``, except that ``bias=True`` gives zero biases to an FFN without.
        dropout: on the hidden units.
        init_scale: of a fresh layer.
        n_layers: of a fresh layer.

    Raises:
        ValueError: an ``init`` that this layer does not have, or a value that the layer refuses.
        TypeError: a value of a type that the layer refuses.
    """

    layer: ClassVar[type[layers.SparseFFN]]
    inits: ClassVar[tuple[str, ...]]

    init: str = "fresh"
    activation: str | None = None
    dropout: float | None = None
    init_scale: float = 1.0
    n_layers: int | None = None

    def __post_init__(self) -> None:
        check_choice("init", self.init, self.inits)
        given: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if value is not None and field.name in SIZES:
                check_positive(field.name, value)
            if value is not None or not (field.name in SIZES or field.default is None):
                given[field.name] = value
        self.layer(d_model=2, **self._trial(given), device="meta")  # the layer checks its arguments

    def _trial(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a layer with these fields and the least sizes that fit them."""
        k = given.get("k", 1)
        least = {"d_ff": k, "n_sub_keys": 1 + math.isqrt(k - 1), "n_experts": k, "expert_size": 1, "k": k, "rank": 1}
        arguments = {name: size for name, size in least.items() if hasattr(self, name)} | given
        return {name: value for name, value in arguments.items() if name not in OF_CONVERSION}

    def resolve(self: Self, ffn: FFNWeights) -> Self:
        """This config with every None replaced by what the FFN says.

        Args:
            ffn: the FFN that is replaced.

        Raises:
            ValueError: a field that contradicts the FFN, or sizes that do not fit it.
        """
        has_bias = ffn.key_bias is not None or ffn.out_bias is not None
        has = {"activation": ffn.activation, "dropout": ffn.dropout, "glu": ffn.gate_keys is not None, "bias": has_bias}
        resolved: dict[str, Any] = {}
        for name, value in has.items():
            if not hasattr(self, name):
                continue
            own = getattr(self, name)
            resolved[name] = value if own is None else own
            free = self.init == "fresh" or name == "dropout" or (name == "bias" and own)  # missing biases are zeros
            if not free and resolved[name] != value:
                raise ValueError(
                    f"{name} = {own!r} contradicts the FFN, which has {value!r}, and init={self.init!r} keeps its "
                    'function: leave it out, or take init="fresh"'
                )
        return dataclasses.replace(self, **resolved, **self._sizes(ffn))

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        """The sizes, chosen where they are None."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """The arguments of the layer that a resolved config stands for, without widths, device and dtype.

        In the order of the config's fields.
        """
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in OF_CONVERSION}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``config_from_dict`` goes back."""
        return {"config": type(self).__name__, **dataclasses.asdict(self)}


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


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(FFNConfig):
    """The arguments that all mixtures of experts share."""

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

    def _copies(self, ffn: FFNWeights) -> dict[str, Any]:
        """The sizes of experts that are copies of the FFN."""
        n, size = self.n_experts or 8, self.expert_size or ffn.d_ff
        if size != ffn.d_ff and self.init != "fresh":
            raise ValueError(f"expert_size = {size} must be d_ff = {ffn.d_ff} to upcycle: each expert is a copy")
        return {"n_experts": n, "expert_size": size, "k": self.k or min(2, n)}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(MixtureConfig):
    """The MoE family's arguments, and how a dense FFN becomes experts.

    Args:
        n_experts: E; None for d_ff / expert_size (8 for ``"upcycle"``).
        expert_size: G; None for d_ff / n_experts, or if that is None too the largest divisor of d_ff from 16 to 128
            that makes two experts or more (d_ff for ``"upcycle"``).
        k: experts for a token; None for a quarter of them (2 for ``"upcycle"``).
        init: ``"split"`` cuts the hidden units into experts in their order, ``"cluster"`` groups units that belong
            together; both give the dense output at k = n_experts. ``"upcycle"`` copies the whole FFN into every expert,
            ``"fresh"`` starts anew.
        cluster_by: ``"keys"`` or ``"coactivation"`` (needs calibration); None for the latter with calibration.
        router_init: ``"mean_keys"`` (Avg-K) or ``"fitted"`` to the experts' true contributions (needs calibration);
            None for the latter with calibration.
        reinit: with ``"upcycle"`` the share of each expert's units, its own draw, whose rows are drawn anew, normal
            with the mean and deviation of the FFN's own: copies that differ learn different things (Drop-Upcycling,
            arXiv 2502.19261, section 3).

    ``"fresh"`` takes no notice of the last three: with it a config that was used makes layers of the same shapes.

    Raises:
        ValueError: as all configs; ``cluster_by``, ``router_init`` or ``reinit`` with an ``init`` that has no use for
            it; when an FFN is replaced, no size is given and its d_ff has no such divisor.
    """

    inits = ("split", "cluster", "upcycle", "fresh")

    init: str = "split"
    cluster_by: str | None = None
    router_init: str | None = None
    reinit: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_by is not None:
            check_choice("cluster_by", self.cluster_by, ("keys", "coactivation"))
        if self.router_init is not None:
            check_choice("router_init", self.router_init, ("mean_keys", "fitted"))
        if check_rate("reinit", self.reinit, inclusive=True) and self.init in ("split", "cluster"):
            raise ValueError(f'reinit = {self.reinit!r} is for init = "upcycle", not init = {self.init!r}')
        if self.init in ("split", "upcycle") and self.cluster_by is not None:
            raise ValueError(f'cluster_by = {self.cluster_by!r} is for init = "cluster", not init = {self.init!r}')
        if self.init == "upcycle" and self.router_init is not None:
            raise ValueError(f'router_init = {self.router_init!r} is not for init = "upcycle": its router is fresh')

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        if self.init == "upcycle":
            return self._copies(ffn)
        size = self.expert_size or (ffn.d_ff // self.n_experts if self.n_experts else _expert_size(ffn.d_ff))
        n = self.n_experts or ffn.d_ff // size
        if self.init != "fresh" and n * size != ffn.d_ff:
            raise ValueError(
                f"n_experts·expert_size = {n}·{size} must be d_ff = {ffn.d_ff}: init={self.init!r} deals out its units"
            )
        return {"n_experts": n, "expert_size": size, "k": self.k or max(1, n // 4)}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ExpertsConfig):
    """For ``MoE``: fields as all configs of the family, and ``router``, by name.

    ``router="unweighted"`` weighs every selected expert 1, so that a converted layer computes a part of the dense sum.
    """

    layer = layers.MoE

    router: str = "sigmoid"

    def __post_init__(self) -> None:
        check_choice("router", self.router, ROUTERS)  # the layer takes modules too, which no two layers can share
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SigmaMoEConfig(ExpertsConfig):
    """For ``SigmaMoE``."""

    layer = layers.SigmaMoE


@dataclass(frozen=True, kw_only=True)
class SoftmaxMoEConfig(ExpertsConfig):
    """For ``SoftmaxMoE``, with its ``router``."""

    layer = layers.SoftmaxMoE

    router: str = "softmax_topk"


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


@dataclass(frozen=True, kw_only=True)
class LowRankMoEConfig(MixtureConfig):
    """For ``LowRankMoE``: the FFN becomes the base of all experts, which differ from it by nothing at first.

    Args:
        n_experts: E; None for 8.
        expert_size: G; None for d_ff, which it must be but with ``init="fresh"``.
        k: experts for a token; None for 2.
        rank: of what an expert learns for itself; None for a sixteenth of d_ff.
        router: by name. With ``"softmax_topk"`` the gates sum to 1, and the layer starts as exactly the FFN; with
            others its values are divided by what the gates sum to where the router is undecided.
    """

    layer = layers.LowRankMoE
    inits = ("upcycle", "fresh")

    init: str = "upcycle"
    rank: int | None = None
    router: str = "softmax_topk"

    def __post_init__(self) -> None:
        check_choice("router", self.router, ROUTERS)
        super().__post_init__()

    def _sizes(self, ffn: FFNWeights) -> dict[str, Any]:
        return {**self._copies(ffn), "rank": self.rank or max(1, ffn.d_ff // 16)}


def _expert_size(d_ff: int) -> int:
    """The largest divisor that makes two experts or more."""
    least, largest = EXPERT_SIZES
    sizes = [size for size in range(least, min(largest, d_ff // 2) + 1) if d_ff % size == 0]
    if not sizes:
        raise ValueError(
            f"expert_size or n_experts must be given: d_ff = {d_ff} has no divisor from {least} to {largest} that "
            "makes two experts or more"
        )
    return sizes[-1]


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
