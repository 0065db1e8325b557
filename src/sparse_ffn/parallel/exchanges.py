"""The exchanges by name: "gather", "slots" and "tokens". Shapes as in ``Exchange``; E experts, P copies of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.parallel.collectives import all_to_all, arrived, gather, reduce_scatter, send
from sparse_ffn.parallel.copies import Copies, collect, spread
from sparse_ffn.parallel.exchange import Arrivals, Exchange, register_exchange


class GatherExchange(Exchange):
    """All tokens to all processes, and the sums of what they computed back: for few processes."""

    def dispatch(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Callable[[], Arrivals]:
        """As ``Exchange``; shorter processes fill up with void slots, which cost nothing."""
        (index, x, gate), _ = self.gathered((index_TK.int(), self.n_experts), (x_TD, 0), (gate_TK, 0))
        return lambda: (arrived(x), self._local(arrived(index).long()), arrived(gate), x_TD.shape[0])

    def gathered(self, *filled: tuple[Tensor, int]) -> tuple[list[Tensor], list[int]]:
        """Rows of all processes, on their way, and how many each has: it fills up with a number to the longest."""
        tokens, device = filled[0][0].shape[0], filled[0][0].device
        told_W = self._tell(torch.full((self.mesh.size(),), tokens, device=device))
        # the longest as a number of its own: torch 2.9 compiles no shape that is a maximum of several
        (longest, *_), all_tokens = self._numbers(told_W.max().expand_as(told_W), told_W)
        missing = (0, 0, 0, longest - tokens)
        return [gather(F.pad(t, missing, value=number), self.mesh) for t, number in filled], all_tokens

    def combine(self, y_RO: Tensor, state: Any) -> Tensor:
        """As ``Exchange``."""
        return reduce_scatter(y_RO, self.mesh).narrow(0, 0, state)


class SlotsExchange(Exchange):
    """A row for each token and expert, as torchtitan and Megatron send them; the sum is where the token is."""

    def __init__(self, mesh: Any, n_experts: int) -> None:
        super().__init__(mesh, n_experts)
        self.counted = self.size + 1  # of each expert, and of void slots, which stay where they are

    def dispatch(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Callable[[], Arrivals]:
        """As ``Exchange``; the rows of a process are ordered by where they come from, then by expert."""
        (tokens, k), world = index_TK.shape, self.mesh.size()
        expert_TK = torch.where(index_TK < self.n_experts, index_TK % self.size, self.size)
        flat_S = (self._owner(index_TK) * self.counted + expert_TK).reshape(-1)
        order_S = flat_S.argsort(stable=True)
        sent_E = _counts(flat_S, world * self.counted)
        got_WE = self._tell(sent_E).view(world, self.counted)
        sent, received = self._numbers(sent_E.view(world, self.counted).sum(1), got_WE.sum(1))
        copies = Copies(order_S // k, _inverse(order_S).view(tokens, k), torch.ones_like(index_TK, dtype=torch.bool))
        x = send(spread(x_TD, copies), received, sent, self.mesh)
        gate = send(gate_TK.reshape(-1, 1).index_select(0, order_S), received, sent, self.mesh)
        expert_E = torch.arange(self.counted, device=x_TD.device).clamp_max(self.held).repeat(world)
        index_R = torch.repeat_interleave(expert_E, got_WE.reshape(-1), output_size=sum(received))
        return lambda: (arrived(x), index_R.unsqueeze(1), arrived(gate), (copies, sent, received))

    def combine(self, y_RO: Tensor, state: Any) -> Tensor:
        """As ``Exchange``."""
        copies, sent, received = state
        return collect(all_to_all(y_RO, sent, received, self.mesh), copies)


class TokensExchange(Exchange):
    """Each token once to each process that holds one of its experts, as DeepEP sends them; one sum comes back."""

    def dispatch(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Callable[[], Arrivals]:
        """As ``Exchange``; the rows of a process are ordered by where they come from, then by token."""
        tokens, world = x_TD.shape[0], self.mesh.size()
        owner_TK = self._owner(index_TK)
        needs_TW = torch.zeros(tokens, world, dtype=torch.bool, device=x_TD.device).scatter(1, owner_TK, True)
        sent_W = needs_TW.sum(0)
        sent, received = self._numbers(sent_W, self._tell(sent_W))
        # wanted pairs first, by process and then by token; and where each pair went
        order_A = needs_TW.t().reshape(-1).logical_not().to(torch.int8).argsort(stable=True)
        order_P = order_A.narrow(0, 0, sum(sent))  # torch 2.9 compiles no slice up to a number of the data's
        owner_P, source_P = order_P // max(tokens, 1), order_P % max(tokens, 1)
        copies = Copies(source_P, *_places(needs_TW, _inverse(order_A), min(index_TK.shape[1], world)))
        here_PK = owner_TK.index_select(0, source_P) == owner_P.unsqueeze(1)
        held_P1 = (self.n_experts - owner_P * self.size).clamp(0, self.size).unsqueeze(1)
        index_PK = index_TK.index_select(0, source_P)
        own_PK = here_PK & (index_PK < self.n_experts)
        index_PK = torch.where(own_PK, index_PK - owner_P.unsqueeze(1) * self.size, held_P1)
        x = send(spread(x_TD, copies), received, sent, self.mesh)
        gate = send(torch.where(here_PK, spread(gate_TK, copies), 0), received, sent, self.mesh)
        index = send(index_PK.int(), received, sent, self.mesh)
        return lambda: (arrived(x), arrived(index).long(), arrived(gate), (copies, sent, received))

    def combine(self, y_RO: Tensor, state: Any) -> Tensor:
        """As ``Exchange``."""
        copies, sent, received = state
        return collect(all_to_all(y_RO, sent, received, self.mesh), copies)


def _places(needs_TW: Tensor, place_A: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where the copies of each token are, and which are real: [T, ``most``], by process."""
    place_TW = place_A.view(needs_TW.shape[1], needs_TW.shape[0]).t()
    process_TM = needs_TW.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    real_TM = needs_TW.gather(1, process_TM)
    return torch.where(real_TM, place_TW.gather(1, process_TM), 0), real_TM


def _inverse(order_N: Tensor) -> Tensor:
    """The place of each number in a permutation."""
    return torch.empty_like(order_N).scatter(0, order_N, torch.arange(order_N.shape[0], device=order_N.device))


def _counts(index_S: Tensor, length: int) -> Tensor:
    """How often each number below a length occurs; a fixed shape, and integers, whose sum has no order."""
    counts = torch.zeros(length, dtype=torch.int64, device=index_S.device)
    return counts.scatter_add(0, index_S, torch.ones_like(index_S))


register_exchange("gather", GatherExchange)
register_exchange("slots", SlotsExchange)
register_exchange("tokens", TokensExchange)
