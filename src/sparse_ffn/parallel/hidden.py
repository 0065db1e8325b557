"""HiddenParallel: each process holds some hidden units of an FFN, or of every expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.checks import check_choice
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.topk import TopKFFN
from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.products import linear
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.topk_ffn.reference import rank
from sparse_ffn.parallel.collectives import all_gather, arrived, reduce_scatter, sum_backward, sum_forward
from sparse_ffn.parallel.exchanges import GatherExchange
from sparse_ffn.parallel.expert import ExchangedExperts, ReplicatedExperts
from sparse_ffn.parallel.split import (
    UNITS,
    Split,
    check_layer,
    check_mesh,
    check_placement,
    check_share,
    distribute,
    mean,
)

# T tokens, D d_model, O d_out, F hidden units of this process, k selected units, W processes


class HiddenParallel(ParallelStyle):
    """Tensor parallelism by hidden units, for ``DenseFFN``, ``TopKFFN``, and ``MoE`` over the units of each expert.

    ``keys``, ``values``, ``gate_keys`` and ``key_bias`` become DTensors that are split along the units. ``TopKFFN``
    selects the k best of all units, as on one process. The output lies as the input does.

    Args:
        input_layouts: ``Replicate()`` where all processes of the mesh have the same tokens: they get the same output,
            and all gradients are whole on each, so that nothing needs to be averaged over the mesh. ``Shard(0)`` where
            each has tokens of its own (any number): these are gathered, and sums scattered back; the router and
            ``out_bias`` are left to DDP or FSDP.
        gradients: of tokens of its own, ``"mean"`` or ``"sum"``, as in ``ExpertParallel``.

    Raises:
        ValueError: an unknown word or placement.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement = Replicate(),  # noqa: B008 # a constant
        gradients: str = "mean",
    ) -> None:
        super().__init__()
        self.input_layouts = check_placement("input_layouts", input_layouts)
        check_choice("gradients", gradients, ("mean", "sum"))
        self.gradients = gradients

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Split a layer; called by ``parallelize_module``."""
        check_mesh(device_mesh)
        check_layer(self, module, (DenseFFN, MoE), UNITS)
        own, factor = not isinstance(self.input_layouts, Replicate), mean(self.gradients, device_mesh)
        if isinstance(module, MoE):
            check_share("expert_size", module.expert_size, device_mesh)
            distribute(module, UNITS, device_mesh, Shard(1))
            everywhere = _Everywhere(device_mesh, module.n_experts)
            module._split = _UnitsOfExpertsOfAll(everywhere, factor) if own else _UnitsOfExperts(everywhere)
        else:
            assert isinstance(module, DenseFFN)
            check_share("d_ff", module.d_ff, device_mesh)
            distribute(module, UNITS, device_mesh, Shard(0))
            kind = _UnitsTopK if isinstance(module, TopKFFN) else _Units
            gather = GatherExchange(device_mesh, module.d_ff)
            module._split = kind(device_mesh, factor, gather) if own else kind(device_mesh, 1.0)
        return module


class _OfUnits(Split):
    """A part that is a process's hidden units, of each expert if there are several."""

    def of_units(self, mask: Tensor) -> Tensor:
        """As ``Split``."""
        return mask.chunk(self.mesh.size(), -1)[self.mesh.get_local_rank()].contiguous()


class _Units(_OfUnits):
    """A process's units of a dense FFN, for tokens that all processes have, or with an exchange for those of all."""

    exchange: GatherExchange | None

    def compute(self, layer: DenseFFN, x: Tensor, units: ops.Units) -> Tensor:
        """The output [T, O], of all processes' units."""
        units = self.units(units)
        if self.exchange is None:
            return sum_forward(self._part(layer, sum_backward(x, self.mesh), units), self.mesh)
        self.met = True
        (rows,), _ = self.exchange.gathered((x, 0))
        return reduce_scatter(self._part(layer, arrived(rows), units), self.mesh)[: x.shape[0]]

    def _part(self, layer: DenseFFN, x: Tensor, units: ops.Units) -> Tensor:
        return layer._compute(x, units)


class _UnitsTopK(_Units):
    """A process's units of a top-k FFN: its best k are candidates, and the processes tell each other their ranks."""

    def _part(self, layer: DenseFFN, x: Tensor, units: ops.Units) -> Tensor:
        assert isinstance(layer, TopKFFN)
        keys, values, gate_keys, key_bias = units.to(x.dtype)
        glu_gate_TF = None if gate_keys is None else linear(x, gate_keys)
        mask_TF = layer._dropout_mask(x, x.shape[0], layer.d_ff)
        h_TF = hidden_anywhere(layer.activation, linear(x, keys, key_bias), glu_gate_TF, mask_TF)
        ranked_TF = h_TF
        if layer.rank_by == "gate":
            assert glu_gate_TF is not None
            ranked_TF = hidden_anywhere(layer.activation, glu_gate_TF, None, mask_TF)
        score_TF = rank(ranked_TF, values, layer.norm_aware)
        best = stable_topk(score_TF, min(layer.k, score_TF.shape[1]))
        missing = layer.k - best.shape[1]
        told = F.pad(score_TF.gather(1, best), (0, missing), value=-torch.inf)
        # ties go to the lower unit: candidates lie by process, and those of a process by unit where they tie
        score_TWk = all_gather(told, self.mesh).view(self.mesh.size(), *told.shape).transpose(0, 1)
        kept = torch.zeros_like(score_TWk, dtype=torch.bool).flatten(1)
        kept = kept.scatter(1, stable_topk(score_TWk.flatten(1), layer.k), True).view(score_TWk.shape)
        kept = kept[:, self.mesh.get_local_rank(), : best.shape[1]]
        return ops.weighted_bag(values, best, torch.where(kept, h_TF.gather(1, best), 0))


class _UnitsOfExperts(_OfUnits, ReplicatedExperts):
    """A process's units of every expert, for tokens that all processes have."""


class _UnitsOfExpertsOfAll(_OfUnits, ExchangedExperts):
    """A process's units of every expert, for the tokens of all processes."""


class _Everywhere(GatherExchange):
    """All tokens to all processes, each of which holds a part of every expert."""

    def _local(self, index: Tensor) -> Tensor:
        return index
