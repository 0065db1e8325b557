"""MemoryParallel: each process holds some rows or columns of a product-key memory's values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.checks import check_choice
from sparse_ffn.layers.product_key import ProductKeyMemory
from sparse_ffn.parallel.collectives import all_gather, all_to_all
from sparse_ffn.parallel.exchange import Exchange
from sparse_ffn.parallel.exchanges import TokensExchange
from sparse_ffn.parallel.split import Split, check_layer, check_mesh, check_share, distribute, shares
from sparse_ffn.parallel.traffic import memory_bytes

# T tokens here, A tokens of all processes, R requests that arrive, K entries of a token, O d_out, C columns here


class MemoryParallel(ParallelStyle):
    """The values of a ``ProductKeyMemory`` over processes, each of which has tokens of its own.

    ``values`` becomes a DTensor, in place; the keys and the query stay whole on every process, and so does the
    selection. By columns every process sums its columns for the tokens of all; by rows, entries travel to the process
    that holds them, and partial sums come back.

    Args:
        shard: ``"columns"``, ``"rows"``, or ``"auto"`` for that which sends fewer bytes.
        gradients: ``"mean"`` or ``"sum"``, as in ``ExpertParallel``.

    Raises:
        ValueError: an unknown word.
    """

    def __init__(self, *, shard: str = "auto", gradients: str = "mean") -> None:
        super().__init__()
        check_choice("shard", shard, ("auto", "columns", "rows"))
        check_choice("gradients", gradients, ("mean", "sum"))
        self.shard, self.gradients = shard, gradients

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Split a layer; called by ``parallelize_module``."""
        check_mesh(device_mesh)
        check_layer(self, module, (ProductKeyMemory,), ("values",))
        assert isinstance(module, ProductKeyMemory)
        if module.sparse_grad:
            raise ValueError("sparse_grad = True and MemoryParallel do not fit: DTensors have dense gradients")
        if module.experts:
            raise ValueError("experts = True and MemoryParallel do not fit: it splits values without keys")
        shard = self.shard
        if shard == "auto":
            sent = memory_bytes(module, device_mesh.size(), module.values.dtype)
            shard = "columns" if sent["columns"] <= sent["rows"] else "rows"
        rows, columns = module.values.shape
        size, name = (columns, "d_out") if shard == "columns" else (rows, "n_sub_keys²")
        check_share(name, size, device_mesh)
        distribute(module, ("values",), device_mesh, Shard(1 if shard == "columns" else 0))
        factor = 1 / device_mesh.size() if self.gradients == "mean" else 1.0
        module._split = (Columns if shard == "columns" else Rows)(device_mesh, factor, rows, columns)
        return module


class _Table(Split):
    """A process's part of the values.

    Args:
        mesh: as in ``Split``.
        factor: as in ``Split``.
        rows: of the whole table.
        columns: of the whole table.
    """

    def __init__(self, mesh: DeviceMesh, factor: float, rows: int, columns: int) -> None:
        super().__init__(mesh, factor)
        self.exchange: Exchange = TokensExchange(mesh, rows)
        self.widths = shares(columns, mesh.size())

    def bag(self, values: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sums [T, O] of the whole table's rows."""
        table, self.met = self.local(values), True
        y_TO = self._bag(table, index_TK, weight_TK)
        self.met = False
        return y_TO

    def _bag(self, table: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        raise NotImplementedError

    def fail(self) -> None:
        """As ``Split``."""
        if not self.met:
            self.exchange.fail()
        self.met = False


class Rows(_Table):
    """A process's rows."""

    def _bag(self, table: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        # rows are as experts, of tokens that have no width yet
        nothing = weight_TK.new_empty(index_TK.shape[0], 0)
        _, index_RK, weight_RK, state = self.exchange.dispatch(nothing, index_TK, weight_TK)
        # entries of other processes weigh 0
        y_RO = ops.weighted_bag(table, index_RK.clamp_max(table.shape[0] - 1), weight_RK)
        return self.exchange.combine(y_RO, state)


class Columns(_Table):
    """A process's columns."""

    def _bag(self, table: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        tokens, world, own = index_TK.shape[0], self.mesh.size(), self.widths[self.mesh.get_local_rank()]
        told = self.exchange._tell(torch.full((world,), tokens, device=index_TK.device))
        (all_tokens,) = self.exchange._numbers(told)
        longest = max(all_tokens)
        missing = (0, 0, 0, longest - tokens)
        index_AK, weight_AK = (all_gather(F.pad(t, missing), self.mesh) for t in (index_TK.int(), weight_TK))
        y_AC = ops.weighted_bag(table, index_AK.long(), weight_AK)
        blocks = [block[:n] for block, n in zip(torch.split(y_AC, longest), all_tokens, strict=True)] if longest else []
        received, sent = [tokens * width for width in self.widths], [n * own for n in all_tokens]
        flat = torch.cat(blocks).reshape(-1) if blocks else y_AC.reshape(-1)
        parts = torch.split(all_to_all(flat, received, sent, self.mesh), received)
        return torch.cat([part.view(tokens, width) for part, width in zip(parts, self.widths, strict=True)], 1)
