"""UnitsFFN: what the layers share that store each hidden unit as rows, DenseFFN, TopKFFN and the MoE family."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_ffn import ops
from sparse_ffn.checks import check_flag
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.layers.rows.base import check_dense
from sparse_ffn.module import tensors_of


class UnitsFFN(SparseFFN):
    """Base of layers with one row per hidden unit in ``keys``, ``values`` and, for a GLU, ``gate_keys``."""

    keys: nn.Parameter
    gate_keys: nn.Parameter | None
    key_bias: nn.Parameter | None
    _units_dims = 1

    @property
    def _units_shape(self) -> tuple[int, ...]:
        """How the hidden units are counted: [d_ff], or [experts, units of each]."""
        raise NotImplementedError

    def _make_units(self, glu: bool, bias: bool) -> None:
        units = self._units_shape
        self.keys = self._parameter(*units, self.d_model)
        self.gate_keys = self._parameter(*units, self.d_model) if check_flag("glu", glu) else None
        self.key_bias = self._parameter(*units) if bias else None
        self.values = self._parameter(*units, self.d_out)

    def reset_parameters(self) -> None:
        """Normal keys and values, zero biases."""
        self._reset_units()
        if self.out_bias is not None:
            nn.init.zeros_(self.out_bias)

    def _reset_units(self) -> None:
        check_dense(self)
        self._normal(self.keys, self.d_model)
        self._normal(self.values, self.d_ff)  # of all units, not of an expert's (arXiv 2310.10837, section 5)
        if self.gate_keys is not None:
            self._normal(self.gate_keys, self.d_model)
        if self.key_bias is not None:
            nn.init.zeros_(self.key_bias)

    def _units(self) -> ops.Units:
        """The hidden units' tensors, which fit each other."""
        units = units_of(self)
        if not fit(units, self._units_dims, self.d_model, self.d_out):
            raise self._shape_error()
        return units

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        units = self._units_shape
        return {
            "keys": (self.keys, (*units, self.d_model)),
            "gate_keys": (self.gate_keys, (*units, self.d_model)),
            "key_bias": (self.key_bias, units),
            "values": (self.values, (*units, self.d_out)),
        }

    def _flops(self, n_keys: int, n_values: int) -> int:
        """Of so many units' keys (twice for a GLU) and so many units' values."""
        return 2 * (n_keys * self.d_model * (1 if self.gate_keys is None else 2) + n_values * self.d_out)


def units_of(module: nn.Module) -> ops.Units:
    """The tensors that a module has in the places of its hidden units' parameters."""
    return ops.Units(*tensors_of(module, "keys", "values", "gate_keys", "key_bias"))


def fit(units: ops.Units, dims: int, d_model: int, d_out: int) -> bool:
    """Whether the tensors fit each other, for hidden units that are counted in so many dimensions.

    Kernels trust shapes, but functional_call, pruning and parametrisations bring tensors of their own.
    """
    shape = units.values.shape
    counted = shape[:-1]
    return (
        len(counted) == dims
        and shape[-1] == d_out
        and units.keys.shape == (*counted, d_model)
        and (units.gate_keys is None or units.gate_keys.shape == units.keys.shape)
        and (units.key_bias is None or units.key_bias.shape == counted)
    )
