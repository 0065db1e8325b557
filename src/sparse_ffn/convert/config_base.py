"""FFNConfig: what all configs of conversion share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sparse_ffn.checks import check_choice, check_positive, plain
from sparse_ffn.convert.init.weights import FFNWeights
from sparse_ffn.layers.base import SparseFFN

Self = TypeVar("Self", bound="FFNConfig")
SIZES = ("d_ff", "n_sub_keys", "n_experts", "expert_size", "k")
OF_CONVERSION = {"init", "cluster_by", "router_init"}
"""Fields that say what becomes of the weights, and that no layer has."""


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """What all configs share. A field that is None is taken from the FFN that is replaced.

    ``d_model``, ``d_out``, device and dtype always are the FFN's.

    Args:
        init: what the new layer starts from; each config says which words it takes. ``"fresh"`` is the layer's own
            initialisation.
        activation: as the layers'. With an ``init`` that carries weights it must be the FFN's or None, as ``glu`` and
            ``bias``, but that ``bias=True`` gives zero biases to an FFN without.
        dropout: on the hidden units.
        init_scale: of a fresh layer.
        n_layers: of a fresh layer.

    Raises:
        ValueError: an ``init`` that this layer does not have, or a value that the layer refuses.
        TypeError: a value of a type that the layer refuses.
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
        optional = {*SIZES, *(field.name for field in dataclasses.fields(self) if field.default is None)}
        arguments: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if value is not None and field.name in SIZES:
                check_positive(field.name, value)
            if field.name not in OF_CONVERSION and (value is not None or field.name not in optional):
                arguments[field.name] = value
        k = arguments.get("k", 1)
        least = {"d_ff": k, "n_sub_keys": 1 + math.isqrt(k - 1), "n_experts": k, "expert_size": 1, "k": k}
        sizes = {name: size for name, size in least.items() if hasattr(self, name)}
        self.layer(d_model=2, **{**sizes, **arguments}, device="meta")  # it knows what is wrong with its arguments

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
            if name == "dropout" or (name == "bias" and own):  # biases that an FFN lacks are zeros
                continue
            if self.init != "fresh" and found[name] != value:
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
        """The arguments of the layer that a resolved config stands for, without widths, device and dtype.

        In the order of the config's fields.
        """
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in OF_CONVERSION}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; ``config_from_dict`` goes back."""
        return {"config": type(self).__name__, **dataclasses.asdict(self)}
