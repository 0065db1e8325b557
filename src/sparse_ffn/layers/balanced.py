"""Balanced: a router's balance: its options, its loss, and what a forward keeps for the training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from sparse_ffn.checks import check_choice, check_positive
from sparse_ffn.layers.last_forward import LastForward, nodes_of, watch
from sparse_ffn.module import WithProperties, lost_in_copies, unwrapped
from sparse_ffn.ops.library import in_backward
from sparse_ffn.routing.balance import LOSSES, Terms, check_balance, groups, weighted_losses
from sparse_ffn.routing.base import AnyRouting, Router, Routing
from sparse_ffn.routing.distributed import SharedGroup, Sync, check_sync, summed
from sparse_ffn.routing.relu import ReLURouter
from sparse_ffn.routing.targets import Targets

T = TypeVar("T", bound="Balanced")


class Calls:
    """The training forwards of a layer within ``pooled_balance``, one entry for each in all lists.

    Args:
        open: whether more may come. Closed and empty it says of a layer that its last training forwards were such
            ones, for checkpointing may have to repeat them.
    """

    def __init__(self, open: bool) -> None:
        self.open = open
        self.routings: list[Routing] = []
        self.masks: list[Tensor | None] = []
        self.n_sequences: list[int | None] = []
        self.nodes: list[Node] = []
        """Of all calls' results: the tensors themselves would cost memory under checkpointing."""
        self.freed = False

    def forget_loss(self) -> None:
        """Note that a backward pass has freed a call's graph, through which that of the loss would go."""
        self.freed = True


class Balanced(WithProperties):
    """A module with a router and its balance, which keeps what ``aux_loss`` and ``routing_stats`` ask for.

    This is all that the functions of ``training``, ``metering`` and ``plot`` know of a mixture of experts.
    """

    router: Router
    n_experts: int
    """Those that compute something."""
    null_experts: int = 0
    """The router's rows behind them."""
    _is_replica = False
    _last: LastForward | None = None
    _calls: Calls | None = None

    @property
    def k(self) -> int:
        """The router's ``k``: experts selected for a token, which may be set to any number up to all that it scores."""
        return self._own_router().k

    @k.setter
    def k(self, k: int) -> None:
        self._own_router().k = self._checked_k(k)

    def _checked_k(self, k: int) -> int:
        limit = "n_experts + null_experts" if self.null_experts else "n_experts"
        return check_positive("k", k, self.n_experts + self.null_experts, limit)

    def _own_router(self) -> Router:
        return unwrapped("router", self.router, Router)

    @property
    def _adapts(self) -> str | None:
        """Which of the balances it has that ``update_router_bias`` serves."""
        return "bias" if self._own_router().bias is not None else "l1" if "l1" in self.balance else None

    @property
    def _targets(self) -> Targets | None:
        """What share of the slots is wished on which expert; None for equal shares."""
        return None

    def _set_balance(
        self, names: str | Sequence[str], weights: float | Sequence[float], over: str, aux: str, sync: Sync
    ) -> None:
        self._balance, self._balance_weight = check_balance(names, weights)
        self.balance_over, self.aux = over, aux
        self.sync_balance = sync

    @property
    def balance(self) -> tuple[str, ...]:
        """The names; may be set to as many others, but for ``"bias"`` and ``"l1"``, which a router is made for."""
        return self._balance

    @balance.setter
    def balance(self, balance: str | Sequence[str]) -> None:
        found, _ = check_balance((balance,) if isinstance(balance, str) else balance, self._balance_weight)
        if changed := {"bias", "l1"} & (set(found) ^ set(self._balance)):
            raise ValueError(
                f"balance = {found}: a router is made with {changed.pop()!r} or without it: make a new layer"
            )
        self._check_served(found)
        self._balance = found

    def _check_served(self, balance: tuple[str, ...]) -> None:
        """Raise unless these serve the layer's options that are for balancing."""

    @property
    def balance_weight(self) -> tuple[float, ...]:
        """One for each name of ``balance``; may be set, to a number where there is one name."""
        return self._balance_weight

    @balance_weight.setter
    def balance_weight(self, balance_weight: float | Sequence[float]) -> None:
        single = len(self._balance) == 1 and not isinstance(balance_weight, Sequence)
        _, self._balance_weight = check_balance(self._balance[0] if single else self._balance, balance_weight)

    @property
    def balance_over(self) -> str:
        """``"batch"`` or ``"sequence"``; may be set."""
        return self._balance_over

    @balance_over.setter
    def balance_over(self, balance_over: str) -> None:
        check_choice("balance_over", balance_over, ("batch", "sequence"))
        self._balance_over = balance_over

    @property
    def aux(self) -> str:
        """``"attach"`` or ``"inject"``; may be set."""
        return self._aux_way

    @aux.setter
    def aux(self, aux: str) -> None:
        check_choice("aux", aux, ("attach", "inject"))
        self._aux_way = aux

    @property
    def sync_balance(self) -> Sync:
        """Whether losses are pooled over all processes, or the process group over which they are; may be set."""
        return self._sync_balance

    @sync_balance.setter
    def sync_balance(self, sync_balance: Sync) -> None:
        self._sync_balance = check_sync("sync_balance", sync_balance)

    def _n_sequences(self, x: Tensor) -> int | None:
        """How many parts of x [..., d_model] are balanced each by itself; None for all tokens together."""
        return math.prod(x.shape[:-2]) if self.balance_over == "sequence" else None

    def _balance_loss(self, routing: AnyRouting, mask_T: Tensor | None, n_sequences: int | None) -> Tensor | None:
        """The weighted loss, if the layer has one now."""
        if self._is_replica and self.training and any(name in LOSSES for name in self.balance):
            raise lost_in_copies(", ".join(self.balance))
        if not self._pooled():
            return self._weighted_loss(routing, mask_T, n_sequences)
        if self._calls is not None and not in_backward():
            assert isinstance(routing, Routing), "no fused call within pooled_balance"
            self._calls.routings.append(routing)
            self._calls.masks.append(_own(mask_T))
            self._calls.n_sequences.append(n_sequences)
        return None

    def _pooled(self) -> bool:
        """Whether this forward is one of ``pooled_balance``'s, or the repetition of one."""
        if self._calls is None or not self.training:
            return False
        if not self._calls.open and not in_backward():
            self._calls = None
        return self._calls is not None

    def _weighted_loss(self, routing: AnyRouting, mask_T: Tensor | None, n_sequences: int | None) -> Tensor | None:
        pairs = zip(self.balance, self.balance_weight, strict=True)
        terms: Terms = tuple((name, weight) for name, weight in pairs if name in LOSSES) if self.training else ()
        if not terms:
            return None
        if "l1" in self.balance:
            terms = self._with_l1(terms, routing, mask_T)
        return self._losses(routing, terms, mask_T, *groups(n_sequences))

    def _losses(
        self, routing: AnyRouting, terms: Terms, mask_T: Tensor | None, n_groups: int, per_sequence: bool
    ) -> Tensor:
        """The weighted losses; a subclass may divide the groups further."""
        return weighted_losses(routing, terms, mask_T, n_groups, per_sequence, self.sync_balance, self._targets)

    def _with_l1(self, terms: Terms, routing: AnyRouting, mask_T: Tensor | None) -> Terms:
        """The terms, that of the L1 loss times its adapting weight; counts what this adapts to."""
        router = self._own_router()
        assert isinstance(router, ReLURouter), "make_router checks it"
        assert isinstance(routing, Routing), "l1 is in NEED_LOGITS"
        if router.training:
            router.count_active(routing.logits_TE, mask_T)
        return tuple((name, weight * router.l1 if name == "l1" else weight) for name, weight in terms)

    def _keep(
        self, loss: Tensor | None, index_TK: Tensor, mask_T: Tensor | None, results: tuple[Tensor | Node | None, ...]
    ) -> None:
        """Keep what ``LastForward`` takes."""
        # an exported program has no module to keep these; is_exporting() is true for all that torch 2.9 compiles
        if not torch.compiler._is_exporting_flag and not in_backward():
            last = LastForward(loss, index_TK, _own(mask_T), results)
            object.__setattr__(self, "_last", last)  # Module's own costs as much as a small op
            if self._calls is not None and self._calls.open and self.training:
                nodes = nodes_of(results)
                self._calls.nodes += nodes
                watch(self._calls, nodes)

    @property
    def _aux(self) -> Tensor | None:
        if self._calls is not None and self._calls.open:
            raise RuntimeError("aux_loss within pooled_balance: leave the context first, the loss is that of all calls")
        return None if self._last is None else self._last.loss

    @property
    def _routed(self) -> tuple[Tensor, Tensor | None] | None:
        return None if self._last is None else self._last.routed

    def train(self: T, mode: bool = True) -> T:
        """As Module's; to leave training is to forget the kept balance loss."""
        if not mode and self._last is not None:
            self._last.forget_loss()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left behind: copies and pickles start clean."""
        sync = self.sync_balance if isinstance(self.sync_balance, bool) else SharedGroup(self.sync_balance)
        return {**super().__getstate__(), "_last": None, "_calls": None, "_sync_balance": sync}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self._sync_balance, SharedGroup):
            self.sync_balance = self._sync_balance.group

    def _balance_options(self) -> dict[str, tuple[Any, Any]]:
        """For the repr: each option with its default, the balance always."""
        single = len(self.balance) == 1
        return {
            "balance": (self.balance[0] if single else self.balance, None),
            "balance_weight": (self.balance_weight[0] if single else self.balance_weight, None),
            "balance_over": (self.balance_over, "batch"),
            "aux": (self.aux, "attach"),
            "sync_balance": (self.sync_balance, False),
        }


def slots_of_all(layers: dict[str, Balanced], counts: dict[str, Tensor], sync: Sync) -> dict[str, Tensor]:
    """The slots [E] of the layers that have run, summed over the processes of a group if asked; all of them call it.

    One collective for all layers, whose vectors end with how many processes they ran in: it need not be the same ones
    that ran everywhere (LayerDrop).
    """
    if sync is False or not layers:
        return counts
    device = next((count.device for count in counts.values()), None)
    vectors = []
    for name, layer in layers.items():
        experts = layer.n_experts + layer.null_experts
        vector = torch.zeros(experts + 1, dtype=torch.int64, device=device or layer._own_router().weight.device)
        if name in counts:
            vector[:-1], vector[-1] = counts[name], 1
        vectors.append(vector)
    totals = zip(layers, summed(vectors, sync), strict=True)
    return {name: total[:-1] for name, total in totals if total[-1]}


def _own(mask_T: Tensor | None) -> Tensor | None:
    """A copy: the caller may fill its mask anew for the next call."""
    return None if mask_T is None else mask_T.clone()


def balanced_in(model: nn.Module) -> dict[str, Balanced]:
    """The modules with a router and its balance in a model, each once, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Balanced)}
