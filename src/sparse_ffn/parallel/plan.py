"""What a whole model needs: which style for which layer, FSDP2's placements, and what DDP must leave alone."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.parallel import DistributedDataParallel

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import called, check_module, check_type
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.product_key import ProductKeyMemory
from sparse_ffn.layers.routed import Routed
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.parallel.exchange import shares
from sparse_ffn.parallel.split import UNITS


def plan(
    model: nn.Module,
    *,
    experts: ParallelStyle | None = None,
    hidden: ParallelStyle | None = None,
    memory: ParallelStyle | None = None,
) -> dict[str, ParallelStyle]:
    """The name of each layer with its style, as ``parallelize_module`` takes them.

    Args:
        model: any module that holds layers of this library.
        experts: for MoE layers, those of a ``SharedExpertMoE`` included, such as ``ExpertParallel()``.
        hidden: for ``DenseFFN`` and ``TopKFFN``, and without ``experts`` for MoE layers: ``HiddenParallel()``.
        memory: for ``ProductKeyMemory``, such as ``MemoryParallel()``.

    Raises:
        TypeError: the model is no module, or a style no ParallelStyle.
        ValueError: the model has no layer for a style, styles of other ``input_layouts`` would split the parts of a
            ``SharedExpertMoE``, or units of a layer are tied to another module's parameter, which splitting would end.

    Warns:
        SparseFFNWarning: other layers are split, but not these mixtures, which no style can split (``MixedMoE``,
            ``LowRankMoE``): every process holds them whole.
    """
    check_module("model", model)
    for name, style in (("experts", experts), ("hidden", hidden), ("memory", memory)):
        if style is not None:
            check_type(name, style, ParallelStyle, "a torch.distributed.tensor.parallel.ParallelStyle")
    found: dict[str, ParallelStyle] = {}
    whole: list[str] = []
    used: set[int] = set()
    for name, module in model.named_modules():
        style = None
        if isinstance(module, MoE):
            style = experts or hidden
        elif isinstance(module, DenseFFN):
            style = hidden
        elif isinstance(module, ProductKeyMemory):
            style = memory
        elif isinstance(module, Routed) and (experts or hidden):
            whole.append(f"{called(name)} ({type(module).__name__})")
        if style is not None:
            found[name] = style
            used.add(id(style))
    for argument, style in (("experts", experts), ("hidden", hidden), ("memory", memory)):
        if style is not None and id(style) not in used:
            raise ValueError(f"{argument} = {type(style).__name__}, but the model has no layer for it")
    for name, module in model.named_modules():
        if isinstance(module, SharedExpertMoE) and experts is not None and hidden is not None:
            of_both = [getattr(style, "input_layouts", None) for style in (experts, hidden)]
            if None not in of_both and of_both[0] != of_both[1]:
                raise ValueError(
                    f"experts has input_layouts = {of_both[0]} and hidden has {of_both[1]}, but both parts of "
                    f"{called(name)}, a SharedExpertMoE, get the same tokens: give both styles the same"
                )
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name in found:
        layer = model.get_submodule(name)
        for own in UNITS:
            parameter = layer._parameters.get(own)
            if parameter is not None and uses[id(parameter)] > 1:
                raise ValueError(f"{own} of {called(name)} is another module's too: to split it would untie them")
    if whole:
        warnings.warn(f"no style splits {', '.join(whole)}: every process holds all of it", SparseFFNWarning, 2)
    return found


def shard_placement_fn(model: nn.Module, dp_mesh: DeviceMesh, expert_dp_mesh: DeviceMesh) -> Callable[..., Any]:
    """``fully_shard``'s argument where split experts are sharded over another mesh than all other parameters.

    With W processes of which each group of ``ep`` shares the experts, ``dp_mesh`` has all W and ``expert_dp_mesh``
    those W/ep that hold the same experts; ``fully_shard(model, mesh=dp_mesh, shard_placement_fn=...)`` shards both.

    Args:
        model: after ``parallelize_module``.
        dp_mesh: of one dimension, or two for HSDP: the mesh that ``fully_shard`` gets.
        expert_dp_mesh: of as many dimensions.

    Returns:
        A function of a parameter.

    Raises:
        TypeError: the model is no module.
        ValueError: meshes of other dimensions; no layer is split.
        RuntimeError: this version of torch shards all parameters over one mesh. There, split layers with
            ``ExpertParallel(rest="replicate")`` and give ``fully_shard`` the expert_dp_mesh.
    """
    check_module("model", model)
    for name, mesh in (("dp_mesh", dp_mesh), ("expert_dp_mesh", expert_dp_mesh)):
        check_type(name, mesh, DeviceMesh, "a DeviceMesh")
        if mesh.ndim not in (1, 2):
            raise ValueError(f"{name} must have one or two dimensions, got shape {tuple(mesh.shape)}")
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise RuntimeError(
            "this version of torch shards all parameters of a module over one mesh: split layers with "
            'ExpertParallel(rest="replicate") and give fully_shard the expert_dp_mesh'
        ) from None
    split = {id(p): p for p in _dtensors(model).values() if not all(to.is_replicate() for to in p.placements)}
    if not split:
        raise ValueError("model has no layer that is split: call parallelize_module first")

    def info(mesh: DeviceMesh) -> Any:
        if mesh.ndim == 1:
            return FSDPMeshInfo(mesh, shard_mesh_dim=0)
        return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)

    for parameter in split.values():
        dim, parts = _parts(parameter)
        if not parts[-1]:  # of experts: other styles leave no process without its part
            raise ValueError(
                f"model shares {parameter.shape[dim]} experts among {len(parts)} processes, one of which holds none: "
                "FSDP2 reduces no empty gradients"
            )
    ours = info(expert_dp_mesh)
    # FSDP2 wants one object for one group of processes
    theirs = ours if dp_mesh.size() == expert_dp_mesh.size() else info(dp_mesh)

    def placement(parameter: nn.Parameter) -> Any:
        if id(parameter) not in split:
            return ShardPlacementResult(None, theirs)
        assert isinstance(parameter, DTensor)
        dim, parts = _parts(parameter)
        sizes, shards = [[size] for size in parameter.shape], expert_dp_mesh.size(-1)
        sizes[dim] = parts
        few = sizes[0][0] < shards and len(sizes) > 1
        along = 1 if few and not any(size % shards for size in sizes[1]) else 0  # torch asks for even columns
        return ShardPlacementResult(Shard(along), ours)

    return placement


def ddp_ignore(model: nn.Module) -> None:
    """Make ``DistributedDataParallel(model)`` leave the DTensors of split layers alone, whose gradients are complete.

    Args:
        model: after ``parallelize_module`` over all processes, before it is wrapped.

    Raises:
        TypeError: the model is no module.
        ValueError: no layer is split, or over some of the processes only: DDP would have to average the others.
    """
    check_module("model", model)
    split = _dtensors(model)
    if not split:
        raise ValueError("model has no layer that is split: call parallelize_module first")
    world = distributed.get_world_size()
    for name, parameter in split.items():
        if parameter.device_mesh.size() != world:
            raise ValueError(
                f"model shares {name} among {parameter.device_mesh.size()} of {world} processes, and DDP averages over "
                "all or none: take fully_shard"
            )
    # DDP joins names with a dot, and so begins those of the root's own parameters with one
    names = [name if "." in name else f".{name}" for name in split]
    set_ignored: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    set_ignored(model, [*split, *names])


def _dtensors(model: nn.Module) -> dict[str, DTensor]:
    """The parameters that split layers share or replicate, by name."""
    return {
        f"{name}.{own}" if name else own: p
        for name, layer in model.named_modules()
        if isinstance(layer, SparseFFN) and layer._split is not None
        for own, p in layer.named_parameters()
        if isinstance(p, DTensor)
    }


def _parts(parameter: DTensor) -> tuple[int, list[int]]:
    """The dimension along which the processes share a parameter, and how much of it each of them holds."""
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return placement.dim, shares(parameter.shape[placement.dim], parameter.device_mesh.size())
