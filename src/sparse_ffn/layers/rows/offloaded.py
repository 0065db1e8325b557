"""OffloadedRows: all experts in host memory, some of them in a cache on the device that computes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.layers.rows.base import ExpertRows, rows_ffn
from sparse_ffn.layers.rows.copies import Copies, StreamedCopies
from sparse_ffn.layers.rows.lru import LRU
from sparse_ffn.layers.rows.quantized import QuantizedRows
from sparse_ffn.ops import Codes, Units, under_transforms

Stack = Tensor | Codes
FFN = Callable[[dict[str, Any], Tensor, Tensor], Tensor]
"""From the stacks of some experts by name, as a layer holds them, which of them each slot of a token takes, and their
numbers among all experts: the sum over the slots."""


class ExpertCache:
    """The experts of one layer in host memory, and slots for some of them on a device. Threads take turns.

    Args:
        stacks: by name a layer's stack [E, ...], or the codes of its rows, in host memory.
        n_slots: experts on the device.
        device: which one.
    """

    def __init__(self, stacks: dict[str, Stack], n_slots: int, device: torch.device) -> None:
        self.stacks = stacks
        hosts = [t for stack in stacks.values() for t in _tensors(stack)]
        # of zeros: a backend may compute all experts that it is given, and those of empty slots must add nothing
        with torch.inference_mode(False):  # they are written to later, in whatever mode
            tables = [torch.zeros(n_slots, *t.shape[1:], dtype=t.dtype, device=device) for t in hosts]
        rest = iter(tables)
        self.slots = {name: _like(stack, rest) for name, stack in stacks.items()}
        self.device = tables[0].device
        self.n_experts = hosts[0].shape[0]
        self.lru = LRU(n_slots)
        self.copies = (StreamedCopies if self.device.type == "cuda" else Copies)(hosts, tables)
        self.hits = self.misses = self.bytes = 0
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_turn": threading.Lock()}

    def _bring(self, experts: list[int]) -> list[int]:
        """Begin to copy those of one wave that are not here; the slots of all."""
        try:
            taken = [self.lru.take(expert) for expert in experts]
            missing = [(slot, expert) for expert, (slot, here) in zip(experts, taken, strict=True) if not here]
            if missing:
                self.copies.start(missing)
        except BaseException:  # an interrupt, too: experts that were not copied must not count as here
            self.lru.clear()
            raise
        self.bytes += len(missing) * sum(host[0].nbytes for host, _ in self.copies.pairs)
        return [slot for slot, _ in taken]

    def compute(self, index: Tensor, ffn: FFN) -> Tensor:
        """The sum over waves of experts of an FFN out of the cache, in which the experts of other waves are void.

        Args:
            index: experts in [0, E]; E is none.
            ffn: called with the cache's stacks and places in it, in [0, n_slots].
        """
        with self._turn:
            return self._compute(index, ffn)

    def _compute(self, index: Tensor, ffn: FFN) -> Tensor:
        here = {name: QuantizedRows(stack) if isinstance(stack, Codes) else stack for name, stack in self.slots.items()}
        waves = self.lru.waves(e for e, count in enumerate(self.count(index)) if count) or [[]]
        total: Tensor | None = None
        for wave in waves:
            hits = sum(expert in self.lru for expert in wave)
            self.hits, self.misses = self.hits + hits, self.misses + len(wave) - hits
            slots = self._bring(wave)
            slot_of, expert_of = [self.lru.n_slots] * (self.n_experts + 1), [0] * self.lru.n_slots
            for expert, slot in zip(wave, slots, strict=True):
                slot_of[expert], expert_of[slot] = slot, expert
            by_slot = torch.tensor(slot_of, device=index.device)[index]
            self.copies.wait(slots)
            try:
                y = ffn(here, by_slot, torch.tensor(expert_of, device=index.device))
            finally:
                self.copies.used()
            if len(waves) == 1:
                return y
            wide = y.to(torch.promote_types(y.dtype, torch.float32))
            total = wide if total is None else total + wide
        assert total is not None
        return total.to(y.dtype)

    def prefetch(self, index: Tensor) -> None:
        """Begin to copy the experts that an index names, those with the most slots if not all have room."""
        counts = self.count(index)
        named = sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e])
        with self._turn:
            for wave in self.lru.waves(named[: self.lru.n_slots]):
                self._bring(wave)

    def count(self, index: Tensor) -> list[int]:
        """How often an index names each expert. Here the host waits for the device."""
        counts: list[int] = torch.bincount(index.reshape(-1), minlength=self.n_experts).tolist()
        return counts[: self.n_experts]


class OffloadedRows(ExpertRows):
    """Rows [E, G, C] of all experts in host memory, dense or as codes, and a cache of some experts on a device.

    ``offload_experts_`` makes them. They compute in evaluation only and without gradients, move nowhere with ``.to``,
    and their state dict is the one that the layer had before, from host memory.

    Args:
        cache: the layer's, which all its stacks share.
        name: of the stack.
        transposed: whether the stack [E, C, G] has the units' rows as its columns.
    """

    def __init__(self, cache: ExpertCache, name: str, transposed: bool = False) -> None:
        super().__init__()
        self.cache, self.name, self.transposed = cache, name, transposed
        _leave_out_of_graphs()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _leave_out_of_graphs()

    @property
    def _host(self) -> Any:
        return self.cache.stacks[self.name]

    @property
    def shape(self) -> torch.Size:
        """(E, G, C)."""
        host = self._host
        shape: torch.Size = (host.mT if self.transposed else host).shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        host = self._host
        dtype: torch.dtype = host.scale.dtype if isinstance(host, Codes) else host.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The cache's, which computes."""
        return self.cache.device

    @property
    def codes(self) -> Codes | None:
        """Those in host memory, if they are codes."""
        return self._host if isinstance(self._host, Codes) else None

    def dense(self, experts: int | slice | Tensor | None = None) -> Tensor:
        """The numbers, [E, G, C], or those of some experts, in host memory."""
        host = self._host
        if isinstance(host, Codes):
            return (host if experts is None else host.of(experts)).dense()
        numbers: Tensor = host if experts is None else host[experts]
        return numbers.mT if self.transposed else numbers

    def stored(self) -> list[Tensor]:
        """Those in host memory."""
        return _tensors(self._host)

    def ffn(
        self,
        x: Tensor,
        units: Units,
        index: Tensor,
        gate: Tensor,
        *,
        dropout_mask: Tensor | None = None,
        activation: str,
    ) -> Tensor:
        """``ops.expert_ffn`` in waves of experts that fit into the cache.

        Raises:
            RuntimeError: the layer is in training.
        """
        bias = units.key_bias

        def of_cache(stacks: dict[str, Any], place: Tensor, expert: Tensor) -> Tensor:
            here = Units(**stacks, key_bias=None if bias is None else bias[expert])
            return rows_ffn(x, here, place, gate, dropout_mask=dropout_mask, activation=activation)

        return self.in_waves(index, of_cache, x, gate, bias)

    def in_waves(self, index: Tensor, ffn: FFN, *operands: Tensor | None) -> Tensor:
        """An FFN out of the cache that the layer's stacks share, in waves of experts that fit into it.

        Args:
            index: [T, K], experts in [0, E]; E is none.
            ffn: the sum over a token's slots, of which those without an expert here add nothing.
            operands: what else it computes with, to which there are no gradients.

        Raises:
            RuntimeError: the layer is in training, exported, traced, or inside a transform of torch.func.
        """
        self.check_mode()
        if under_transforms() or torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "offloaded experts cannot be exported or traced, and do not work inside torch.func's transforms: "
                "dequantize_experts_ first"
            )
        compute = functools.partial(self.cache.compute, index, ffn)
        y: Tensor = _WithoutGradient.apply(compute, *operands)  # type: ignore[no-untyped-call]
        return y

    def prefetch(self, index: Tensor) -> None:
        """Begin to copy the experts that an index [...] in [0, E] names.

        Raises:
            RuntimeError: the layer is in training.
        """
        self.check_mode()
        self.cache.prefetch(index)

    def check_mode(self) -> None:
        """Raise RuntimeError in training."""
        if self.training:
            raise RuntimeError("offloaded experts compute in evaluation only: call eval() on the model")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedRows:
        if fn(torch.empty(0, dtype=self.dtype)).dtype != self.dtype:
            raise TypeError(f"offloaded experts stay {self.dtype}: convert the model before offload_experts_")
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        host = self._host
        stored = host._asdict().items() if isinstance(host, Codes) else [("", host)]
        destination.update({(prefix + name).removesuffix("."): t for name, t in stored if t is not None})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        rest[-1].append(f"the experts {prefix.removesuffix('.')} are offloaded: load before offload_experts_")

    def extra_repr(self) -> str:
        """The shape, how it is stored and how much of it is on the device."""
        bits = f", bits={self._host.bits}" if isinstance(self._host, Codes) else ""
        return f"{list(self.shape)}{bits}, dtype={self.dtype}, cache={self.cache.lru.n_slots} on {self.device}"


@functools.cache
def _leave_out_of_graphs() -> None:
    """Let torch.compile break its graph at ``in_waves``. Not when this is imported, for it loads the compiler."""
    OffloadedRows.in_waves = torch.compiler.disable(OffloadedRows.in_waves)  # type: ignore[method-assign, no-untyped-call]


class _WithoutGradient(torch.autograd.Function):
    """A result that no backward pass goes through: by then its experts may have left their slots."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Tensor], *operands: Tensor | None) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("offloaded experts have no gradients: compute under torch.no_grad()")


def _tensors(stack: Stack) -> list[Tensor]:
    return [t for t in (stack if isinstance(stack, Codes) else (stack,)) if t is not None]


def _like(stack: Stack, tensors: Iterable[Tensor]) -> Stack:
    """The next tensors as a stack is made of them."""
    rest = iter(tensors)
    return stack.each(lambda _: next(rest)) if isinstance(stack, Codes) else next(rest)
