"""Expert statistics: what each expert of a model adds to its layer's output on real batches.

T tokens, K slots of a token, S slots, E experts, O d_out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn import ops
from sparse_ffn.checks import called, check_flag, check_function, check_loaded, check_module
from sparse_ffn.convert.batches import run
from sparse_ffn.convert.calibrate import Filter
from sparse_ffn.layers.moe import MoE

CHUNK_BYTES = 1 << 26
"""Of the experts' outputs that exist at a time."""


@dataclass(frozen=True, eq=False)
class ExpertStats:
    """What the experts of a layer did, as sums over its real tokens, in fp64 on the CPU; add those of several runs.

    f_e(x) is the output of expert e without its gate g. A sum without further words is over the tokens routed to e. All
    that is derived is zero for an expert that saw no token.
    """

    tokens: int
    """Real tokens."""
    count: Tensor
    """[E], tokens routed to e."""
    gate: Tensor
    """[E], Σ g."""
    gate_square: Tensor
    """[E], Σ g²."""
    norm: Tensor
    """[E], Σ ‖f_e(x)‖."""
    contribution: Tensor
    """[E], Σ g·‖f_e(x)‖."""
    energy: Tensor
    """[E], Σ g²·‖f_e(x)‖²."""
    moment: Tensor = field(repr=False)
    """[E, d_out], Σ g²·f_e(x)."""
    total: Tensor | None = field(default=None, repr=False)
    """[E, d_out], the sum of f_e(x) over all tokens; only with ``forced``."""

    @property
    def mean(self) -> Tensor:
        """[E, d_out], Σ g²·f_e(x) / Σ g²: the constant that replaces f_e best, by the squared error of g·f_e."""
        return ratio(self.moment, self.gate_square.unsqueeze(1))

    @property
    def residual(self) -> Tensor:
        """[E], Σ g²·‖f_e(x) - mean_e‖²: the squared error that is left then."""
        explained = ratio(self.moment.square().sum(1), self.gate_square)
        return (self.energy - explained).clamp_min(0)  # a difference: rounding may take it below

    @property
    def all_tokens_mean(self) -> Tensor | None:
        """[E, d_out], the mean of f_e over all tokens, routed to e or not (HC-SMoE, arXiv 2410.08589)."""
        return None if self.total is None else self.total / max(self.tokens, 1)

    def __add__(self, other: ExpertStats) -> ExpertStats:
        """The statistics of both runs' tokens together.

        Raises:
            ValueError: the layers differ in shape, or only one of the runs was forced.
        """
        if not isinstance(other, ExpertStats):
            return NotImplemented
        if self.moment.shape != other.moment.shape:
            raise ValueError(
                f"statistics of {list(self.moment.shape)} and of {list(other.moment.shape)} [experts, d_out] do not add"
            )
        if (self.total is None) != (other.total is None):
            raise ValueError("only one of the two statistics was made with forced=True")
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        added: list[Any] = [None if a is None else a + b for a, b in pairs]
        return ExpertStats(*added)


def expert_stats(
    model: nn.Module, batches: Iterable[Any], filter_fn: Filter | None = None, *, forced: bool = False
) -> dict[str, ExpertStats]:
    """Run a model on batches and measure what each expert of its MoE layers adds to the output.

    Args:
        model: its ``MoE`` layers are measured, and its modules of transformers' experts, which are known by their
            forward(hidden_states, top_k_index, top_k_weights). It runs in evaluation mode, and its modes are as before
            afterwards; a balance loss that waits for its backward pass is forgotten.
        batches: as ``calibrate``'s. Tokens that a mapping's ``attention_mask`` marks as padding are left out, or those
            that the model gives its layer as ``mask``.
        filter_fn: as ``sparsify_``'s: only these layers.
        forced: compute every expert for every token too, for ``all_tokens_mean``; takes E/K times longer.

    Returns:
        The statistics by the layer's name. A layer that saw no token is left out. Memory: an fp64 [E, d_out] for each
        layer, and 64 MiB of outputs at a time.

    Raises:
        TypeError: the model is no module, ``batches`` cannot be iterated over, or ``filter_fn`` is no function.
        ValueError: no layer is found, none saw a token, or ``sparse_ffn.parallel`` has split one.
        RuntimeError: called inside a transform of torch.func.
    """
    check_module("model", model)
    forced = check_flag("forced", forced)
    if filter_fn is not None:
        check_function("filter_fn", filter_fn, "module and name")
    if ops.under_transforms():
        raise RuntimeError("expert_stats keeps sums on the side, which torch.func's transforms lose: call it outside")
    found = {name: experts for name, module in model.named_modules() if (experts := Experts.of(module)) is not None}
    if filter_fn is not None:
        found = {name: experts for name, experts in found.items() if filter_fn(experts.module, name)}
    if not found:
        raise ValueError("the model has no MoE layer and no experts of transformers (that filter_fn admits)")
    for name, experts in found.items():
        if getattr(experts.module, "_split", None) is not None:
            raise ValueError(f"model's layer {name or 'itself'} is split by sparse_ffn.parallel: measure before")
        for place, tensor in experts.module.named_parameters(name):
            check_loaded(model, place, tensor)
    sums: dict[str, ExpertStats] = {}

    def add(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
        measured = measure(found[name], args, kwargs, mask, forced)
        if measured is not None:
            sums[name] = sums[name] + measured if name in sums else measured

    run(model, batches, [(experts.module, partial(add, name)) for name, experts in found.items()])
    if not sums:
        raise ValueError(f"no layer saw a token of the batches: {', '.join(map(called, found))}")
    return {name: sums[name] for name in found if name in sums}


ARGUMENTS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
)
"""Of the forward of transformers' experts: tokens, and for each of them experts and gates."""


@dataclass(frozen=True)
class Experts:
    """A module with experts, and how to ask it."""

    module: nn.Module
    route: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    """From the arguments of its forward: x [T, D], expert [T, K], gate [T, K] and the mask [T] that it was given."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """f_e(x) for x [S, D], e [S]: [S, O]."""

    @classmethod
    def of(cls, module: nn.Module) -> Experts | None:
        """A module as one with experts, if it is one."""
        if isinstance(module, MoE):
            return cls(module, partial(route, module), partial(apply, module))
        if not hasattr(module, "num_experts"):
            return None
        try:
            names = tuple(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):  # some builtins tell nothing
            return None
        if names in ARGUMENTS:
            return cls(module, partial(_given, names), partial(_ask, module))
        return None

    @property
    def n_experts(self) -> int:
        """Those that compute: an index from here on names none of them."""
        if isinstance(self.module, MoE):
            return self.module.n_experts
        return int(self.module.num_experts)  # type: ignore[arg-type]


def route(
    layer: MoE, x: Tensor, *, mask: Tensor | None = None, router_input: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of a call of a layer: x [T, D], the selected experts [T, K], their gates [T, K] and the mask [T]."""
    routing = layer._routing_of(x, mask, router_input)
    mask_T = None if mask is None else mask.reshape(-1)
    return x.reshape(-1, layer.d_model), routing.index_TK, routing.gate_TK, mask_T


def apply(layer: MoE, x_SD: Tensor, expert_S: Tensor) -> Tensor:
    """f_e(x) of a layer's experts, without gates: [S, O]."""
    one = torch.ones_like(expert_S, dtype=torch.float32)
    return layer._compute(x_SD, layer._units(), expert_S.unsqueeze(1), one.unsqueeze(1))


def _given(names: tuple[str, ...], *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, index, gate = (given[name].flatten(0, -2) for name in names)
    return x, index, gate, None


def _ask(experts: nn.Module, x_SD: Tensor, expert_S: Tensor) -> Tensor:
    y: Tensor = experts.forward(x_SD, expert_S.unsqueeze(1), x_SD.new_ones(len(x_SD), 1))
    return y


def measure(
    experts: Experts, args: tuple[Any, ...], kwargs: dict[str, Any], batch_mask_T: Tensor | None, forced: bool
) -> ExpertStats | None:
    """What a call of the module adds to the sums; None without a real token."""
    x_TD, index_TK, gate_TK, mask_T = experts.route(*args, **kwargs)
    mask_T = batch_mask_T if mask_T is None else mask_T
    if mask_T is not None:
        x_TD, index_TK, gate_TK = x_TD[mask_T], index_TK[mask_T], gate_TK[mask_T]
    if not len(x_TD):
        return None
    tokens, n_experts = len(x_TD), experts.n_experts
    slot = (index_TK.flatten() < n_experts).nonzero().flatten()  # those of real experts
    token_S, expert_S = slot // index_TK.shape[1], index_TK.flatten()[slot]
    sums = _sums(experts, x_TD, token_S, expert_S, gate_TK.flatten()[slot].double())
    found: list[Any] = [tokens, *(s.cpu() for s in sums)]
    if forced:
        token_S = torch.arange(tokens, device=x_TD.device).repeat_interleave(n_experts)
        expert_S = torch.arange(n_experts, device=x_TD.device).repeat(tokens)
        one_S = torch.ones(len(token_S), dtype=torch.float64, device=x_TD.device)
        found.append(_sums(experts, x_TD, token_S, expert_S, one_S)[-1].cpu())
    return ExpertStats(*found)


def _sums(experts: Experts, x_TD: Tensor, token_S: Tensor, expert_S: Tensor, gate_S: Tensor) -> list[Tensor]:
    """``ExpertStats``' sums, from ``count`` to ``moment``, over slots with gates in fp64."""
    width = _width(experts, x_TD)
    sums = [gate_S.new_zeros(experts.n_experts, *shape) for shape in ((),) * 6 + ((width,),)]
    rows = max(1, CHUNK_BYTES // (gate_S.element_size() * width))
    for first in range(0, len(gate_S), rows):
        token, expert, gate = (of_S[first : first + rows] for of_S in (token_S, expert_S, gate_S))
        f = experts.apply(x_TD[token], expert).double()
        norm = f.norm(dim=1)
        size, square = gate * norm, gate.square()
        terms = (torch.ones_like(gate), gate, square, norm, size, size.square(), f.mul_(square.unsqueeze(1)))
        for total, term in zip(sums, terms, strict=True):
            total.index_add_(0, expert, term)
    return sums


def _width(experts: Experts, x_TD: Tensor) -> int:
    """d_out."""
    return experts.module.d_out if isinstance(experts.module, MoE) else x_TD.shape[1]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, zero where b is."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0.0)
