"""Copying and running modules that may refuse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_ffn.convert.find.edits import switch_off_fast_path
from sparse_ffn.convert.find.found import Formula, Unknown
from sparse_ffn.convert.find.probe import FP64, Trace, close, probe_copy, probe_input, run

Arguments = tuple[Tensor | None, ...]


def arguments(width: int) -> list[Arguments]:
    """What a block or a layer may take: tokens alone, with empty places for masks, with a memory, with a mask."""
    x, mask = probe_input(width), torch.ones(2, 1, 3, 3, **FP64)
    return [(x,), (x, None), (x, None, None), (x, x), (x, mask)]


def try_copy(module: nn.Module, *, numbers: bool = True) -> nn.Module:
    try:
        copied = probe_copy(module, numbers=numbers)
    except Exception as error:
        raise Unknown(f"{type(module).__name__} cannot be copied to probe it ({error})") from error
    for inner in copied.modules():
        switch_off_fast_path(inner)
    return copied


def try_run(
    copied: nn.Module, choices: list[Arguments], watch: Iterable[nn.Module], train: bool = False
) -> tuple[Trace, Arguments]:
    """Run with the first arguments that it takes; returns them too."""
    failed: list[str] = []
    watch = list(watch)
    for args in choices:
        try:
            return run(copied, args, watch, train=train), args
        except Exception as error:  # noqa: PERF203
            failed.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
    raise Unknown(f"{type(copied).__name__} does not run by itself ({'; '.join(dict.fromkeys(failed))})")


def check_large(copied: nn.Module, args: Arguments, ups: list[nn.Module], down: nn.Module, formula: Formula) -> None:
    """Large hidden units must follow the formula too: a clamp, as in ReLU6, shows nowhere else."""
    weights = [(weight, weight.data) for up in ups if isinstance(weight := up.weight, Tensor)]
    for weight, value in weights:
        weight.data = 1000 * value
    trace, _ = try_run(copied, [args], [*ups, down])
    for weight, value in weights:
        weight.data = value
    first, last = [trace.only(up) for up in ups], trace.only(down)
    outputs = [call.output for call in first if call is not None]
    if last is None or len(outputs) != len(ups) or not close(formula.hidden(outputs), last.input):
        raise Unknown(f"the hidden units are {formula.name} only while they are small: something clamps them")
