"""What rounding a layer's weights does to its outputs on real batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparse_ffn.compress.stacks import Stack
from sparse_ffn.convert.batches import Watch, run
from sparse_ffn.layers.mixed import MixedMoE
from sparse_ffn.layers.rows import ExpertRows


def output_errors(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module, list[Stack]]],
    rows: Mapping[int, ExpertRows],
    batches: Iterable[Any],
) -> dict[str, float]:
    """Of each layer ‖y - ŷ‖ / ‖y‖ over real tokens: y by its parameters, ŷ of the same inputs by stored rows.

    Args:
        model: runs in evaluation mode; nothing in it changes.
        layers: its modules with experts, by name.
        rows: for each parameter, by its id, what is to be stored.
        batches: as ``expert_stats``'.

    Returns:
        By the layer's name; of one that saw no token NaN.
    """
    sums = {name: (0.0, 0.0) for name, _, _ in layers}
    of_banks: dict[nn.Module, Tensor | None] = {}  # the mask that their layer was given

    def note(layer: MixedMoE, args: Any, kwargs: dict[str, Any], mask: Tensor | None) -> None:
        of_banks.update(dict.fromkeys(layer.banks, kwargs.get("mask")))

    def add(
        name: str, module: nn.Module, stacks: list[Stack], args: Any, kwargs: dict[str, Any], mask: Tensor | None
    ) -> None:
        exact = module.forward(*args, **kwargs).double()
        with _rounded(stacks, rows):
            error = module.forward(*args, **kwargs).double() - exact
        error, exact = (y.reshape(-1, y.shape[-1]).square().sum(1) for y in (error, exact))
        own = of_banks.get(module, kwargs.get("mask"))
        real = mask if own is None else own.reshape(-1)
        if real is not None:
            error, exact = error[real], exact[real]
        lost, whole = sums[name]
        sums[name] = lost + error.sum().item(), whole + exact.sum().item()

    watched: list[tuple[nn.Module, Watch]] = [
        (layer, partial(note, layer)) for layer in model.modules() if isinstance(layer, MixedMoE)
    ]
    watched += [(module, partial(add, name, module, stacks)) for name, module, stacks in layers]
    run(model, batches, watched)
    return {name: math.sqrt(lost / whole) if whole else math.nan for name, (lost, whole) in sums.items()}


@contextmanager
def _rounded(stacks: list[Stack], rows: Mapping[int, ExpertRows]) -> Iterator[None]:
    """The layer with the numbers of stored rows in its parameters."""
    kept = [(stack.held, stack.held.data) for stack in stacks]
    try:
        for stack, (parameter, _) in zip(stacks, kept, strict=True):
            dense = rows[id(parameter)].dense()
            parameter.data = dense.mT if stack.transposed else dense
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
