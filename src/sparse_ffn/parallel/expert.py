"""ExpertParallel: each process holds some of a layer's experts, and tokens travel to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, is_dtensor
from sparse_ffn.layers.moe import MoE
from sparse_ffn.parallel.collectives import all_to_all, sum_backward, sum_forward
from sparse_ffn.parallel.exchange import Exchange, choose
from sparse_ffn.parallel.split import UNITS, Split, check_layer, check_mesh, check_placement, distribute, mean
from sparse_ffn.routing import (
    DeepSeekRouter,
    Router,
    Routing,
    SigmoidRouter,
    SinkhornRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    UnweightedRouter,
)
from sparse_ffn.running import fork_random, seed_random

_DRAW_NOTHING = (
    SigmoidRouter, SoftmaxRouter, SoftmaxTopKRouter, SinkhornRouter, UnweightedRouter, DeepSeekRouter,
)  # fmt: skip


class ExpertParallel(ParallelStyle):
    """Expert parallelism for ``MoE`` and its named forms: ``parallelize_module(layer, mesh, ExpertParallel())``.

    ``keys``, ``values``, ``gate_keys`` and ``key_bias`` become DTensors with Shard(0) on the mesh, in place: names and
    global shapes stay, and with them the checkpoint. E need not be divisible; the experts follow ``torch.chunk``. No
    token is dropped and none waits for capacity. The output lies as the input does.

    Args:
        exchange: ``"gather"`` brings all tokens to all processes, ``"slots"`` sends a row for each token and expert,
            ``"tokens"`` one for each token and process; ``"auto"`` is "gather" where 1 - (1 - 1/processes)^k, about the
            share of the processes that a token needs, is above 0.9, else "tokens"; a name given to
            ``register_exchange``, or a subclass of ``Exchange``.
        input_layouts: ``Shard(0)`` where each process of the mesh has tokens of its own (any number); ``Replicate()``
            where all have the same ones, as in a group of tensor parallelism.
        gradients: ``"mean"`` for losses that are means over a process's own tokens, as DDP and FSDP expect: the
            experts' gradients are divided by the mesh's size. ``"sum"`` leaves them the sums over all losses.
        rest: ``"leave"`` router, ``out_bias`` and ``constants`` to DDP or FSDP; or ``"replicate"`` them as DTensors
            whose gradients are reduced over the mesh, so that the layer's parameters fit into one optimizer group.

    Raises:
        ValueError: an unknown word or placement.
    """

    def __init__(
        self,
        *,
        exchange: str | type[Exchange] = "auto",
        input_layouts: Placement = Shard(0),  # noqa: B008 # a constant
        gradients: str = "mean",
        rest: str = "leave",
    ) -> None:
        super().__init__()
        choose(exchange, 1, 1)
        self.exchange = exchange
        self.input_layouts = check_placement("input_layouts", input_layouts)
        check_choice("gradients", gradients, ("mean", "sum"))
        check_choice("rest", rest, ("leave", "replicate"))
        self.gradients, self.rest = gradients, rest

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Split a layer; called by ``parallelize_module``."""
        check_mesh(device_mesh)
        check_layer(self, module, (MoE,), UNITS)
        assert isinstance(module, MoE)
        replicated = isinstance(self.input_layouts, Replicate)
        exchange = None if replicated else choose(self.exchange, device_mesh.size(), min(module.k, module.n_experts))
        distribute(module, UNITS, device_mesh, Shard(0))
        if self.rest == "replicate":
            distribute(module, ("out_bias", "constants"), device_mesh, Replicate())
            for part in module.router.modules():
                distribute(part, list(part._parameters), device_mesh, Replicate())
        if exchange is None:
            module._split = ReplicatedExperts(Exchange(device_mesh, module.n_experts))
        else:
            module._split = ExchangedExperts(exchange(device_mesh, module.n_experts), mean(self.gradients, device_mesh))
        return module


class _Experts(Split):
    """A process's experts."""

    def route(self, router: nn.Module, x_TR: Tensor, mask_T: Tensor | None) -> Routing:
        """What a router decides whose parameters may be replicated DTensors."""
        replicated = {name: self.whole(p) for name, p in router.named_parameters() if is_dtensor(p)}
        if not replicated:
            routing: Routing = router(x_TR, mask_T)
            return routing
        routing = torch.func.functional_call(router, replicated, (x_TR, mask_T))
        return routing

    def experts(self, layer: MoE, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The tokens' outputs, by the experts of all processes."""
        raise NotImplementedError


class ExchangedExperts(_Experts):
    """A process's experts, for the tokens of all processes.

    Args:
        exchange: brings these.
        factor: of the experts' gradients.
    """

    exchange: Exchange

    def __init__(self, exchange: Exchange, factor: float) -> None:
        super().__init__(exchange.mesh, factor, exchange)

    def experts(self, layer: MoE, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """As ``_Experts``."""
        units = self.units(units)
        self.met = True
        waiting = self.exchange.dispatch(x_TD, index_TK, gate_TK)
        if self.errand is not None:
            self.errand()
        x_RD, index_RK, gate_RK, state = waiting()
        return self.exchange.combine(layer._compute(x_RD, units, index_RK, gate_RK), state)

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter that every process holds and has a part of the gradient of."""
        return sum_backward(super().whole(tensor), self.mesh, self.factor) if is_dtensor(tensor) else tensor


class ReplicatedExperts(_Experts):
    """A process's experts, for tokens that all processes have.

    Args:
        places: says which experts are here; nothing travels.
    """

    def __init__(self, places: Exchange) -> None:
        super().__init__(places.mesh, 1.0)
        self.places = places

    def route(self, router: nn.Module, x_TR: Tensor, mask_T: Tensor | None) -> Routing:
        """As ``_Experts``; noise and expert dropout are drawn from one seed, so that all processes decide alike."""
        if not router.training or not _draws(router):
            return super().route(router, x_TR, mask_T)
        seed = torch.randint(2**62, (1,)).expand(self.mesh.size())  # of the generator that checkpointing restores
        ones = [1] * self.mesh.size()
        first = all_to_all(seed.to(x_TR.device), ones, ones, self.mesh)[0].item()
        with fork_random(x_TR.device):
            seed_random(x_TR.device, int(first))
            return super().route(router, x_TR, mask_T)

    def experts(self, layer: MoE, x_TD: Tensor, units: ops.Units, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """As ``_Experts``."""
        x_TD, gate_TK = sum_backward(x_TD, self.mesh), sum_backward(gate_TK, self.mesh)
        y_TO = layer._compute(x_TD, self.units(units), self.places._local(index_TK), gate_TK)
        return sum_forward(y_TO, self.mesh)


def _draws(router: nn.Module) -> bool:
    """Whether a router may draw random numbers in training."""
    if isinstance(router, Router) and router.expert_dropout > 0:
        return True
    return type(router) not in _DRAW_NOTHING
