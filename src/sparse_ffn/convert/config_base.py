"""FFNConfig: what the configs of conversion share: a layer's arguments, and what becomes of the weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sparse_ffn import layers
from sparse_ffn.checks import check_choice, check_positive, plain
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.options import check_options

Self = TypeVar("Self", bound="FFNConfig")
SIZES = ("d_ff", "n_sub_keys", "n_experts", "expert_size", "k", "rank")
OF_CONVERSION = {"init", "cluster_by", "router_init", "refit", "reinit", "active", "shared_size"}
"""Fields that are no argument of the config's layer: what becomes of the weights, and what stands beside the layer."""
Converted = layers.SparseFFN | SharedExpertMoE
"""What an FFN becomes."""


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

    def __new__(cls: type[Self], *args: Any, **options: Any) -> Self:
        """Check the names of the options, as layers do."""
        check_options(cls, options)
        return super().__new__(cls)

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

    def make(self, ffn: FFNWeights) -> Converted:
        """The layer that a resolved config stands for in the place of an FFN, with weights of its own."""
        return self.layer(
            d_model=ffn.d_model, d_out=ffn.d_out, device=ffn.keys.device, dtype=ffn.keys.dtype, **self.arguments()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``config_from_dict`` goes back."""
        return {"config": type(self).__name__, **dataclasses.asdict(self)}
