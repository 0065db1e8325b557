"""Split: how a process computes its part of a layer, which holds one as ``_split``; and what all styles check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from sparse_ffn import ops
from sparse_ffn.checks import is_dtensor, shown
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.layers.rows.base import ExpertRows
from sparse_ffn.parallel.collectives import scale_gradient
from sparse_ffn.parallel.exchange import Exchange, NoExchange, shares

UNITS = ("keys", "values", "gate_keys", "key_bias")


class Split:
    """The part of a layer that is this process's.

    Args:
        mesh: the processes that share the layer.
        factor: of the gradients of what the process holds alone.
        exchange: in which the others wait for this process's tokens; None where nobody does.
    """

    def __init__(self, mesh: DeviceMesh, factor: float, exchange: Exchange | None = None) -> None:
        self.mesh, self.factor, self.exchange = mesh, factor, exchange
        self.met = False
        """Whether this process has sent its numbers in a forward that has not ended: nobody waits for them then."""
        self.errand: Callable[[], None] | None = None
        """What else the process has to compute, if tokens travel in this forward: while they do."""

    @property
    def alone(self) -> bool:
        """Whether this process is the only one."""
        return isinstance(self.exchange, NoExchange)

    def local(self, tensor: Tensor) -> Tensor:
        """This process's rows or columns of a parameter."""
        return scale_gradient(_local(tensor), self.factor)

    def units(self, units: ops.Units) -> ops.Units:
        """This process's hidden units."""
        return ops.Units._make([None if t is None else self.local(t) for t in units])

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter that every process holds."""
        return _local(tensor) if is_dtensor(tensor) else tensor

    def of_units(self, mask: Tensor) -> Tensor:
        """Of numbers [..., units] for all hidden units those of this process."""
        return mask

    def fail(self) -> None:
        """Tell the processes that wait for this one's tokens that it raises."""
        met, self.met = self.met, False
        if self.exchange is not None and not met:
            self.exchange.fail()


def _local(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        raise TypeError(
            f"a parameter of shape {list(tensor.shape)} must be the DTensor that the layer's style has made of it, got "
            f"a {type(tensor).__name__}"
        )
    return tensor.to_local()


def mean(gradients: str, mesh: DeviceMesh) -> float:
    """The factor of what a process holds alone, by a style's argument ``gradients``."""
    return 1 / mesh.size() if gradients == "mean" else 1.0


def check_share(name: str, size: int, mesh: DeviceMesh) -> None:
    """Raise unless every process of the mesh gets something."""
    if not shares(size, mesh.size())[-1]:
        raise ValueError(f"mesh of {mesh.size()} processes leaves one without its part of {name} = {size}")


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise unless a mesh has one dimension."""
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['ep'], got one of shape {tuple(mesh.shape)}")


def check_layer(style: object, layer: Any, kinds: tuple[type[SparseFFN], ...], names: Iterable[str]) -> None:
    """Raise unless a style can split the layer's parameters of these names."""
    if not isinstance(layer, kinds):
        hint = "; a SharedExpertMoE's experts are its 'routed'" if hasattr(layer, "routed") else ""
        raise TypeError(
            f"{type(style).__name__} splits {' and '.join(kind.__name__ for kind in kinds)}, got module "
            f"{type(layer).__name__}{hint}"
        )
    if layer._split is not None:
        raise ValueError(f"module {type(layer).__name__} is split already, by {type(layer._split).__name__}")
    for name in names:
        parameter = getattr(layer, name)
        if isinstance(parameter, ExpertRows):
            raise ValueError(
                f"{name} of module {type(layer).__name__} are stored rows, which no style splits: call "
                "dequantize_experts_ first"
            )
        if parameter is not None and layer._parameters.get(name) is not parameter:
            raise ValueError(f"{name} of module {type(layer).__name__} is no parameter: split it before it is changed")
        if is_dtensor(parameter):
            raise ValueError(f"{name} of module {type(layer).__name__} is a DTensor: split it before fully_shard")


def check_placement(name: str, value: Any) -> Placement:
    """The value, if it is Shard(0) or Replicate()."""
    if not isinstance(value, Replicate) and value != Shard(0):
        raise ValueError(f"{name} must be Shard(0), each process's own tokens, or Replicate(), got {shown(value)}")
    placement: Placement = value
    return placement


def distribute(module: nn.Module, names: Iterable[str], mesh: DeviceMesh, placement: Placement) -> None:
    """Make parameters DTensors in place: names and global shapes stay."""
    for name in names:
        if (parameter := module._parameters.get(name)) is not None:
            made = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]), parameter.requires_grad)
            module.register_parameter(name, made)
