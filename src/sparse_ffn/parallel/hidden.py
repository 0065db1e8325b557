"""HiddenParallel: each process holds some hidden units of an FFN, or of every expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.layers.dense import DenseFFN
from sparse_ffn.layers.moe import MoE
from sparse_ffn.layers.topk import TopKFFN
from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.topk_ffn.reference import rank
from sparse_ffn.parallel.collectives import all_gather, sum_backward, sum_forward
from sparse_ffn.parallel.exchange import Exchange
from sparse_ffn.parallel.expert import ReplicatedExperts
from sparse_ffn.parallel.split import UNITS, Split, check_layer, check_mesh, check_share, distribute

# T tokens, D d_model, O d_out, F hidden units of this process, k selected units, W processes


class HiddenParallel(ParallelStyle):
    """Tensor parallelism by hidden units, for ``DenseFFN``, ``TopKFFN``, and ``MoE`` over the units of each expert.

    ``keys``, ``values``, ``gate_keys`` and ``key_bias`` become DTensors that are split along the units. All processes
    of the mesh have the same tokens, and get the same output. ``TopKFFN`` selects the k best of all units, as on one
    process. All gradients are whole on each process: nothing needs to be averaged over the mesh.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Split a layer; called by ``parallelize_module``."""
        check_mesh(device_mesh)
        check_layer(self, module, (DenseFFN, MoE), UNITS)
        if isinstance(module, MoE):
            check_share("expert_size", module.expert_size, device_mesh)
            distribute(module, UNITS, device_mesh, Shard(1))
            module._split = _UnitsOfExperts(Exchange(device_mesh, module.n_experts), 1.0)
        else:
            assert isinstance(module, DenseFFN)
            check_share("d_ff", module.d_ff, device_mesh)
            distribute(module, UNITS, device_mesh, Shard(0))
            module._split = (_UnitsTopK if isinstance(module, TopKFFN) else _Units)(device_mesh, 1.0)
        return module


class _Units(Split):
    """A process's units of a dense FFN."""

    def compute(self, layer: DenseFFN, x: Tensor, units: ops.Units) -> Tensor:
        """The output [T, O], of all processes' units."""
        return sum_forward(self._part(layer, sum_backward(x, self.mesh), self.units(units)), self.mesh)

    def of_units(self, mask: Tensor) -> Tensor:
        """As ``Split``."""
        return _own(mask, self.mesh)

    def _part(self, layer: DenseFFN, x: Tensor, units: ops.Units) -> Tensor:
        return layer._compute(x, units)


class _UnitsTopK(_Units):
    """A process's units of a top-k FFN: its best k are candidates, and the processes tell each other their ranks."""

    def _part(self, layer: DenseFFN, x: Tensor, units: ops.Units) -> Tensor:
        assert isinstance(layer, TopKFFN)
        keys, values, gate_keys, key_bias = units.to(x.dtype)
        glu_gate_TF = None if gate_keys is None else F.linear(x, gate_keys)
        mask_TF = layer._dropout_mask(x, x.shape[0], layer.d_ff)
        h_TF = hidden_anywhere(layer.activation, F.linear(x, keys, key_bias), glu_gate_TF, mask_TF)
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


class _UnitsOfExperts(ReplicatedExperts):
    """A process's units of every expert."""

    def experts(self, layer: MoE, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """As ``ReplicatedExperts``."""
        x_TD, gate_TK = sum_backward(x_TD, self.mesh), sum_backward(gate_TK, self.mesh)
        return sum_forward(layer._compute(x_TD, self.units(units), index_TK, gate_TK), self.mesh)

    def of_units(self, mask: Tensor) -> Tensor:
        """As ``Split``."""
        return _own(mask, self.mesh)


def _own(mask: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's part of the last dimension."""
    return mask.chunk(mesh.size(), -1)[mesh.get_local_rank()].contiguous()
