"""MemoryParallel: each process holds some rows or columns of a product-key memory's values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle

from sparse_ffn import ops
from sparse_ffn.checks import check_choice
from sparse_ffn.layers.product_key import ProductKeyMemory
from sparse_ffn.parallel.collectives import all_to_all, arrived
from sparse_ffn.parallel.exchange import shares
from sparse_ffn.parallel.exchanges import GatherExchange, TokensExchange
from sparse_ffn.parallel.split import Split, check_layer, check_mesh, check_share, distribute, mean
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
        factor = mean(self.gradients, device_mesh)
        if shard == "columns":
            module._split = Columns(GatherExchange(device_mesh, rows), factor, columns)
        else:
            module._split = Rows(TokensExchange(device_mesh, rows), factor)
        return module


class _Table(Split):
    """A process's part of the values."""

    def bag(self, values: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sums [T, O] of the whole table's rows."""
        table, self.met = self.local(values), True
        return self._bag(table, index_TK, weight_TK)

    def _bag(self, table: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        raise NotImplementedError


class Rows(_Table):
    """A process's rows.

    Args:
        exchange: brings entries to where their rows are.
        factor: as in ``Split``.
    """

    exchange: TokensExchange

    def __init__(self, exchange: TokensExchange, factor: float) -> None:
        super().__init__(exchange.mesh, factor, exchange)

    def _bag(self, table: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        # rows are as experts, of tokens that have no width yet
        nothing = weight_TK.new_empty(index_TK.shape[0], 0)
        _, index_RK, weight_RK, state = self.exchange.dispatch(nothing, index_TK, weight_TK)()
        # entries of other processes weigh 0
        y_RO = ops.weighted_bag(table, index_RK.clamp_max(table.shape[0] - 1), weight_RK)
        return self.exchange.combine(y_RO, state)


class Columns(_Table):
    """A process's columns.

    Args:
        exchange: brings the entries of all processes.
        factor: as in ``Split``.
        columns: of the whole table.
    """

    exchange: GatherExchange

    def __init__(self, exchange: GatherExchange, factor: float, columns: int) -> None:
        super().__init__(exchange.mesh, factor, exchange)
        self.widths = shares(columns, exchange.mesh.size())

    def _bag(self, table: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        tokens, own = index_TK.shape[0], self.widths[self.mesh.get_local_rank()]
        (index, weight), all_tokens = self.exchange.gathered((index_TK.int(), 0), (weight_TK, 0))
        longest = max(all_tokens)
        y_AC = ops.weighted_bag(table, arrived(index).long(), arrived(weight))
        blocks = [block[:n] for block, n in zip(torch.split(y_AC, longest), all_tokens, strict=True)] if longest else []
        received, sent = [tokens * width for width in self.widths], [n * own for n in all_tokens]
        flat = torch.cat(blocks).reshape(-1) if blocks else y_AC.reshape(-1)
        parts = torch.split(all_to_all(flat, received, sent, self.mesh), received)
        return torch.cat([part.view(tokens, width) for part, width in zip(parts, self.widths, strict=True)], 1)
