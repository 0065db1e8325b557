"""Examples: what the modules of a model are called with, for those that do not run on the arguments of a probe."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.convert.batches import run
from sparse_ffn.convert.find.probe import FP64, Arguments


class Examples:
    """The arguments of the first call of each module while a model runs on a batch, if there is one.

    The model runs when the first of them is asked for: most modules run on the arguments of a probe.
    """

    def __init__(self, model: nn.Module, batch: Any = None) -> None:
        self.model, self.batch = model, batch
        self._calls: dict[nn.Module, Arguments] | None = None

    def of(self, module: nn.Module) -> Iterator[Arguments]:
        """Those of a module, if it was called: tensors on the CPU, the floating ones in fp64."""
        from torch.utils._pytree import tree_map  # here: it would double the library's import time

        if self._calls is None:
            self._calls = {} if self.batch is None else self._watch()
        if module in self._calls:
            args, kwargs = tree_map(_plain, tuple(self._calls[module]))
            yield Arguments(args, kwargs)

    def _watch(self) -> dict[nn.Module, Arguments]:
        calls: dict[nn.Module, Arguments] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
            calls.setdefault(module, Arguments(args, kwargs))

        inner = [module for module in self.model.modules() if next(module.children(), None) is not None]
        run(self.model, [self.batch], [(module, partial(note, module)) for module in inner])
        return calls


def _plain(value: Any) -> Any:
    """An argument for a copy in fp64 on the CPU; a cache or any other object with a state stays behind."""
    if isinstance(value, Tensor):
        return value.detach().to(**FP64) if value.is_floating_point() else value.detach().cpu()
    return value if isinstance(value, (bool, int, float, str, torch.dtype, torch.device)) else None
