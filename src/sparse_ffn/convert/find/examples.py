"""Examples: what the modules of a model are called with, for those that do not run on the arguments of a probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.convert.batches import real, run
from sparse_ffn.convert.find.probe import FP64, Arguments

ROWS, POSITIONS = 2, 8  # of a batch: modules are copied and run in fp64 on what they get of it


class Examples:
    """The arguments of the first call of each module while a model runs on a batch, if there is one.

    The model runs when the first of them is asked for: most modules run on the arguments of a probe. It runs on a few
    rows and positions of the batch, on all of it only where it does not run on these.
    """

    def __init__(self, model: nn.Module, batch: Any = None, known: Mapping[str, Any] | None = None) -> None:
        self.model, self.batch = model, batch
        self.known = {} if known is None else known
        """What an example has shown, by name: FFNs as values of ``find.known``."""
        self._calls: dict[nn.Module, Arguments] | None = None

    def of(self, module: nn.Module) -> Iterator[Arguments]:
        """Those of a module, if it was called: tensors on the CPU, the floating ones in fp64."""
        from torch.utils._pytree import tree_map_only  # here: it would double the library's import time

        if self._calls is None:
            self._calls = {} if self.batch is None else self._watch()
        if module in self._calls:
            args, kwargs = tree_map_only(Tensor, _in_fp64, tuple(self._calls[module]))
            yield Arguments(args, kwargs)

    def forget(self) -> None:
        """Free what is kept; afterwards there are none."""
        self.batch, self._calls = None, {}

    def _watch(self) -> dict[nn.Module, Arguments]:
        for batch in _shorter(self.batch):
            with suppress(Exception):  # a model may want all of it
                return self._calls_on(batch)
        return self._calls_on(self.batch)

    def _calls_on(self, batch: Any) -> dict[nn.Module, Arguments]:
        from torch.utils._pytree import tree_map

        calls: dict[nn.Module, Arguments] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
            if module not in calls:
                calls[module] = Arguments(*tree_map(_kept, (args, kwargs)))

        inner = [module for module in self.model.modules() if next(module.children(), None) is not None]
        run(self.model, [batch], [(module, partial(note, module)) for module in inner])
        return calls


def _shorter(batch: Any) -> Iterator[Any]:
    """A batch with fewer rows and positions, then one with fewer rows."""
    from torch.utils._pytree import tree_leaves, tree_map_only

    batch = dict(batch) if isinstance(batch, Mapping) else batch  # a tokenizer's output is a leaf to pytree
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    if not tensors or tensors[0].dim() < 2:
        return
    n_rows, length = tensors[0].shape[:2]
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    padded_left = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(real(mask)[:ROWS, 0].all())
    positions = slice(-POSITIONS, None) if padded_left else slice(POSITIONS)

    def fewer(t: Tensor) -> Tensor:
        return t[:ROWS] if t.dim() and len(t) == n_rows else t

    # what is no sequence may hold positions in one, which would then not be there
    ours = [t for name, t in batch.items() if not _of_decoder(name)] if isinstance(batch, dict) else batch
    if all(t.shape[:2] == (n_rows, length) for t in tree_leaves(ours) if isinstance(t, Tensor)):
        yield tree_map_only(Tensor, lambda t: fewer(t)[:, positions] if t.dim() > 1 else fewer(t), batch)
    yield tree_map_only(Tensor, fewer, batch)


def _of_decoder(name: str) -> bool:
    """Whether an argument of transformers' models is a sequence of its own length: that of a decoder's tokens."""
    return name in ("decoder_input_ids", "decoder_attention_mask", "labels")


def _kept(value: Any) -> Any:
    """An argument on the CPU; a cache or any other object with a state stays behind."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return value if isinstance(value, (bool, int, float, str, torch.dtype, torch.device)) else None


def _in_fp64(value: Tensor) -> Tensor:
    """For a copy in fp64."""
    return value.to(**FP64) if value.is_floating_point() else value
