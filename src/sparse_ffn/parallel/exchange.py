"""Exchange: how tokens get to the processes that hold their experts, and what these computed back to the tokens.

T tokens here, R rows that arrive, D d_model, O d_out, K selected experts, W processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparse_ffn.checks import check_choice
from sparse_ffn.layers.base import OthersFailed
from sparse_ffn.parallel.collectives import all_to_all

Arrivals = tuple[Tensor, Tensor, Tensor, Any]


class Exchange:
    """A way to bring tokens to their experts; it has no parameters.

    Every process of the mesh calls it in every forward, with any number of tokens and also where it holds no expert,
    and uses all that it returns, so that every process joins the collectives of the backward pass too.

    Args:
        mesh: of one dimension: the processes that share the experts.
        n_experts: E in all. Process r holds those that ``torch.chunk`` gives it.
    """

    counted = 1
    """Numbers that each process tells each other one before any row travels."""

    def __init__(self, mesh: DeviceMesh, n_experts: int) -> None:
        self.mesh, self.n_experts = mesh, n_experts
        self.size = -(-n_experts // mesh.size())
        """Experts of a process, but for the last ones, which may hold fewer."""

    def dispatch(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Callable[[], Arrivals]:
        """Send tokens to their experts, and do not wait for those of other processes.

        Args:
            x_TD: this process's tokens.
            index_TK: their experts.
            gate_TK: their gates.

        Returns:
            A function that waits: rows [R, D], indices [R, K'] into the experts of this process (as many as it holds
            for none), gates [R, K'], and what ``combine`` needs. Rows and gates have gradients. What this process does
            before it calls the function, such as a shared expert, takes no time of its own where the wire is slower.
        """
        raise NotImplementedError(f"{type(self).__name__} must define dispatch(x_TD, index_TK, gate_TK)")

    def combine(self, y_RO: Tensor, state: Any) -> Tensor:
        """Bring back what the experts computed.

        Args:
            y_RO: the rows' weighed sums over the experts of this process.
            state: from the function that ``dispatch`` returned.

        Returns:
            [T, O], summed over the processes, with a gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must define combine(y_RO, state)")

    def fail(self) -> None:
        """Tell the others, who wait in ``dispatch``, that this process raises instead of joining them."""
        self._tell(torch.full((self.mesh.size() * self.counted,), -1, device=self.mesh.device_type))

    @property
    def held(self) -> int:
        """Experts of this process."""
        held = shares(self.n_experts, self.mesh.size())
        return held[0] if held[0] == held[-1] else held[self.mesh.get_local_rank()]

    def _owner(self, index: Tensor) -> Tensor:
        """The processes that hold the experts; of a void slot this one, so that every token has a row somewhere."""
        return torch.where(index < self.n_experts, index // self.size, self.mesh.get_local_rank())

    def _local(self, index: Tensor) -> Tensor:
        """Indices into the experts of this process; the number that it holds for all others."""
        index = index - self.mesh.get_local_rank() * self.size
        return torch.where((index >= 0) & (index < self.held), index, self.held)

    def _tell(self, counts: Tensor) -> Tensor:
        """Numbers [W·counted] for the processes in turn: theirs for this one."""
        parts = [self.counted] * self.mesh.size()
        return all_to_all(counts, parts, parts, self.mesh)

    def _numbers(self, *counts: Tensor) -> list[list[int]]:
        """Counts [W] on the host, which waits for them; the last are those that the others told.

        Raises:
            RuntimeError: another process has failed before it came here.
        """
        numbers: list[list[int]] = torch.stack(counts).tolist()
        if torch.compiler.is_compiling():  # they are symbols, of which nothing can be asked
            return numbers
        # nor in simulations, where they are numbers of all processes at once
        if failed := [rank for rank, number in enumerate(numbers[-1]) if isinstance(number, int) and number < 0]:
            ranks = [torch.distributed.get_global_rank(self.mesh.get_group(), rank) for rank in failed]
            raise OthersFailed(
                f"rank {', '.join(map(str, ranks))} raised an error before it sent its tokens to the experts: see there"
            )
        return numbers


def shares(size: int, world: int) -> list[int]:
    """How many of so many things each process holds, as ``torch.chunk`` and ``Shard`` deal them out."""
    most = -(-size // world)
    return [max(0, min(most, size - rank * most)) for rank in range(world)]


class NoExchange(Exchange):
    """For a group of one process, which holds all experts."""

    def dispatch(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Callable[[], Arrivals]:
        """As ``Exchange``."""
        return lambda: (x_TD, index_TK, gate_TK, None)

    def combine(self, y_RO: Tensor, state: Any) -> Tensor:
        """As ``Exchange``."""
        return y_RO

    def fail(self) -> None:
        """As ``Exchange``."""


EXCHANGES: dict[str, type[Exchange]] = {}


def register_exchange(name: str, cls: type[Exchange]) -> None:
    """Let ``ExpertParallel(exchange=name)`` make exchanges of a class, as one around DeepEP.

    Args:
        name: any but ``"auto"``; one that exists is replaced.
        cls: a subclass of ``Exchange``, made with a mesh and the number of experts.

    Raises:
        ValueError: a name that is no word, or "auto".
        TypeError: cls is no subclass of Exchange.
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "auto":
        raise ValueError(f"name must be a word other than 'auto', got {name!r}")
    if not (isinstance(cls, type) and issubclass(cls, Exchange)):
        raise TypeError(f"cls must be a subclass of sparse_ffn.parallel.Exchange, got {cls!r}")
    EXCHANGES[name] = cls


def choose(exchange: Any, world: int, k: int) -> type[Exchange]:
    """The class that an argument ``exchange`` means for so many processes and experts of a token."""
    if isinstance(exchange, type) and issubclass(exchange, Exchange):
        return exchange
    check_choice("exchange", exchange, ("auto", *EXCHANGES))
    if exchange == "auto" and world == 1:
        return NoExchange
    if exchange == "auto":
        # the share of the processes that a token needs, of experts drawn evenly
        exchange = "gather" if 1 - (1 - 1 / world) ** k > 0.9 else "tokens"
    return EXCHANGES[exchange]
