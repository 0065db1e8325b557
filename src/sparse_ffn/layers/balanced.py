"""Balanced: the balance of a layer: its options, its loss, and what a forward keeps for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_choice
from sparse_ffn.layers.last_forward import LastForward
from sparse_ffn.ops.library import in_backward
from sparse_ffn.routing.balance import LOSSES, check_balance, weighted_losses
from sparse_ffn.routing.base import AnyRouting
from sparse_ffn.routing.distributed import SharedGroup, Sync, check_sync

T = TypeVar("T", bound="Balanced")


class Balanced(nn.Module):
    """A layer with balance losses, which keeps what ``aux_loss`` and ``routing_stats`` ask for."""

    _last: LastForward | None = None

    def _set_balance(
        self, names: str | Sequence[str], weights: float | Sequence[float], over: str, aux: str, sync: Sync
    ) -> None:
        check_choice("balance_over", over, ("batch", "sequence"))
        check_choice("aux", aux, ("attach", "inject"))
        self.balance, self.balance_weight = check_balance(names, weights)
        self.balance_over, self.aux = over, aux
        self.sync_balance: Sync = check_sync("sync_balance", sync)

    def _n_sequences(self, x: Tensor) -> int | None:
        """How many parts of x [..., d_model] are balanced each by itself; None for all tokens together."""
        return x.shape[:-2].numel() if self.balance_over == "sequence" else None

    def _balance_loss(self, routing: AnyRouting, mask_T: Tensor | None, n_sequences: int | None) -> Tensor | None:
        """The weighted loss, if the layer has one now."""
        pairs = zip(self.balance, self.balance_weight, strict=True)
        terms = tuple((name, weight) for name, weight in pairs if name in LOSSES) if self.training else ()
        if not terms:
            return None
        return weighted_losses(routing, terms, mask_T, n_sequences, self.sync_balance)

    def _keep(
        self, loss: Tensor | None, index_TK: Tensor, mask_T: Tensor | None, results: tuple[Tensor | None, ...]
    ) -> None:
        """Keep what ``LastForward`` takes."""
        # an exported program has no module to keep these; is_exporting() is true for all that torch 2.9 compiles
        if not torch.compiler._is_exporting_flag and not in_backward():
            last = LastForward(loss, index_TK, mask_T, results)
            object.__setattr__(self, "_last", last)  # Module's own costs as much as a small op

    @property
    def _aux(self) -> Tensor | None:
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
        return {**self.__dict__, "_last": None, "sync_balance": sync}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.sync_balance, SharedGroup):
            self.sync_balance = self.sync_balance.group

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
