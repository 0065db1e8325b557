"""transformers' expert parallelism by this library's exchanges: its experts, its plan, its meshes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F
from transformers.distributed.expert_parallel import EPImplementation

from sparse_ffn.parallel.collectives import sum_backward, sum_forward
from sparse_ffn.parallel.exchange import Exchange, choose


class TokenExchange(EPImplementation):
    """Brings tokens to a module of experts as ``ExpertParallel`` does: gathered by few processes, else sent once each.

    Where all processes that share the experts have one batch, each computes its experts' part of it, and the parts are
    summed. Where only those of a tensor-parallel group have, each of these sends a slice of it.
    """

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted outputs of all experts.

        Args:
            hidden_states: [T, D], of this process.
            top_k_index: int64 [T, K], over the experts of all processes.
            top_k_weights: [T, K].

        Returns:
            [T, D].
        """
        mesh, tp_mesh, k = self.ep_mesh, self.tp_mesh, top_k_index.shape[1]
        n_experts = self._held * mesh.size()
        if self.shares_batch:
            x_TD, weight_TK = sum_backward(hidden_states, mesh), sum_backward(top_k_weights, mesh)
            return sum_forward(self._compute(x_TD, Exchange(mesh, n_experts)._local(top_k_index), weight_TK), mesh)
        exchange = choose("auto", mesh.size(), k)(mesh, n_experts)
        tokens = [hidden_states, top_k_index, top_k_weights]
        if tp_mesh.size() > 1:
            whole = (DTensor.from_local(t, tp_mesh, [Replicate()], run_check=False) for t in tokens)
            tokens = [t.redistribute(tp_mesh, [Shard(0)]).to_local() for t in whole]
        x_RD, index_RK, weight_RK, state = exchange.dispatch(*tokens)()
        y_TD = exchange.combine(self._compute(x_RD, index_RK, weight_RK), state)
        if tp_mesh.size() == 1:
            return y_TD
        shape, stride = hidden_states.shape, (hidden_states.shape[1], 1)
        slices = DTensor.from_local(y_TD.contiguous(), tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return slices.full_tensor()

    @property
    def _held(self) -> int:
        """Experts of this process."""
        return cast(int, self.num_local_experts)

    def _compute(self, x_RD: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """This process's experts; of no row they get one, of no expert, that the backward pass has all collectives."""
        missing = (0, 0, 0, int(not x_RD.shape[0]))
        # some implementations compute slots of no expert, and rely on a weight of 0
        weight_RK = torch.where(index_RK < self._held, weight_RK, 0)
        index_RK = F.pad(index_RK, missing, value=self._held)
        y: Tensor = self.experts_forward(F.pad(x_RD, missing), index_RK, F.pad(weight_RK, missing))
        return y[: x_RD.shape[0]]
